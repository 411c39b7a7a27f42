from __future__ import annotations

from typing import Any

import pytest

from tests.envs.scripted import Scripted
from tests.tiny import tiny_tokenizer
from tinsmith.envs import ChatRenderer, EnvPool, EpisodeSpec, check_env, make, play_episode
from tinsmith.primitives.errors import InvalidInput, NotFound


def test_text_actions_are_played_and_others_answered():
    env = make("gymnasium:tests.envs.echo_gym:tests/Echo-v0")
    observation, _ = env.reset(seed=1)
    answer = env.step("SAY IT!")
    assert answer[0].startswith("ERROR: answer with 1 to 8 characters out of 'abcdefgh")
    assert answer[1:4] == (0.0, False, False)
    assert env.step(f" {observation.split()[1]}\n") == ("bye", 1.0, True, False, {})
    check_env("gymnasium:tests.envs.echo_gym:tests/Echo-v0", actions=("abc",))


def test_discrete_actions_are_read_from_the_text():
    env = make("gymnasium:tests.envs.echo_gym:tests/Digits-v0")
    observation, _ = env.reset(seed=1)
    assert env.step("seven")[0] == "ERROR: answer with a number, 2 to 6"
    assert env.step("7")[0] == "ERROR: answer with a number, 2 to 6"
    assert env.step(f"I choose {observation.split()[1]}.")[1] == 1.0


async def test_a_gymnasium_environment_plays_as_an_episode():
    tokenizer = tiny_tokenizer()
    name = "gymnasium:tests.envs.echo_gym:tests/Digits-v0"
    spec = EpisodeSpec(name, Scripted(tokenizer, ["what?", "3"]), seed=1)
    async with EnvPool() as pool:
        trajectory = await play_episode(pool, ChatRenderer(tokenizer), spec)
        assert trajectory.terminated
        assert trajectory.info["turns"] == 2
        with pytest.raises(NotFound, match="nowhere"):
            await play_episode(
                pool, ChatRenderer(tokenizer), EpisodeSpec("gymnasium:nowhere", spec.policy)
            )


def test_other_spaces_ids_and_arguments_are_refused():
    with pytest.raises(NotFound, match="Nowhere"):
        make("gymnasium:Nowhere-v0")
    with pytest.raises(InvalidInput, match="colour"):
        make("gymnasium:tests.envs.echo_gym:tests/Echo-v0", colour="red")


async def test_frozen_lake_is_played_by_name_from_its_rendering():
    def lake():
        names = ["left", "down", "right", "up"]
        return make("gymnasium:FrozenLake-v1", render_mode="ansi", is_slippery=False, actions=names)

    env = lake()
    messages, _ = env.reset(seed=0)
    assert [message["role"] for message in messages] == ["system", "user"]
    assert "0 to 3, or by name: left, down, right, up" in messages[0]["content"]
    assert messages[1]["content"].splitlines()[0] == "[S]FFF"
    assert "[F]HFH" in env.step("down")[0]
    assert env.step("jump")[0].startswith("ERROR: answer with a number, 0 to 3, or by name")
    env = lake()
    env.reset(seed=0)
    for move in ["down", "I go down.", "2", "right", "Down"]:
        assert env.step(move)[1:3] == (0.0, False)
    observation, reward, terminated, *_ = env.step("right")
    assert (reward, terminated) == (1.0, True)
    assert "HFF[G]" in observation
    tokenizer = tiny_tokenizer()
    kwargs = {"render_mode": "ansi", "is_slippery": False}
    spec = EpisodeSpec(
        "gymnasium:FrozenLake-v1", Scripted(tokenizer, ["1", "2"]), env_kwargs=kwargs
    )
    async with EnvPool() as pool:
        trajectory = await play_episode(pool, ChatRenderer(tokenizer), spec)
    assert (trajectory.terminated, trajectory.info["turns"]) == (True, 2)  # into the hole


def test_blackjack_states_its_numbers():
    env = make("gymnasium:Blackjack-v1")
    messages, _ = env.reset(seed=0)
    assert messages[1]["content"] == "Observation: (11, 10, 0)"
    assert env.step("1")[0] == "Observation: (12, 10, 0)"
    check_env("gymnasium:Blackjack-v1", actions=("1", "0"))


def test_taxi_tells_its_colours_in_words():
    env = make("gymnasium:Taxi-v4", render_mode="ansi", instructions="Drive.")
    messages, _ = env.reset(seed=0)
    assert messages[0]["content"] == "Drive."
    assert "|[ ]|" in messages[1]["content"]
    assert messages[1]["content"].splitlines()[-1] == "Y is magenta, B is blue"


def pole(observation: Any) -> str:
    return f"the pole leans by {abs(observation[2]):.1f}"


def test_other_observations_need_a_description():
    env = make("gymnasium:CartPole-v1", describe=f"{__name__}:pole")
    assert env.reset(seed=0)[0][1]["content"] == "the pole leans by 0.0"
    with pytest.raises(InvalidInput, match=r"observations of Box.*or give describe"):
        make("gymnasium:CartPole-v1")
    with pytest.raises(InvalidInput, match="'module:function'"):
        make("gymnasium:CartPole-v1", describe="nowhere:pole")
    with pytest.raises(InvalidInput, match="1 names for Discrete"):
        make("gymnasium:CartPole-v1", describe=pole, actions=["left"])
