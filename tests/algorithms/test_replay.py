"""Replay on groups without a model: what may be drawn, that it is bounded, and going on with it."""

from __future__ import annotations

import numpy as np
import pytest

import tinsmith
from tests.algorithms.test_rollout import Player
from tinsmith.algorithms.replay import Replay, ReplayState
from tinsmith.algorithms.rollout import Group, Rollouts
from tinsmith.primitives.codec import decode, encode
from tinsmith.primitives.types import Segment, Trajectory


def group(index: int, version: int) -> Group:
    segment = Segment(
        np.arange(3), np.ones(3, bool), np.zeros(3, np.float32), np.full(3, version, np.int32)
    )
    return Group(index, version, [Trajectory([segment], [1.0], True, False, [])])


def step(replay: Replay, version: int, count: int = 2) -> list[int]:
    """A step of a loop with two fresh groups; the numbers of those drawn."""
    drawn = [g.index for g in replay.draw(count, version)]
    replay.add([group(2 * version, version), group(2 * version + 1, version)])
    return drawn


def test_what_is_drawn_is_fresh_enough_and_different_and_not_used_too_often():
    replay = Replay(3, max_uses=2, seed=0)
    drawn: list[int] = []
    for version in range(20):
        now = step(replay, version)
        assert len(set(now)) == len(now) == (0 if version == 0 else 2)
        assert all(0 < version - index // 2 <= 3 for index in now)
        drawn += now
        assert len(replay) <= 2 * 4  # staleness bounds the memory
    uses = np.bincount(drawn)
    assert uses.max() == 2
    counts = replay.counts
    assert counts.replayed == len(drawn)
    assert counts.used_up == (uses == 2).sum()
    # Every group is accounted for.
    assert counts.expired + counts.used_up + counts.evicted + len(replay) == 40


async def test_a_users_own_loop_mixes_fresh_groups_and_replayed_ones():
    player, replay = Player(), Replay(3, seed=0)
    async with Rollouts(player, groups_per_step=3, group_size=4, max_staleness=1) as rollouts:
        for version in range(8):
            fresh = await rollouts.next_batch()
            drawn = replay.draw(2, version)
            replay.add(fresh)
            assert max(version - g.oldest_version for g in fresh) <= 1  # paced as without replay
            assert all(version - g.oldest_version <= 3 for g in drawn)
            assert not {g.index for g in fresh} & {g.index for g in drawn}
            player.version = version + 1
            rollouts.advance(version + 1)
    assert rollouts.counts.trained == 24
    assert rollouts.counts.dropped_stale == 0
    assert replay.counts.replayed == 14


def test_the_oldest_leave_a_full_buffer():
    replay = Replay(100, capacity=3, seed=0)
    replay.add(group(i, i) for i in range(5))
    assert [g.index for g in replay.draw(9, 5)] == [2, 3, 4]
    assert (len(replay), replay.counts.evicted) == (3, 2)


def test_draws_depend_on_the_seed_alone():
    def course(seed):
        replay = Replay(4, seed=seed)
        return [step(replay, version) for version in range(10)]

    assert course(1) == course(1)
    assert course(1) != course(2)


def test_a_buffer_goes_on_from_its_state_as_if_nothing_had_happened():
    replay, reference = Replay(4, seed=5), Replay(4, seed=5)
    for version in range(6):
        assert step(replay, version) == step(reference, version)
    state = decode(encode(replay.state()), ReplayState)
    again = Replay(4, seed=5, state=state)
    for version in range(6, 12):
        assert step(again, version) == step(reference, version)
    assert again.counts == reference.counts


@pytest.mark.parametrize(
    "settings", [{"max_staleness": -1}, {"max_uses": 0}, {"capacity": 0}, {"seed": -1}]
)
def test_a_limit_that_makes_no_sense_is_refused(settings):
    with pytest.raises(tinsmith.InvalidInput, match=f"Replay: {next(iter(settings))} must be"):
        Replay(**{"max_staleness": 1, **settings})
