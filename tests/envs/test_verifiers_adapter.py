from __future__ import annotations

from pathlib import Path

import pytest

from tests.envs.scripted import Scripted
from tests.tiny import tiny_tokenizer
from tinsmith.envs import (
    ChatRenderer,
    EnvPool,
    EpisodeLimits,
    EpisodeSpec,
    make,
    play_episode,
)
from tinsmith.primitives.errors import EnvironmentFailure, InvalidInput, NotFound


@pytest.fixture(autouse=True)
def tasksets_are_found(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


async def test_a_single_turn_task_is_scored_by_its_rewards():
    env = make("verifiers:count_taskset", num_tasks=5)
    messages, info = await env.reset(seed=8)
    assert info == {"task": 3}
    assert messages == [
        {"role": "system", "content": "You weigh stones."},
        {"role": "user", "content": "How much do 3 stones weigh?"},
    ]
    observation, reward, terminated, truncated, info = await env.step("9 kg")
    assert (observation, reward, terminated, truncated) == ("", 2.5, True, False)
    assert info["rewards"] == {"right": 2.0, "short": 0.5}
    assert info["metrics"] == {"length": 4.0}
    await env.reset(seed=8)
    assert (await env.step("They weigh 10 kg, I think."))[1] == 0.0


class Seen(ChatRenderer):
    """Keeps the tools that the conversation began with."""

    def start(self, messages, tools=None):
        self.tools = tools
        return super().start(messages, tools)


async def test_tools_of_the_task_are_offered_and_called():
    tokenizer = tiny_tokenizer()
    call = '<tool_call>{"name": "scale_weigh", "arguments": {"stones": 4}}</tool_call>'
    wrong = '<tool_call>{"name": "scale_weigh", "arguments": {"stones": "many"}}</tool_call>'
    policy = Scripted(tokenizer, [call, wrong, "12 kg"])
    spec = EpisodeSpec(
        "verifiers:count_taskset",
        policy,
        seed=4,
        env_kwargs={"task": {"with_tools": True}},
        limits=EpisodeLimits(step_seconds=120),
    )
    async with EnvPool() as pool:
        renderer = Seen(tokenizer)
        trajectory = await play_episode(pool, renderer, spec)
    told = [message for message in trajectory.messages if message["role"] == "tool"]
    assert told[0] == {"role": "tool", "name": "scale_weigh", "content": "12 kg"}
    assert "valid integer" in told[1]["content"]
    assert trajectory.rewards == [0.0, 0.0, 2.5]
    assert [tool["function"]["name"] for tool in renderer.tools] == ["scale_weigh"]


async def test_a_multi_turn_environment_drives_the_conversation():
    env = make("verifiers:guess_taskset")
    messages, _ = await env.reset(options={"task": 1})
    assert messages == [{"role": "user", "content": "Which digit?"}]
    for guess, answer in [("5", "higher"), ("9", "lower"), ("6", "higher")]:
        observation, reward, terminated, *_ = await env.step(guess)
        assert observation == [{"role": "user", "content": answer}]
        assert (reward, terminated) == (0.0, False)
    _, reward, terminated, _, info = await env.step("7")
    assert (reward, terminated) == (1.0, True)
    assert info["metrics"]["guesses"] == 4.0


async def test_the_librarys_limits_and_stops_end_the_episode():
    env = make("verifiers:guess_taskset", env={"guesser": {"max_turns": 1}})
    await env.reset(options={"task": 1})
    _, reward, terminated, truncated, info = await env.step("3")
    assert (reward, terminated, truncated) == (0.0, False, True)
    assert info["stopped_by"] == "max_turns"
    env = make("verifiers:guess_taskset")
    await env.reset(options={"task": 1})
    _, _, terminated, _, info = await env.step("darn")
    assert terminated
    assert info["stopped_by"] == "swears"


async def test_what_cannot_be_one_conversation_fails_its_episode():
    env = make("verifiers:guess_taskset", env={"rewrites": True})
    await env.reset(seed=0)
    with pytest.raises(InvalidInput, match="does not go on from the last one"):
        await env.step("1")
    await env.close()
    env = make("verifiers:guess_taskset")
    await env.reset(seed=0)
    with pytest.raises(EnvironmentFailure, match=r"(?s)failed:.*invalid literal for int"):
        await env.step("one")


async def test_splits_share_no_task():
    names = {"train": set(), "eval": set()}
    for split, tasks in names.items():
        env = make("verifiers:count_taskset", split=split)
        tasks |= {env.rows.pick(seed) for seed in range(20)}
    assert names == {"train": set(range(8)), "eval": {8, 9}}


def test_what_the_library_refuses_is_said():
    with pytest.raises(NotFound, match="no_such_taskset"):
        make("verifiers:no_such_taskset")
    with pytest.raises(InvalidInput, match="colour"):
        make("verifiers:count_taskset", colour="red")
    with pytest.raises(InvalidInput, match="guesser"):
        make("verifiers:count_taskset", env={"guesser": {}})
