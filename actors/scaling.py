"""How many samplers a model has."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from ..primitives.errors import InvalidInput


@dataclass(frozen=True)
class Replicas:
    """A model's samplers: as many as what is asked of them takes, between two numbers. (The names
    are Ray Serve's.)

    Attributes:
        target_ongoing_requests: samples under way or waiting, to a sampler.
        upscale_delay_s: how long there must be more than that before another one is started.
        downscale_delay_s: how long fewer would do before one is ended, once it is idle.
        max_requests: under way or waiting, over all samplers. Further ones are told to come again
            (`Busy`), as a `SamplingClient` does by itself.
    """

    min_replicas: int = 1
    max_replicas: int = 1
    target_ongoing_requests: int = 64
    upscale_delay_s: float = 5.0
    downscale_delay_s: float = 60.0
    max_requests: int = 16_384

    def __post_init__(self) -> None:
        if not 1 <= self.min_replicas <= self.max_replicas:
            raise InvalidInput(
                "replicas must be 1 <= min_replicas <= max_replicas, got "
                f"{self.min_replicas} and {self.max_replicas}"
            )
        for name in ("target_ongoing_requests", "max_requests"):
            if getattr(self, name) < 1:
                raise InvalidInput(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("upscale_delay_s", "downscale_delay_s"):
            if getattr(self, name) < 0:
                raise InvalidInput(f"{name} must not be negative, got {getattr(self, name)}")

    @classmethod
    def of(cls, given: int | Replicas) -> Replicas:
        """A number of them means just so many."""
        return given if isinstance(given, Replicas) else cls(given, given)


class Scaler:
    """Decides when to start and to end samplers; asked again and again."""

    def __init__(self, replicas: Replicas, clock: Callable[[], float] = time.monotonic) -> None:
        self.replicas, self._clock = replicas, clock
        self._direction, self._since = 0, clock()

    def change(self, there: int, load: int) -> int:
        """How many to start now (negative: to end), with `there` running or starting and `load`
        samples under way or waiting."""
        limits, now = self.replicas, self._clock()
        needed = -(-load // limits.target_ongoing_requests)
        wanted = min(max(needed, limits.min_replicas), limits.max_replicas)
        direction = (wanted > there) - (wanted < there)
        if direction != self._direction:
            self._direction, self._since = direction, now
        delay = limits.upscale_delay_s if direction > 0 else limits.downscale_delay_s
        return wanted - there if direction and now - self._since >= delay else 0
