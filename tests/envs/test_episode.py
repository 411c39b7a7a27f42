from __future__ import annotations

import pickle

import numpy as np
import pytest

from tests.envs.scripted import Scripted
from tests.tiny import tiny_tokenizer
from tinsmith.envs import ChatRenderer, Env, EnvPool, EpisodeLimits, EpisodeSpec, play_episode
from tinsmith.envs.registry import register
from tinsmith.primitives.errors import EnvironmentFailure, InvalidInput, NotFound
from tinsmith.primitives.types import SamplingParams

ENV = "tests.envs.misbehaving:Misbehaving"


@pytest.fixture(scope="module")
def renderer() -> ChatRenderer:
    return ChatRenderer(tiny_tokenizer(), max_context=512)


@pytest.fixture(scope="module")
async def pool():
    async with EnvPool() as pool:
        yield pool


async def play(pool, renderer, turns, env=ENV, **spec):
    policy = Scripted(renderer.tokenizer, turns)
    trajectory = await play_episode(pool, renderer, EpisodeSpec(env, policy, **spec))
    return trajectory, policy


async def test_an_episode_becomes_a_trajectory(pool, renderer):
    params = SamplingParams(max_tokens=16, seed=5)
    trajectory, policy = await play(
        pool, renderer, ["one", "two", "three"], sampling_params=params, seed=3
    )
    assert trajectory.terminated
    assert not trajectory.truncated
    assert trajectory.rewards == [1.0, 1.0, 1.0]
    assert trajectory.info == {"turn": 3, "turns": 3}
    assert trajectory.seed == 3
    said = [m["content"] for m in trajectory.messages[1:]]
    assert said == ["one", "you said one", "two", "you said two", "three", "you said three"]
    (segment,) = trajectory.segments
    assert segment.versions[segment.mask].tolist() == sorted(segment.versions[segment.mask])
    # What the policy saw in each turn is what is trained on.
    for turn, prompt in enumerate(policy.prompts):
        start = int(np.flatnonzero(segment.mask & (segment.versions == turn))[0])
        np.testing.assert_array_equal(segment.tokens[:start], prompt)


async def test_turns_have_repeatable_seeds_of_their_own(pool, renderer):
    seeds = []
    for seed in (5, 5, 6):
        params = SamplingParams(max_tokens=16, seed=seed)
        _, policy = await play(pool, renderer, ["one", "two", "three"], sampling_params=params)
        seeds.append([p.seed for p in policy.params])
    assert seeds[0] == seeds[1]
    assert len({*seeds[0], *seeds[2]}) == 6


async def test_too_many_turns_truncate(pool, renderer):
    trajectory, _ = await play(
        pool, renderer, ["one", "two", "three"], limits=EpisodeLimits(max_turns=2)
    )
    assert trajectory.truncated
    assert not trajectory.terminated
    assert trajectory.info["turns"] == 2


async def test_a_turn_that_would_not_fit_the_context_truncates(pool, renderer):
    params = SamplingParams(max_tokens=60)
    limits = EpisodeLimits(max_context=150)
    trajectory, policy = await play(
        pool, renderer, ["one", "two", "three"], sampling_params=params, limits=limits
    )
    assert trajectory.truncated
    assert 0 < trajectory.info["turns"] < 3
    assert all(len(prompt) + 60 <= 150 for prompt in policy.prompts)
    nothing, policy = await play(
        pool, renderer, ["one"], sampling_params=params, limits=EpisodeLimits(max_context=50)
    )
    assert nothing.truncated
    assert nothing.segments == policy.prompts == nothing.rewards == []


async def test_an_episode_that_takes_too_long_says_what_it_was_doing(pool, renderer):
    await play(pool, renderer, ["one"])
    with pytest.raises(
        EnvironmentFailure, match=r"not over within 0\.5 s; .* the environment in turn 1"
    ):
        await play(pool, renderer, ["hang"], limits=EpisodeLimits(episode_seconds=0.5))


async def test_a_failing_environment_fails_its_episode_with_its_traceback(pool, renderer):
    with pytest.raises(EnvironmentFailure, match="this environment is broken") as caught:
        await play(pool, renderer, ["one", "raise"])
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


async def test_an_unknown_environment_is_the_callers_error(pool, renderer):
    with pytest.raises(NotFound, match="no environment 'nonsense'"):
        await play(pool, renderer, ["one"], env="nonsense")
    with pytest.raises(InvalidInput, match="turnz"):
        await play(pool, renderer, ["one"], env_kwargs={"turnz": 3})


async def test_an_environment_registered_here_by_value_plays_in_its_own_process(pool, renderer):
    class Local(Env):
        def reset(self, *, seed=None, options=None):
            return [{"role": "system", "content": "be brief"}, {"role": "user", "content": "?"}], {}

        def step(self, action):
            return "", np.float32(0.5), np.bool_(True), False, {"n": np.arange(2), "o": object}

    register("local-to-this-test", Local)
    trajectory, _ = await play(pool, renderer, ["one"], env="local-to-this-test")
    assert trajectory.rewards == [0.5]
    assert trajectory.info == {"n": [0, 1], "o": "<class 'object'>", "turns": 1}
    assert [m["role"] for m in trajectory.messages] == ["system", "user", "assistant"]


def test_specs_are_picklable_and_limits_are_checked():
    spec = EpisodeSpec("calculator", None, seed=4)
    assert pickle.loads(pickle.dumps(spec)) == spec
    with pytest.raises(InvalidInput, match="max_turns must be above 0"):
        EpisodeLimits(max_turns=0)
