"""Games, with policies that say what they are told: who acts, what each agent's trajectory holds,
scripts, forfeits, and what is said of games that break the interface."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import numpy as np
import pytest

import tinsmith
from tests.envs import games
from tests.envs.scripted import Scripted as Policy
from tests.tiny import tiny_tokenizer
from tinsmith.envs import (
    ChatRenderer,
    EnvPool,
    EpisodeLimits,
    EpisodeSpec,
    MatchSpec,
    Scripted,
    check_env,
    play_episode,
    play_match,
)
from tinsmith.primitives.errors import EnvironmentFailure, InvalidInput, Unavailable
from tinsmith.primitives.types import Match, SamplingParams

GAMES = "tests.envs.games"


@pytest.fixture(scope="module")
def renderer() -> ChatRenderer:
    return ChatRenderer(tiny_tokenizer(), max_context=512)


@pytest.fixture(scope="module")
async def pool():
    async with EnvPool() as pool:
        yield pool


@pytest.fixture
def play(pool, renderer):
    async def play(game: str, policies: dict, **spec) -> Match:
        policies = {a: Policy(renderer.tokenizer, p) if isinstance(p, list) else p
                    for a, p in policies.items()}  # fmt: skip
        return await play_match(
            pool, lambda agent: renderer, MatchSpec(f"{GAMES}:{game}", policies, **spec)
        )

    return play


def said(trajectory) -> list[str]:
    return [m["content"] for m in trajectory.messages]


async def test_agents_act_at_the_same_time_and_each_has_its_own_trajectory(play, renderer):
    left, right = (Policy(renderer.tokenizer, turns) for turns in (["fox", "dog!"], ["box", "a"]))
    match = await play("Longest", {"left": left, "right": right}, seed=3)
    assert list(match.trajectories) == ["left", "right"]
    assert match.rewards == {"left": 1.0, "right": 0.0}
    assert match.trajectories["left"].rewards == [0.0, 1.0]
    assert match.live == []
    assert match.forfeits == {}
    assert match.seed == 3
    for agent, policy, turns in (("left", left, ["fox", "dog!"]), ("right", right, ["box", "a"])):
        trajectory = match.trajectories[agent]
        assert trajectory.terminated
        assert trajectory.info == {"round": 2, "turns": 2}
        assert said(trajectory)[1::2] == turns
        assert said(trajectory)[0].startswith(f"{agent}, write about")
        assert said(trajectory)[2::2] == ["lengths 3 3", "lengths 4 1"]
        (segment,) = trajectory.segments
        # What the policy saw in each turn is what is trained on.
        for turn, prompt in enumerate(policy.prompts):
            start = int(np.flatnonzero(segment.mask & (segment.versions == turn))[0])
            np.testing.assert_array_equal(segment.tokens[:start], prompt)


async def test_in_a_game_of_turns_a_reward_counts_for_an_agents_latest_turn(play):
    match = await play("Countdown", {"first": ["one", "two"], "second": ["xx", "yyy"]})
    first, second = match.trajectories.values()
    assert said(first) == ["12 left", "one", "7 left", "two", "1 left", "one"]
    assert said(second) == ["9 left", "xx", "4 left", "yyy"]
    assert first.rewards == [0.0, 0.0, -1.0]
    assert second.rewards == [0.0, 1.0]


async def test_agents_of_one_policy_draw_with_seeds_of_their_own(play, renderer):
    seeds = []
    for _ in range(2):
        policy = Policy(renderer.tokenizer, ["fox"])
        params = SamplingParams(max_tokens=16, seed=5)
        await play("Longest", {"left": policy, "right": policy}, sampling_params=params)
        seeds.append(sorted(p.seed for p in policy.params))
    assert seeds[0] == seeds[1]
    assert len(set(seeds[0])) == 4


async def test_sampling_parameters_may_be_given_by_agent(play, renderer):
    left, right = (Policy(renderer.tokenizer, ["fox"]) for _ in range(2))
    params = {"left": SamplingParams(max_tokens=5), "right": SamplingParams(max_tokens=7)}
    await play("Longest", {"left": left, "right": right}, sampling_params=params)
    assert {p.max_tokens for p in left.params} == {5}
    assert {p.max_tokens for p in right.params} == {7}
    with pytest.raises(InvalidInput, match="none for 'right'"):
        await play("Longest", {"left": left, "right": right}, sampling_params={
            "left": SamplingParams()})  # fmt: skip


async def test_a_script_plays_in_the_games_process_and_is_recorded_without_tokens(play):
    match = await play("Countdown", {"first": ["one"], "second": Scripted(games.Remembers())})
    script = match.trajectories["second"]
    assert said(script) == ["9 left", "1 of 1", "3 left", "2 of 3"]
    assert script.segments == []
    assert script.rewards == [0.0, -1.0]
    assert match.rewards == {"first": 1.0, "second": -1.0}


async def test_scripts_alone_play_a_match_the_same_for_the_same_seed(play):
    def plays(seed):
        scripts = dict.fromkeys(("first", "second", "third"), Scripted(games.says_x))
        return play("Countdown", scripts, seed=seed, env_kwargs={"count": 30, "players": 3})

    one, same, other = [await plays(seed) for seed in (1, 1, 2)]
    assert one.trajectories["third"].messages == same.trajectories["third"].messages
    assert one.trajectories["third"].messages != other.trajectories["third"].messages
    assert sorted(one.rewards.values()) == [-1.0, 1.0, 1.0]
    firsts = [m.trajectories["first"].messages for m in (one, other)]
    assert firsts[0] != firsts[1]


async def test_a_script_takes_no_more_turns_than_an_agent_may(play):
    scripts = dict.fromkeys(("first", "second"), Scripted(games.says_x))
    match = await play(
        "Countdown", scripts, env_kwargs={"count": 100}, limits=EpisodeLimits(max_turns=3)
    )
    assert match.forfeits == {"first": "it has taken all its 3 turns"}
    assert [t.info["turns"] for t in match.trajectories.values()] == [3, 3]
    assert all(t.truncated for t in match.trajectories.values())


@pytest.mark.parametrize(
    ("script", "told"),
    [
        (games.raises, r"ValueError: this script is broken\n\(in the script that plays 'second'"),
        (games.hangs, r"'second' by Scripted\(hangs\) is played\) hung in step 1: no answer"),
        (lambda messages, rng: 3, r"the script of 'second' must return a str, got 3"),
    ],
)
async def test_a_script_that_goes_wrong_costs_only_its_match(play, script, told):
    await play("Longest", {"left": ["a"], "right": ["b"]})  # the module is imported
    limits = EpisodeLimits(step_seconds=3.0)
    good = {"first": ["one"], "second": Scripted(games.says_x)}
    outcomes = await asyncio.gather(
        play("Countdown", {"first": ["one"], "second": Scripted(script)}, limits=limits),
        play("Countdown", good),
        return_exceptions=True,
    )
    with pytest.raises(EnvironmentFailure, match=told):
        raise outcomes[0]
    assert isinstance(outcomes[1], Match)


async def test_an_agent_with_a_full_context_forfeits_as_the_game_says(play):
    params = {"left": SamplingParams(max_tokens=400), "right": SamplingParams(max_tokens=8)}
    policies = {"left": ["fox jumps"], "right": ["dog"]}
    limits = EpisodeLimits(max_context=430)
    match = await play("Longest", policies, sampling_params=params, limits=limits)
    assert list(match.forfeits) == ["left"]
    assert "its context is full" in match.forfeits["left"]
    assert all(t.truncated and not t.terminated for t in match.trajectories.values())
    assert match.rewards == {"left": 1.0, "right": 0.0}  # of the round before
    won = await play(
        "Longest", policies, sampling_params=params, limits=limits,
        env_kwargs={"win_by_forfeit": True},
    )  # fmt: skip
    assert won.rewards == {"left": 1.0, "right": 1.0}
    assert all(t.terminated for t in won.trajectories.values())
    assert "its context is full" in said(won.trajectories["right"])[-1]


class Failing:
    """A policy whose sampler is gone from the second turn on."""

    def __init__(self, tokenizer) -> None:
        self.policy = Policy(tokenizer, ["one"])

    async def sample(self, prompt, num_samples=1, sampling_params=None):
        if self.policy.prompts:
            raise Unavailable("the sampler is gone")
        return await self.policy.sample(prompt, num_samples, sampling_params)


async def test_a_policy_that_fails_forfeits_and_the_others_may_play_on(play, renderer):
    policies = {"a": ["x"], "b": Failing(renderer.tokenizer), "c": Scripted(games.says_x)}
    match = await play("Knockout", policies)
    assert match.forfeits == {"b": "its policy failed: the sampler is gone"}
    assert match.rewards == {"a": 4.0, "b": 1.0 - 5.0, "c": 4.0}
    assert match.trajectories["b"].truncated
    assert said(match.trajectories["a"]) == [
        "begin", "x", "round 1", "without ['b']", "x", "round 2", "x", "round 3", "x", "round 4",
    ]  # fmt: skip
    (segment,) = match.trajectories["b"].segments
    assert segment.mask.any()


async def test_a_policy_that_fails_alone_is_an_error(pool, renderer):
    spec = EpisodeSpec("tests.envs.misbehaving:Misbehaving", Failing(renderer.tokenizer))
    with pytest.raises(Unavailable, match="the sampler is gone"):
        await play_episode(pool, renderer, spec)


async def test_an_agent_has_its_own_tools(pool, renderer):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% if tools %}TOOLS {{ tools | map(attribute='function.name') | join }}{% endif %}"
        + tokenizer.chat_template
    )
    tooled = ChatRenderer(tokenizer, 512)
    planner = Policy(tokenizer, ["Add them."])
    worker = Policy(tokenizer, ["add(2, 3)", "done"])
    spec = MatchSpec(f"{GAMES}:Workshop", {"planner": planner, "worker": worker})
    match = await play_match(pool, lambda agent: tooled, spec)
    assert "TOOLS" not in tokenizer.decode(planner.prompts[0])
    assert tokenizer.decode(worker.prompts[0]).startswith("TOOLS add")
    assert [m["role"] for m in match.trajectories["worker"].messages] == [
        "user", "assistant", "tool", "assistant",
    ]  # fmt: skip
    assert match.rewards == {"planner": 1.0, "worker": 1.0}
    assert match.trajectories["planner"].rewards == [1.0]


async def test_an_environment_of_one_agent_is_a_game_and_a_script_can_play_it(play, pool, renderer):
    spec = MatchSpec("tests.envs.misbehaving:Misbehaving", {"agent": Scripted(games.says_x)})
    match = await play_match(pool, lambda agent: renderer, spec)
    assert match.rewards == {"agent": 3.0}
    assert match.trajectories["agent"].info["turns"] == 3


async def test_what_cannot_be_bound_is_the_callers_error(play, pool, renderer):
    with pytest.raises(InvalidInput, match=r"has the agents \['left', 'right'\], policies are bou"):
        await play("Longest", {"left": ["x"]})
    with pytest.raises(InvalidInput, match="bind each of its agents and no others"):
        await play("Longest", {"left": ["x"], "right": ["x"], "middle": ["x"]})
    with pytest.raises(InvalidInput, match=r"policies\['left'\] must be a sampling client or Scri"):
        MatchSpec("x", {"left": "tinker://run"})
    with pytest.raises(InvalidInput, match="must be a dict of a sampling client"):
        MatchSpec("x", {})
    with pytest.raises(InvalidInput, match="must be a function"):
        Scripted("rock")
    lock = threading.Lock()
    with pytest.raises(InvalidInput, match="cannot be sent to its match"):
        Scripted(lambda messages, rng: str(lock))
    with pytest.raises(
        InvalidInput, match="a game of the agents left, right: play it with a Match"
    ):
        await play_episode(
            pool, renderer, EpisodeSpec(f"{GAMES}:Longest", Policy(renderer.tokenizer, ["x"]))
        )


OVER = {"a": True, "b": True}


@pytest.mark.parametrize(
    ("returned", "told"),
    [
        ({"reset": "x"}, r"reset must return \(observations, infos\), got 'x'"),
        ({"reset": ("x", {})}, "reset: observations must be a dict by agent, got 'x'"),
        ({"reset": ({"z": "?"}, {})}, r"there is no agent 'z'; the agents are \['a', 'b'\]"),
        ({"reset": ({"a": 3}, {})}, r"reset: observations\['a'\]: an observation must be a str"),
        ({"reset": ({"a": []}, {})}, r"observations\['a'\]: an observation .* holds no message"),
        ({"reset": ({}, {})}, "nobody may act, since no agent that goes on has an observation"),
        ({"reset": ({"a": "?"}, {"a": 3})}, r"reset: infos\['a'\] must be a dict, got a int"),
        ({"step": ({}, {}, True, {})}, r"step must return \(observations, rewards, terminations"),
        ({"step": ({}, {"a": "x"}, OVER, {}, {})}, r"step: rewards\['a'\] must be a number"),
        ({"step": ({}, {"b": float("nan")}, OVER, {}, {})}, r"rewards\['b'\] must be finite, got"),
        ({"step": ({}, {}, {"a": 1}, {}, {})}, r"step: terminations\['a'\] must be a bool, got 1"),
        ({"step": ({}, {}, {"a": True}, {}, {})}, r"step: nobody may act, .* \['b'\] are neither"),
        ({"forfeit": ({"b": "?"}, {}, {}, {}, {})}, r"forfeit must terminate or truncate .*'a'"),
        ({"possible_agents": ["a", "a"]}, "possible_agents must be a list of different names"),
        ({"possible_agents": []}, "possible_agents must be a list of different names"),
    ],
)
def test_what_is_wrong_with_a_game_is_said(returned, told):
    with pytest.raises(InvalidInput, match=f"environment 'Returning':\n- .*{told}"):
        check_env(games.Returning(**returned))


async def test_a_game_that_breaks_the_interface_fails_its_match(play):
    with pytest.raises(EnvironmentFailure, match=r"raised in step 1:\n(.|\n)*nobody may act"):
        await play("Returning", {"a": ["x"], "b": ["x"]}, env_kwargs={"step": ({}, {}, {}, {}, {})})


@pytest.mark.parametrize("game", ["Longest", "Countdown", "Knockout", "Workshop"])
def test_sound_games_pass(game):
    check_env(f"{GAMES}:{game}", actions=["hello", "1", "add(2, 3)"])


def test_the_guides_game_is_a_sound_one():
    guide = (Path(tinsmith.__file__).parent / "docs" / "multi_agent.md").read_text()
    exec(guide.split("```python\n")[1].split("```")[0], {"__name__": "guide"})
    check_env("higher")


def test_a_game_without_its_methods_is_told_so():
    class Odd(games.Longest):
        def forfeit(self):
            return {}

        def step(self):
            return {}

    with pytest.raises(
        InvalidInput, match=r"step cannot be called as step\(actions\)(.|\n)*forfei"
    ):
        check_env(Odd())


async def test_a_game_registered_here_plays_by_value(pool, renderer):
    class Local(games.Longest):
        pass

    tinsmith.envs.register("longest-of-this-test", Local)
    policies = {
        "left": Scripted(lambda messages, rng: "ab"),
        "right": Scripted(lambda messages, rng: "a"),
    }
    match = await play_match(
        pool, lambda agent: renderer, MatchSpec("longest-of-this-test", policies)
    )
    assert match.rewards == {"left": 2.0, "right": 0.0}
