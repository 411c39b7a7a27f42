"""What the controller tells: its own metrics, those of all processes together, and crashes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import psutil
from prometheus_client.metrics_core import GaugeMetricFamily, Metric

from ..primitives.op import Op
from ..primitives.types import Crash
from .deaths import log_crash, told
from .gathering import gather, merge
from .handle import RayHandle
from .notes import FOLDER, read_notes
from .observed import Meters, own_notes_path
from .registry import Registry

CRASHES_TOLD = 5  # as metrics


class ControllerWatch:
    def __init__(self, meters: Meters) -> None:
        self.meters = meters
        self._crashes = meters.counter("crashes", "Processes of the service that died.", "of")
        self._runs = meters.gauge("runs", "Runs that the registry knows.")
        self._times = meters.gauge(
            "crash_time_seconds",
            "When a process died, in Unix seconds, and what it was at: the last few.",
            *("of", "died_pid", "reason", "run", "op", "kind", "ran_seconds"),
        )

    def crashed(self, crash: Crash) -> None:
        self._crashes.labels(crash.process).inc()
        log_crash(crash)

    def collect(self, registry: Registry) -> list[Metric]:
        self._runs.set(registry.count_runs())
        self._times.clear()
        for crash in registry.crashes(last=CRASHES_TOLD):
            for at in crash.under_way[:CRASHES_TOLD]:
                labels = (at.run, str(at.op), at.kind, f"{at.seconds:.1f}")
                self._crash(crash, *labels)
            if not crash.under_way:
                self._crash(crash, "", "", "", "")
        return self.meters.collect()

    def _crash(self, crash: Crash, *at: str) -> None:
        self._times.labels(crash.process, str(crash.pid), crash.reason, *at).set(crash.time)


async def service_metrics(
    own: list[Metric],
    learners: Mapping[str, RayHandle],
    pools: Mapping[str, RayHandle],
    workers: Sequence[RayHandle],
) -> list[Metric]:
    """Of the controller, of learners and sampler pools by their model's name, and of environment
    workers; those that do not answer in time are left out."""
    named = {f"environment worker {index}": worker for index, worker in enumerate(workers)}
    of_learners, of_pools, of_samplers, of_workers = await asyncio.gather(
        gather(learners), gather(pools), gather(pools, "metrics_of_each"), gather(named)
    )
    parts: list[tuple[Mapping[str, str], Iterable[Metric]]] = [
        ({"process": "controller", "model": ""}, own)
    ]
    parts += [({"process": "learner", "model": m}, f) for m, f in of_learners.items()]
    parts += [({"process": "sampler pool", "model": m}, f) for m, f in of_pools.items()]
    for model, each in of_samplers.items():
        parts += [({"process": name, "model": model}, f) for name, f in each.items()]
    parts += [({"process": name, "model": ""}, f) for name, f in of_workers.items()]
    merged = merge(parts)
    return [*merged, _staleness(merged)]


def _staleness(families: list[Metric]) -> Metric:
    versions = {
        name: {s.labels["run"]: s for f in families if f.name == name for s in f.samples}
        for name in ("tinsmith_run_version", "tinsmith_published_version")
    }
    trained, published = versions.values()
    family = GaugeMetricFamily(
        "tinsmith_staleness_versions",
        "A run's version less the newest that samplers hold.",
        labels=["model", "run"],
    )
    for run in trained.keys() & published.keys():
        behind = trained[run].value - published[run].value
        family.add_metric([trained[run].labels["model"], run], behind)
    return family


class Reports:
    """Tells the controller of crashes, from another process."""

    def __init__(self, controller: RayHandle) -> None:
        self.controller = controller

    async def __call__(self, crash: Crash) -> None:
        await Op(self.controller.call("crashed", crash))


def died_before(home: str) -> Crash | None:
    """Of the controller before this one, which left its notes under the same actor's id."""
    noted = read_notes(own_notes_path(home))
    if noted is None:
        return None
    owner, _ = noted
    return Crash(time.time(), owner.process, owner.pid, owner.host, "it ended unexpectedly", [])


def left_behind(home: str, reason: str) -> list[Crash]:
    """Of a service, or a controller with its actors, that ended before: what its processes were at.
    Their notes are deleted."""
    crashes = []
    for file in Path(home, FOLDER).glob("*") if "://" not in home else []:
        noted = read_notes(file)
        if noted is not None:
            owner, under_way = noted
            if owner.host != socket.gethostname() or _runs(owner.pid, file):
                continue
            if under_way:
                when = file.stat().st_mtime
                at = told(under_way, when)
                crashes.append(Crash(when, owner.process, owner.pid, owner.host, reason, at))
        with contextlib.suppress(OSError):
            os.unlink(file)
    return crashes


def _runs(pid: int, file: Path) -> bool:
    """Whether the process that made the notes is there, and no later one of its number."""
    try:
        return psutil.Process(pid).create_time() <= file.stat().st_ctime + 1
    except (psutil.Error, OSError):
        return False
