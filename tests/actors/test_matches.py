"""Matches on the real path: tiny models, real samplers and learners, real environment workers."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

import tinsmith
from tests.actors.test_sampling import learn
from tests.actors.test_training import new_run
from tests.envs import games
from tinsmith import LoraConfig, MatchSpec, SamplingParams, Scripted
from tinsmith.algorithms.datums import trajectory_datums
from tinsmith.algorithms.rollout import Group, Rollouts, has_signal, play_group
from tinsmith.primitives.codec import decode, encode

LONGEST = "tests.envs.games:Longest"
COUNTDOWN = "tests.envs.games:Countdown"
PARAMS = SamplingParams(max_tokens=6, seed=1)


@pytest.fixture(scope="module")
async def client(service):
    async with await service.create_env_client("tiny-llama") as client:
        yield client


@pytest.fixture(scope="module")
async def runs(service):
    """Two runs that differ, and their live policies."""
    runs = [await new_run(service, LoraConfig(rank=4, seed=seed)) for seed in (1, 2)]
    live = [await run.live_sampling_client().ready() for run in runs]
    for seed, run in enumerate(runs):
        await learn(run, seed)
    return list(zip(runs, live, strict=True))


async def assert_same_logprobs(training, trajectory) -> None:
    """The learner gives every sampled token the logprob that the match recorded (contract 6)."""
    datums = trajectory_datums(trajectory, 1.0)
    assert datums
    output = await training.forward(datums, "importance_sampling")
    for datum, out in zip(datums, output.loss_fn_outputs, strict=True):
        sampled = datum.loss_fn_inputs["advantages"] != 0
        assert sampled.any()
        np.testing.assert_allclose(
            out["logprobs"][sampled], datum.loss_fn_inputs["logprobs"][sampled], atol=1e-4
        )


def sampled_tokens(trajectory) -> list[list[int]]:
    return [segment.tokens[segment.mask].tolist() for segment in trajectory.segments]


async def test_two_runs_play_and_each_agents_tokens_have_its_own_runs_logprobs(client, runs):
    (one, live_one), (two, live_two) = runs
    spec = MatchSpec(LONGEST, {"left": live_one, "right": live_two}, PARAMS, seed=3)
    match = await client.play_match(spec)
    assert match.live == ["left", "right"]
    assert {t.oldest_version for t in match.trajectories.values()} == {1}
    await assert_same_logprobs(one, match.trajectories["left"])
    await assert_same_logprobs(two, match.trajectories["right"])
    again = await client.play_match(spec)
    for agent, trajectory in match.trajectories.items():
        assert sampled_tokens(trajectory) == sampled_tokens(again.trajectories[agent])
        assert trajectory.rewards == again.trajectories[agent].rewards


async def test_one_policy_plays_every_agent_of_a_game_of_turns(client, runs):
    run, live = runs[0]
    spec = MatchSpec(
        COUNTDOWN,
        dict.fromkeys(("first", "second", "third"), live),
        PARAMS,
        env_kwargs={"count": 20, "players": 3},
    )
    match = await client.play_match(spec)
    assert sorted(match.rewards.values()) == [-1.0, 1.0, 1.0]
    for trajectory in match.trajectories.values():
        assert len(trajectory.segments) == 1
        turns = np.diff(trajectory.segments[0].mask.astype(int)) == 1
        assert turns.sum() == trajectory.info["turns"]
        await assert_same_logprobs(run, trajectory)


async def test_a_frozen_opponent_does_not_make_a_group_stale(client, service):
    run = await new_run(service, LoraConfig(rank=4, seed=4))
    frozen = await run.save_weights_and_get_sampling_client()
    saved = (await run.save_weights_for_sampler("start")).path
    checkpoint = await service.create_sampling_client(model_path=saved)
    base = await service.create_sampling_client(base_model="tiny-llama")
    live = await run.live_sampling_client().ready()
    await learn(run, steps=3)
    opponents = [frozen, checkpoint, base, Scripted(games.says_x)]
    for opponent in opponents:
        if not isinstance(opponent, Scripted):
            await opponent.ready()

    async def play(index: int, member: int) -> tinsmith.Match:
        policies = {"first": live, "second": opponents[member]}
        params = SamplingParams(max_tokens=4, seed=member)
        return await client.play_match(MatchSpec(COUNTDOWN, policies, params, seed=index))

    group = await play_group(play, 0, 3, len(opponents))
    assert not group.failures
    assert [match.live for match in group.matches] == [["first"]] * 4
    assert group.matches[0].trajectories["second"].oldest_version == 0
    assert group.oldest_version == group.of("first").oldest_version == 3
    assert group.of("second").oldest_version == 0
    async with Rollouts(
        play, groups_per_step=1, group_size=4, version=3, max_staleness=0, max_replaced=0
    ) as rollouts:
        (batch,) = await rollouts.next_batch()
        assert rollouts.counts.dropped_stale == 0
        assert len(batch) == 4
    same = decode(encode(group), Group)
    assert [m.rewards for m in same.matches] == [m.rewards for m in group.matches]
    assert sampled_tokens(same.of("first").trajectories[0]) == sampled_tokens(
        group.of("first").trajectories[0]
    )


async def test_agents_of_different_base_models_play_with_their_own_tokens(client, service, runs):
    other = await service.create_sampling_client(base_model="tiny-qwen3")
    await other.ready()
    run, live = runs[0]
    match = await client.play_match(MatchSpec(LONGEST, {"left": live, "right": other}, PARAMS))
    await assert_same_logprobs(run, match.trajectories["left"])
    (segment,) = match.trajectories["right"].segments
    scores = await other.compute_logprobs(segment.tokens)
    np.testing.assert_allclose(scores[segment.mask], segment.logprobs[segment.mask], atol=1e-4)


async def test_scripts_that_go_wrong_and_a_match_withdrawn_leave_the_others_alone(client, runs):
    _, live = runs[0]

    def spec(script):
        return MatchSpec(COUNTDOWN, {"first": live, "second": Scripted(script)}, PARAMS)

    hanging = client.play_match(spec(games.hangs))
    outcomes = await asyncio.gather(
        client.play_match(spec(games.raises)),
        client.play_match(spec(games.says_x)),
        return_exceptions=True,
    )
    with pytest.raises(tinsmith.EnvironmentFailure, match="this script is broken"):
        raise outcomes[0]
    assert sum(outcomes[1].rewards.values()) == 0.0
    assert await hanging.cancel() is True
    with pytest.raises(tinsmith.OpCancelled):
        await asyncio.wait_for(hanging, 20)


async def test_both_runs_learn_from_their_own_agents_advantages(client, runs):
    (one, live_one), (two, live_two) = runs
    version = (await one.get_info()).version

    async def play(index: int, member: int) -> tinsmith.Match:
        params = SamplingParams(max_tokens=6, seed=100 * index + member)
        return await client.play_match(
            MatchSpec(LONGEST, {"left": live_one, "right": live_two}, params, seed=index)
        )

    async with Rollouts(
        play, groups_per_step=1, group_size=4, version=version, max_staleness=1
    ) as rollouts:
        for step in range(2):
            (group,) = await rollouts.next_batch()
            assert group.oldest_version >= version + step - 1
            updates = []
            for agent, run in (("left", one), ("right", two)):
                own = group.of(agent)
                advantages = own.rewards - own.rewards.mean()
                run.forward_backward(
                    [
                        datum
                        for trajectory, advantage in zip(own.trajectories, advantages, strict=True)
                        for datum in trajectory_datums(trajectory, float(advantage))
                    ],
                    "ppo",
                )
                updates.append(run.optim_step(tinsmith.AdamParams(learning_rate=1e-3)))
            versions = {(await update).version for update in updates}
            assert versions == {version + step + 1}
            rollouts.advance(version + step + 1)
    assert has_signal(group) == any(has_signal(group.of(a)) for a in ("left", "right"))
    with pytest.raises(tinsmith.InvalidInput, match=r"take group\.of\(agent\)"):
        _ = group.rewards
    with pytest.raises(tinsmith.InvalidInput, match=r"no agent 'middle' .* there are left, right"):
        group.of("middle")
