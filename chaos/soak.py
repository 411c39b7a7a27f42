"""Does anything grow? Tenants train and sample and episodes are played for half an hour, while the memory,
threads and files of every process are watched, and how long every primitive takes.

    python -m tinsmith.chaos.soak MODEL --minutes 30 --tenants 32 --episodes 500 --report soak.md

It fails if memory grows by more than its noise, a task or a file is left behind, an operation fails, or
the 99th percentile of a primitive is more than 5 times its median.
"""

from __future__ import annotations

import asyncio
import os
import platform
import tempfile
import time
from collections import defaultdict
from collections.abc import Awaitable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import psutil
import typer
from rich.console import Console
from rich.progress import Progress
from scipy import stats

import tinsmith
from tinsmith.envs import Env, EpisodeLimits, EpisodeSpec

WARM_UP = 0.25  # of the time: caches and pools fill
WATCH_SECONDS = 5.0
TURNS = 3
WORST_RATIO = 5.0
KV_BYTES = 1 << 26  # that is filled before the warm-up is over
GROWTH, GROWTH_BYTES = 0.02, 4 << 20  # over the whole time: what is less is no growth
WATCHED = (
    "ray::Controller",
    "ray::Learner",
    "ray::Sampler",
    "ray::EnvWorker",
    "gcs_server",
    "raylet",
)

T = TypeVar("T")


@tinsmith.envs.register("slow_tool")
class SlowTool(Env):
    """`TURNS` turns; each waits for a tool, `seconds` on average."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        self.rng, self.turn = np.random.default_rng(seed), 0
        return "Go on.", {}

    def step(self, action: str) -> Any:
        time.sleep(self.rng.uniform(0.5, 1.5) * self.seconds)
        self.turn += 1
        return "And on.", 0.0, self.turn == TURNS, False, {}


class Watch:
    """What is measured while it runs.

    Attributes:
        seconds: of each primitive's calls, by its name.
        memory: (seconds since the start, bytes) of each kind of process; bytes are those that no other
            process shares.
        opened: its threads and open files at those times.
        episodes: played to their end.
    """

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)
        self.memory: defaultdict[str, list[tuple[float, int]]] = defaultdict(list)
        self.opened: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
        self.episodes = 0

    async def timed(self, name: str, call: Awaitable[T]) -> T:
        started = time.perf_counter()
        result = await call
        self.seconds[name].append(time.perf_counter() - started)
        return result

    def look(self) -> None:
        """Note memory, threads and open files of each kind of process."""
        found: dict[str, list[psutil.Process]] = defaultdict(list)
        own = psutil.Process()
        found["this script"].append(own)
        for process in own.children(recursive=True):
            name = _kind(process)
            if name is not None:
                found[name].append(process)
        now = time.monotonic() - self.started
        for name, processes in found.items():
            self.memory[name].append((now, sum(p.memory_full_info().uss for p in processes)))
            threads = sum(p.num_threads() for p in processes)
            self.opened[name].append((threads, sum(p.num_fds() for p in processes)))


def _kind(process: psutil.Process) -> str | None:
    try:
        command = process.cmdline()
    except psutil.NoSuchProcess:
        return None
    first = Path(command[0]).name if command else ""
    title = command[0] if command and command[0].startswith("ray::") else first
    return next((name for name in WATCHED if title.startswith(name)), None)


async def tenant(
    training: tinsmith.TrainingClient,
    live: tinsmith.SamplingClient,
    watch: Watch,
    until: float,
    think_s: float,
    number: int,
) -> None:
    """Steps, each with a sample of the newest weights, now and then a checkpoint."""
    rng = np.random.default_rng(number)  # else all think for as long, and come together
    await asyncio.sleep(rng.uniform(0, think_s))
    vocabulary = (await training.get_info()).vocab_size
    step = 0
    while time.monotonic() < until:
        await _step(training, live, watch, rng.integers(0, vocabulary, (4, 65)))
        step += 1
        if step % 10 == 0:
            saving = training.save_state("newest", overwrite=True, ttl_seconds=3600)
            await watch.timed("save_state", saving)
        await asyncio.sleep(rng.uniform(0.5, 1.5) * think_s)


async def _step(
    training: tinsmith.TrainingClient,
    live: tinsmith.SamplingClient,
    watch: Watch,
    tokens: np.ndarray,
) -> None:
    passed = training.forward_backward([_datum(row) for row in tokens])
    stepped = training.optim_step()
    await watch.timed("forward_backward", passed)
    await watch.timed("optim_step", stepped)
    params = tinsmith.SamplingParams(max_tokens=16, stop=[], seed=0)
    await watch.timed("sample", live.sample(tokens[0, :32], 1, params))


async def fill(
    runs: list[tinsmith.TrainingClient], policies: list[tinsmith.SamplingClient]
) -> None:
    """Any number of tenants at once: what is kept for every size of a pass is there from then on."""
    vocabulary, rng = (await runs[0].get_info()).vocab_size, np.random.default_rng(0)
    for count in range(1, len(runs) + 1):
        together = zip(runs[:count], policies, strict=False)
        tokens = rng.integers(0, vocabulary, (4, 65))
        await asyncio.gather(*(_step(run, live, Watch(), tokens) for run, live in together))


def _datum(tokens: np.ndarray) -> tinsmith.Datum:
    inputs = {"target_tokens": tokens[1:], "weights": np.ones(len(tokens) - 1)}
    return tinsmith.Datum(tinsmith.ModelInput(tokens[:-1]), inputs)


async def episodes(
    workers: tinsmith.EnvClient,
    policy: tinsmith.SamplingClient,
    watch: Watch,
    until: float,
    tool_s: float,
    number: int,
) -> None:
    """One after another."""
    await asyncio.sleep(np.random.default_rng(number).uniform(0, TURNS * tool_s))
    while time.monotonic() < until:
        spec = EpisodeSpec(
            "slow_tool",
            policy,
            tinsmith.SamplingParams(max_tokens=8),
            seed=watch.episodes,
            env_kwargs={"seconds": tool_s},
            limits=EpisodeLimits(step_seconds=600, episode_seconds=3600),
        )
        await workers.run_episode(spec)
        watch.episodes += 1


async def soak(
    model: str, home: str, minutes: float, tenants: int, playing: int, think_s: float, tool_s: float
) -> tuple[Watch, list[str]]:
    """What was measured, and what was left behind."""
    async with tinsmith.connect(home=home, num_cpus=os.cpu_count(), kv_bytes=KV_BYTES) as service:
        workers = await service.create_env_client(model, max_concurrent=playing)
        runs = [
            await service.create_lora_training_client(model, rank=4, seed=n) for n in range(tenants)
        ]
        policies = [await training.live_sampling_client().ready() for training in runs]
        await fill(runs, policies)
        watch, tasks = Watch(), len(asyncio.all_tasks())
        until = watch.started + 60 * minutes
        work = [
            *(
                tenant(training, live, watch, until, think_s, n)
                for n, (training, live) in enumerate(zip(runs, policies, strict=True))
            ),
            *(
                episodes(workers, policies[n % tenants], watch, until, tool_s, n)
                for n in range(playing)
            ),
        ]
        under_way = asyncio.gather(*work)
        with Progress(console=Console(stderr=True)) as progress:
            bar = progress.add_task("soaking", total=60 * minutes)
            while not under_way.done():
                watch.look()
                progress.update(bar, completed=time.monotonic() - watch.started)
                await asyncio.wait({under_way}, timeout=WATCH_SECONDS)
        await under_way
        left = []
        if len(asyncio.all_tasks()) > tasks:
            left.append(f"{len(asyncio.all_tasks()) - tasks} tasks of this script")
        await workers.close()
        for training in runs:
            await service.close_training_run(training.run_id)
    return watch, left


def growth(memory: list[tuple[float, int]]) -> tuple[float, float, float]:
    """Bytes per hour after the warm-up, by Theil and Sen, and its 95% interval."""
    after = memory[int(WARM_UP * len(memory)) :]
    times, sizes = zip(*after, strict=True)
    slope, _, low, high = stats.theilslopes(sizes, times)
    return 3600 * slope, 3600 * low, 3600 * high


def verdicts(watch: Watch, minutes: float) -> list[str]:
    """What is not as it has to be."""
    found = []
    for kind, memory in watch.memory.items():
        mean = float(np.mean([size for _, size in memory]))
        _, low, _ = growth(memory)
        if low * minutes / 60 > max(GROWTH * mean, GROWTH_BYTES):
            found.append(f"the memory of {kind} grows by at least {low / 2**20:.1f} MB an hour")
    for name, seconds in watch.seconds.items():
        ratio = np.percentile(seconds, 99) / np.median(seconds)
        if ratio > WORST_RATIO:
            found.append(f"the 99th percentile of {name} is {ratio:.1f} times its median")
    return found


def report(watch: Watch, about: str, found: list[str]) -> str:
    lines = [
        f"# Soak: {about}",
        "",
        f"{platform.platform()}, {os.cpu_count()} cores; {watch.episodes:,} episodes played.",
        "",
        "| primitive | calls | median s | p99 s | p99 / median |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, seconds in sorted(watch.seconds.items()):
        middle, worst = np.median(seconds), np.percentile(seconds, 99)
        lines.append(
            f"| `{name}` | {len(seconds):,} | {middle:.3f} | {worst:.3f} | {worst / middle:.1f} |"
        )
    lines += [
        "",
        "| process | MB at first | MB at last | MB an hour (95% interval) | threads | files |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for kind, memory in watch.memory.items():
        slope, low, high = (value / 2**20 for value in growth(memory))
        first, last = (memory[i][1] / 2**20 for i in (int(WARM_UP * len(memory)), -1))
        (threads, files), (threads_now, files_now) = watch.opened[kind][0], watch.opened[kind][-1]
        lines.append(
            f"| {kind} | {first:.1f} | {last:.1f} | {slope:.1f} ({low:.1f} to {high:.1f}) "
            f"| {threads} → {threads_now} | {files} → {files_now} |"
        )
    lines += (
        ["", *(f"- FAILED: {what}" for what in found)] if found else ["", "All as it has to be."]
    )
    return "\n".join(lines) + "\n"


def main(
    model: Annotated[str, typer.Argument(help="Folder, name or Hugging Face id.")],
    minutes: Annotated[float, typer.Option()] = 30.0,
    tenants: Annotated[int, typer.Option(help="That train and sample.")] = 32,
    episodes: Annotated[int, typer.Option(help="Under way at once.")] = 500,
    think_seconds: Annotated[float, typer.Option(help="Of a tenant, between two steps.")] = 12.0,
    tool_seconds: Annotated[float, typer.Option(help="Of an episode's turn, for its tool.")] = 20.0,
    report_file: Annotated[Path | None, typer.Option("--report")] = None,
) -> None:
    with tempfile.TemporaryDirectory() as home:
        watch, left = asyncio.run(
            soak(model, home, minutes, tenants, episodes, think_seconds, tool_seconds)
        )
    found = left + verdicts(watch, minutes)
    about = f"{tenants} tenants, {episodes} episodes, {minutes:g} minutes"
    text = report(watch, about, found)
    typer.echo(text)
    if report_file is not None:
        report_file.write_text(text)
    raise typer.Exit(1 if found else 0)


if __name__ == "__main__":
    typer.run(main)
