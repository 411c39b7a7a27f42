"""An environment that answers late, as tools behind a network do."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Mapping
from typing import Any

from ..primitives.errors import InvalidInput
from .core import Env
from .multi_agent import MultiAgentEnv
from .registry import make


class SlowTools(Env):
    """Another environment, each of whose steps first takes a lognormally distributed time.

    The delay is `mean * exp(sigma * z - sigma**2 / 2)` with z standard normal, drawn anew for
    every step of every episode, whatever its seed: with `sigma` 1 its median is 0.61 and its 99th
    percentile 6.2 times the mean.

    Args:
        env: the environment slowed down, or its name.
        env_kwargs: what it is made with, where `env` is a name.
        mean: of the delay, in seconds; 0: none.
        sigma: standard deviation of the delay's logarithm.
    """

    def __init__(
        self,
        env: str | Env,
        env_kwargs: Mapping[str, Any] | None = None,
        mean: float = 1.0,
        sigma: float = 1.0,
    ) -> None:
        if not (math.isfinite(mean) and mean >= 0 and math.isfinite(sigma) and sigma >= 0):
            raise InvalidInput(
                f"SlowTools: mean and sigma must be finite and not negative, got {mean}, {sigma}"
            )
        made = make(env, **(env_kwargs or {})) if isinstance(env, str) else env
        if isinstance(made, MultiAgentEnv):
            raise InvalidInput(f"SlowTools: {env!r} is a game; only an Env of one agent is slowed")
        self.env = made
        self.tool_schemas = getattr(self.env, "tool_schemas", None)
        self.mean, self.sigma = mean, sigma

    def delay(self) -> float:
        """Seconds that the next step takes."""
        return self.mean * random.lognormvariate(-(self.sigma**2) / 2, self.sigma)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        return self.env.reset(seed=seed, options=options)

    def step(self, action: str) -> Any:
        time.sleep(self.delay())
        return self.env.step(action)

    def close(self) -> Any:
        return self.env.close()
