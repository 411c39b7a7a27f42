"""What environment workers tell of episodes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from ..primitives.errors import EnvironmentFailure
from .learner_watch import outcome
from .observed import Meters

ENVS_TOLD = 50  # by name; further ones count as "other", so that series stay few


class EpisodeWatch:
    def __init__(self, meters: Meters) -> None:
        self._envs: set[str] = set()
        self._done = meters.counter(
            "episodes", "Episodes and matches played, by how they ended.", "env", "outcome"
        )
        self._seconds = meters.histogram("episode_seconds", "An episode or match, whole.")
        self._running = meters.gauge("episodes_running", "Episodes and matches under way.")

    @contextmanager
    def episode(self, env: str) -> Iterator[None]:
        began, error = time.perf_counter(), None
        self._running.inc()
        try:
            yield
        except BaseException as raised:
            error = raised
            raise
        finally:
            ended = "environment" if isinstance(error, EnvironmentFailure) else outcome(error)
            self._running.dec()
            self._seconds.observe(time.perf_counter() - began)
            self._done.labels(self._named(env), ended).inc()

    def _named(self, env: str) -> str:
        if len(self._envs) < ENVS_TOLD:
            self._envs.add(env)
        return env if env in self._envs else "other"
