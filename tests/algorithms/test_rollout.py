"""Pacing, on episodes that are only timed: what is issued, when, and what a batch may hold."""

from __future__ import annotations

import asyncio
import random

import numpy as np
import pytest

import tinsmith
from tinsmith.algorithms.rollout import Rollouts
from tinsmith.primitives.types import Segment, Trajectory


class Player:
    """Plays episodes of random length under the version of the moment."""

    def __init__(self, seed: int = 0, reward=lambda index, member: float(member % 2)) -> None:
        self.version = 0
        self.random = random.Random(seed)
        self.reward = reward
        self.played: list[int] = []
        self.running = 0

    async def __call__(self, index: int, member: int) -> Trajectory:
        self.running += 1
        versions = []
        try:
            for _ in range(self.random.randint(1, 6)):
                versions.append(self.version)
                await asyncio.sleep(0)
        finally:
            self.running -= 1
        self.played.append(index)
        n = len(versions)
        segment = Segment(
            np.arange(n), np.ones(n, bool), np.zeros(n, np.float32), np.array(versions, np.int32)
        )
        return Trajectory([segment], [self.reward(index, member)], True, False, [])


async def run_loop(player, steps, **options):
    """Train `steps` times; staleness of every group trained on, and the rollouts."""
    staleness = []
    ahead = options.get("max_staleness", 0) + 1 + options.get("oversubscription", 0)
    async with Rollouts(player, groups_per_step=3, group_size=4, **options) as rollouts:
        for step in range(steps):
            batch = await rollouts.next_batch()
            assert len(batch) == 3
            staleness += [player.version - g.oldest_version for g in batch]
            assert (
                rollouts.counts.issued
                <= (step + ahead) * 3
                + rollouts.counts.dropped_no_signal
                + rollouts.counts.dropped_stale
            )
            for _ in range(2):  # the learner works, rollouts go on
                await asyncio.sleep(0)
            player.version += 1
            rollouts.advance(player.version)
    return staleness, rollouts


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("max_staleness", [0, 1, 3])
async def test_staleness_is_bounded_by_pacing_and_nothing_is_thrown_away(seed, max_staleness):
    staleness, rollouts = await run_loop(Player(seed), 12, max_staleness=max_staleness)
    assert max(staleness) <= max_staleness
    assert rollouts.counts.dropped_stale == 0
    assert rollouts.counts.trained == 36


@pytest.mark.parametrize("max_staleness", [1, 2, 4, 8])
async def test_staleness_is_bounded_where_a_few_episodes_take_very_long(max_staleness):
    class HeavyTailed(Player):
        async def __call__(self, index: int, member: int) -> Trajectory:
            started = self.version
            for _ in range(int(self.random.paretovariate(1.0))):
                await asyncio.sleep(0)
            trajectory = await super().__call__(index, member)
            trajectory.segments[0].versions[0] = started
            return trajectory

    for seed in range(5):
        staleness, rollouts = await run_loop(HeavyTailed(seed), 30, max_staleness=max_staleness)
        assert max(staleness) == max_staleness
        assert rollouts.counts.dropped_stale == 0


async def test_staleness_zero_is_the_synchronous_loop():
    player = Player()
    staleness, rollouts = await run_loop(player, 5)
    assert set(staleness) == {0}
    assert rollouts.counts.issued == 15 + 3  # the last advance began a batch
    batches = [index // 3 for index in player.played]
    assert batches == [batch for batch in range(5) for _ in range(12)]


async def test_asynchronous_rollouts_run_ahead():
    staleness, _ = await run_loop(Player(), 12, max_staleness=2)
    assert np.mean(staleness) > 0.5


@pytest.mark.parametrize("max_staleness", [0, 3])
async def test_nothing_is_started_that_will_not_be_trained_on(max_staleness):
    staleness, rollouts = await run_loop(Player(), 5, max_staleness=max_staleness, total=15)
    assert rollouts.counts.issued == rollouts.counts.trained == 15
    assert rollouts.outstanding == []
    assert max(staleness) <= max_staleness


async def test_groups_without_signal_are_counted_and_replaced():
    player = Player(reward=lambda index, member: float(member % 2 and index % 2))
    _, rollouts = await run_loop(player, 6, max_staleness=1, max_replaced=12)
    assert rollouts.counts.trained == 18
    assert rollouts.counts.dropped_no_signal >= 17


async def test_where_nothing_has_signal_a_batch_still_gets_full():
    player = Player(reward=lambda index, member: 1.0)
    _, rollouts = await run_loop(player, 6, max_staleness=1, max_replaced=2)
    assert rollouts.counts.trained == 18
    assert rollouts.counts.dropped_no_signal == 12


async def test_oversubscribed_groups_that_come_too_late_are_dropped_and_counted():
    staleness, rollouts = await run_loop(Player(), 10, oversubscription=1.0)
    assert set(staleness) == {0}
    assert rollouts.counts.trained == 30
    assert rollouts.counts.dropped_stale >= 20


async def test_a_resumed_loop_plays_again_what_was_not_trained_on():
    player = Player()
    options = dict(groups_per_step=3, group_size=4, max_staleness=1)
    async with Rollouts(player, **options) as rollouts:
        first = await rollouts.next_batch()
        outstanding, following = rollouts.outstanding, rollouts.next_index
    assert player.running == 0
    trained = [g.index for g in first]
    async with Rollouts(player, redo=outstanding, first_index=following, **options) as rollouts:
        for version in range(1, 4):
            trained += [g.index for g in await rollouts.next_batch()]
            player.version = version
            rollouts.advance(version)
    assert sorted(trained) == list(range(12))


async def test_failed_episodes_are_left_out_and_too_many_stop_the_loop():
    async def broken(index, member):
        raise tinsmith.EnvironmentFailure("it broke")

    async def half_broken(index, member):
        if member == 0:
            raise tinsmith.EnvironmentFailure("it broke")
        return await Player()(index, member)

    async with Rollouts(half_broken, groups_per_step=2, group_size=4) as rollouts:
        batch = await rollouts.next_batch()
        assert [len(g.trajectories) for g in batch] == [3, 3]
        assert rollouts.counts.failed_episodes == 2
    async with Rollouts(broken, groups_per_step=2, group_size=4) as rollouts:
        with pytest.raises(tinsmith.RolloutFailure, match="it broke"):
            await rollouts.next_batch()


async def test_an_error_that_is_no_environments_fault_stops_the_loop():
    async def buggy(index, member):
        raise tinsmith.NotFound("no environment 'x'")

    async with Rollouts(buggy, groups_per_step=1, group_size=2) as rollouts:
        with pytest.raises(tinsmith.NotFound):
            await rollouts.next_batch()
