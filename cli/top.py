"""`tinsmith top`: what a service is doing, live, from its metrics."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..primitives.errors import InvalidInput, TinsmithError, Unavailable
from .options import AsJson, Home, print_json

Read = Callable[[], Awaitable[str]]


def top(
    home: Home,
    url: Annotated[
        str | None,
        typer.Option(
            help="The service that `tinsmith serve` runs; its key, if it wants one, is taken from "
            "$TINKER_API_KEY.",
            show_default="$TINKER_BASE_URL, else http://127.0.0.1:8000",
        ),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            help='The cluster of a script that runs, instead: "auto", or host:port of its head.'
        ),
    ] = None,
    interval: Annotated[float, typer.Option(help="Seconds between two frames.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print one frame.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show runs, queues, tokens/s, staleness and memory of a running service, until interrupted."""
    if not interval > 0:
        raise InvalidInput(f"--interval must be positive, got {interval}")
    if url is not None and address is not None:
        raise InvalidInput("give --url or --address, not both")
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_watch(url, address, home, interval, once, as_json))


async def _watch(
    url: str | None, address: str | None, home: Path, interval: float, once: bool, as_json: bool
) -> None:
    console = Console()
    async with _source(url, address, home) as (name, read):
        before = await Reading.take(read)
        with Live(console=console, screen=not once, auto_refresh=False) as live:
            while True:
                await asyncio.sleep(interval)
                try:
                    now = await Reading.take(read)
                except TinsmithError as error:
                    if once:
                        raise
                    live.update(Text(f"{error}; trying again"), refresh=True)
                    continue
                facts = frame(before, now)
                before = now
                if as_json:
                    print_json(facts)
                elif not once:
                    live.update(render(name, facts), refresh=True)
                if once:
                    break
    if once and not as_json:
        console.print(render(name, facts))


@contextlib.asynccontextmanager
async def _source(
    url: str | None, address: str | None, home: Path
) -> AsyncIterator[tuple[str, Read]]:
    if address is not None:
        from ..actors.cluster import connect

        async with connect(address, home=home) as service:

            async def ask() -> str:
                return await service.metrics()

            yield address, ask
        return
    base = url or os.environ.get("TINKER_BASE_URL") or "http://127.0.0.1:8000"
    if not base.startswith(("http://", "https://")):
        raise InvalidInput(f"--url must begin with http:// or https://, got {base!r}")
    yield base, lambda: asyncio.to_thread(_get, f"{base.rstrip('/')}/metrics")


def _get(url: str) -> str:
    """
    Raises:
        Unavailable: no service answers there, or it wants another key.
    """
    request = urllib.request.Request(url)
    key = os.environ.get("TINKER_API_KEY")
    if key:
        request.add_header("x-api-key", key)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.read().decode()
    except urllib.error.HTTPError as error:
        why = "set TINKER_API_KEY to one of its keys" if error.code == 401 else error.reason
        raise Unavailable(f"{url} answered {error.code}: {why}") from None
    except OSError as error:
        raise Unavailable(f"no service answers at {url}: {error}") from None


# ---- from metrics to facts ----

Labels = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Reading:
    """All samples at one time, by their names and labels."""

    time: float
    samples: dict[str, dict[Labels, float]]

    @classmethod
    async def take(cls, read: Read) -> Reading:
        from prometheus_client.parser import text_string_to_metric_families

        samples: dict[str, dict[Labels, float]] = {}
        for family in text_string_to_metric_families(await read()):
            for sample in family.samples:
                labels = tuple(sorted(sample.labels.items()))
                samples.setdefault(sample.name, {})[labels] = sample.value
        return cls(time.time(), samples)

    def of(self, name: str, **wanted: str) -> dict[Labels, float]:
        series = self.samples.get(f"tinsmith_{name}", {})
        return {k: v for k, v in series.items() if wanted.items() <= set(k)}

    def sum(self, name: str, **wanted: str) -> float:
        return sum(self.of(name, **wanted).values())

    def value(self, name: str, **wanted: str) -> float | None:
        return next(iter(self.of(name, **wanted).values()), None)

    def labels(self, name: str, *labels: str) -> list[tuple[str, ...]]:
        return [tuple(dict(key)[label] for label in labels) for key in self.of(name)]


def frame(before: Reading, now: Reading) -> dict[str, Any]:
    """What two readings say, as JSON values."""
    seconds = max(now.time - before.time, 1e-3)

    def rate(name: str, **wanted: str) -> float:
        return max(now.sum(name, **wanted) - before.sum(name, **wanted), 0.0) / seconds

    runs = []
    named = dict.fromkeys(now.labels("run_version", "run", "model"))
    named |= dict.fromkeys(now.labels("sample_requests_total", "run", "model"))
    for run, model in named:
        drawn = now.sum("sample_staleness_versions_count", run=run)
        old = now.sum("sample_staleness_versions_sum", run=run)
        done = now.sum("ops_total", run=run)
        runs.append(
            {
                "run": run,
                "model": model,
                "version": now.value("run_version", run=run),
                "published": now.value("published_version", run=run),
                "staleness": now.value("staleness_versions", run=run),
                "sample_staleness_mean": old / drawn if drawn else None,
                "queued_ops": now.sum("queued_ops", run=run),
                "queued_tokens": now.sum("queued_tokens", run=run),
                "samples_under_way": now.sum("samples_under_way", run=run),
                "ops_done": done,
                "ops_failed": done - now.sum("ops_total", run=run, outcome="ok"),
                "trained_tokens_per_s": rate("learner_tokens_total", run=run),
                "sampled_tokens_per_s": rate("sampled_tokens_total", run=run),
                "bytes": now.sum("run_bytes", run=run),
            }
        )
    processes = [
        {
            "process": process,
            "model": model,
            "memory_bytes": now.value(
                "process_resident_memory_bytes", process=process, model=model
            ),
            "cpu": rate("process_cpu_seconds_total", process=process, model=model),
            "running": now.value("sampler_running", process=process, model=model),
            "waiting": now.value("sampler_waiting", process=process, model=model),
            "kv_used": _share(now, process, model),
            "tokens_per_s": _tokens(rate, process, model),
        }
        for process, model in now.labels("process_resident_memory_bytes", "process", "model")
    ]
    crashes = [dict(key) | {"time": when} for key, when in now.of("crash_time_seconds").items()]
    return {
        "time": now.time,
        "interval_s": seconds,
        "sessions": now.value("gateway_sessions"),
        "pending_requests": now.value("gateway_pending_requests"),
        "runs": runs,
        "processes": processes,
        "crashes": sorted(crashes, key=lambda crash: -float(crash["time"])),
    }


def _share(now: Reading, process: str, model: str) -> float | None:
    blocks = now.value("sampler_num_blocks", process=process, model=model)
    return (
        now.sum("sampler_blocks_in_use", process=process, model=model) / blocks if blocks else None
    )


def _tokens(rate: Callable[..., float], process: str, model: str) -> float | None:
    names = {"learner": "learner_tokens_total", "sampler": "sampler_sampled_tokens_total"}
    name = None if process == "sampler pool" else names.get(process.split()[0])
    return None if name is None else rate(name, process=process, model=model)


# ---- from facts to a screen ----


def render(name: str, facts: dict[str, Any]) -> RenderableType:
    when = time.strftime("%H:%M:%S", time.localtime(facts["time"]))
    head = f"tinsmith top  {name}  {when}"
    if facts["sessions"] is not None:
        head += f"  {facts['sessions']:.0f} sessions, {facts['pending_requests']:.0f} requests under way"
    runs = _table(
        "run",
        "model",
        "version",
        "stale",
        "queue ops",
        "tokens",
        "sampling",
        "done",
        "failed",
        "trained/s",
        "sampled/s",
        "memory",
    )
    for run in facts["runs"]:
        behind, old = run["staleness"], run["sample_staleness_mean"]
        runs.add_row(
            run["run"],
            run["model"],
            _number(run["version"]),
            "-" if behind is None and old is None else f"{behind or 0:.0f} / {old or 0:.1f}",
            _number(run["queued_ops"]),
            _number(run["queued_tokens"]),
            _number(run["samples_under_way"]),
            _number(run["ops_done"]),
            _number(run["ops_failed"]),
            _number(run["trained_tokens_per_s"]),
            _number(run["sampled_tokens_per_s"]),
            _bytes(run["bytes"]),
        )
    processes = _table(
        "process", "model", "memory", "CPU", "tokens/s", "running", "waiting", "cache"
    )
    for process in facts["processes"]:
        used = process["kv_used"]
        processes.add_row(
            process["process"],
            process["model"],
            _bytes(process["memory_bytes"]),
            f"{process['cpu']:.0%}",
            _number(process["tokens_per_s"]),
            _number(process["running"]),
            _number(process["waiting"]),
            "-" if used is None else f"{used:.0%}",
        )
    parts: list[RenderableType] = [Text(head, style="bold")]
    parts += [runs if facts["runs"] else Text("no runs are open"), processes]
    parts += [Text(_crash(crash), style="red") for crash in facts["crashes"][:5]]
    return Group(*parts)


def _crash(crash: dict[str, Any]) -> str:
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(crash["time"]))
    at = "it was idle"
    if crash["kind"]:
        at = f"it was at {crash['kind']} {crash['op']} of run {crash['run']}"
        at += f", for {crash['ran_seconds']} s"
    return f"{when}  {crash['of']} (pid {crash['died_pid']}) died: {crash['reason']}; {at}"


def _table(*columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        text = index < 2
        table.add_column(column, justify="left" if text else "right", overflow="fold")
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _bytes(value: float | None) -> str:
    if not value:
        return "-"
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"
