"""A task that a tiny random model can learn: to write vowels. Also ways for it to fail."""

from __future__ import annotations

import random
from typing import Any

from tinsmith.envs import Env


class Spelling(Env):
    """The reward is the share of vowels among the characters written, over `turns` turns.

    Args:
        turns: of one episode.
        fail_every: every so many seeds the environment raises (0: never).
    """

    def __init__(self, turns: int = 1, fail_every: int = 0) -> None:
        self.turns = turns
        self.fail_every = fail_every

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        assert seed is not None
        if self.fail_every and seed % self.fail_every == 0:
            raise ValueError("this task is broken")
        self.turn = 0
        return f"write {random.Random(seed).choice('abc')}", {}

    def step(self, action: str) -> Any:
        self.turn += 1
        reward = sum(c in "aeiou" for c in action) / max(len(action), 1)
        return "go on", reward, self.turn == self.turns, False, {"success": reward > 0.5}
