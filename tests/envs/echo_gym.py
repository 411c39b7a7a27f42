"""A gymnasium environment for tests, in a module that is quick to import."""

from __future__ import annotations

import string
from typing import Any

import gymnasium
from gymnasium import spaces


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
