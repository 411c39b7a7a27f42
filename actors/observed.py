"""What every actor can be asked about itself: metrics, and to say when it ends."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import ray
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.metrics_core import Metric

from . import telemetry
from .notes import Notes, notes_path

SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


class Meters:
    """A process's counters, gauges and histograms, all named `tinsmith_…`. Series that carry a run
    go with it (`forget`)."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(namespace="tinsmith", registry=self.registry)
        self._of_runs: list[Any] = []

    def counter(self, name: str, about: str, *labels: str) -> Counter:
        return self._known(Counter(f"tinsmith_{name}", about, labels, registry=self.registry))

    def gauge(self, name: str, about: str, *labels: str) -> Gauge:
        return self._known(Gauge(f"tinsmith_{name}", about, labels, registry=self.registry))

    def histogram(
        self, name: str, about: str, *labels: str, buckets: tuple[float, ...] = SECONDS
    ) -> Histogram:
        named = f"tinsmith_{name}"
        return self._known(Histogram(named, about, labels, buckets=buckets, registry=self.registry))

    def _known(self, metric: Any) -> Any:
        if "run" in metric._labelnames:
            self._of_runs.append(metric)
        return metric

    def forget(self, run: str) -> None:
        """Drop the series of a run that is closed."""
        for metric in self._of_runs:
            metric.remove_by_labels({"run": run})

    def collect(self) -> list[Metric]:
        return list(self.registry.collect())


class Observed:
    """An actor that is asked for its metrics, by the controller or by who started it.

    Call `observe` first of all.
    """

    meters: Meters

    def observe(self, process: str) -> None:
        """Begin logs and traces of this process."""
        if _actor_id() is not None:
            telemetry.set_up(process)
        self.meters = Meters()

    async def metrics(self) -> list[Metric]:
        return self.meters.collect()

    async def until_it_ends(self) -> None:
        """Never returns: who waits learns that the process ended, as soon as it does."""
        await asyncio.Event().wait()


def own_notes(home: str | None, process: str) -> Notes:
    """Notes of this process under its actor's id, where a `RayHandle` finds them; where it is no
    actor, none."""
    return Notes(own_notes_path(home), process)


def own_notes_path(home: str | None) -> Path | None:
    """Where an actor that restarts also finds those of the process before it."""
    actor = _actor_id()
    return None if actor is None or home is None else notes_path(home, actor)


def _actor_id() -> str | None:
    return ray.get_runtime_context().get_actor_id() if ray.is_initialized() else None
