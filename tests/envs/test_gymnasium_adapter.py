from __future__ import annotations

import string
from typing import Any

import gymnasium
import pytest
from gymnasium import spaces

from tests.envs.scripted import Scripted
from tests.tiny import tiny_tokenizer
from tinsmith.envs import ChatRenderer, EnvPool, EpisodeSpec, check_env, make, play_episode
from tinsmith.primitives.errors import InvalidInput, NotFound


class Echo(gymnasium.Env):
    """Say the word, or with `digits` choose the number, that you are told."""

    observation_space = spaces.Text(200, charset=string.printable)

    def __init__(self, digits: bool = False) -> None:
        text = spaces.Text(8, charset=string.ascii_lowercase)
        self.action_space = spaces.Discrete(5, start=2) if digits else text

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        word = "".join(self.np_random.choice(list("abc"), 4))
        number = int(self.np_random.integers(2, 7))
        self.wanted = number if isinstance(self.action_space, spaces.Discrete) else word
        return f"say {self.wanted}", {}

    def step(self, action: Any) -> Any:
        return "bye", int(action == self.wanted), True, False, {}


gymnasium.register("tests/Echo-v0", Echo)
gymnasium.register("tests/Digits-v0", Echo, kwargs={"digits": True})


def test_text_actions_are_played_and_others_answered():
    env = make("gymnasium:tests/Echo-v0")
    observation, _ = env.reset(seed=1)
    answer = env.step("SAY IT!")
    assert answer[0].startswith("ERROR: answer with 1 to 8 characters out of 'abcdefgh")
    assert answer[1:4] == (0.0, False, False)
    assert env.step(f" {observation.split()[1]}\n") == ("bye", 1.0, True, False, {})
    check_env("gymnasium:tests/Echo-v0", actions=("abc",))


def test_discrete_actions_are_read_from_the_text():
    env = make("gymnasium:tests/Digits-v0")
    observation, _ = env.reset(seed=1)
    assert env.step("seven")[0] == "ERROR: answer with a number, 2 to 6"
    assert env.step("7")[0] == "ERROR: answer with a number, 2 to 6"
    assert env.step(f"I choose {observation.split()[1]}.")[1] == 1.0


async def test_a_gymnasium_environment_plays_as_an_episode():
    tokenizer = tiny_tokenizer()
    name = "gymnasium:tests.envs.test_gymnasium_adapter:tests/Digits-v0"
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
    with pytest.raises(InvalidInput, match="observations must be of a Text space"):
        make("gymnasium:CartPole-v1")
    with pytest.raises(NotFound, match="Nowhere"):
        make("gymnasium:Nowhere-v0")
    with pytest.raises(InvalidInput, match="colour"):
        make("gymnasium:tests/Echo-v0", colour="red")
