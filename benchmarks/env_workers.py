"""CPU of 256 episodes whose environments sleep in `step`, against 10% of one core.

One environment worker plays them all, every environment in a process of its own. Once all sleep,
the CPU time of the worker, its environment server and the environments is taken over windows of
10 s; the figure is the median, in percent of a core. `theirs` is the limit.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
import time
from pathlib import Path

import psutil
from env_step import Instant
from harness import options, report, say

import tinsmith
from tinsmith.envs import Env, EpisodeLimits, EpisodeSpec

LIMIT_PERCENT = 10.0
FOREVER_S = 3600.0


@tinsmith.envs.register("sleeper")
class Sleeper(Env):
    """Sleeps in `step`, and leaves its process's number in `folder` before."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def reset(self, *, seed=None, options=None):
        return "Wait.", {}

    def step(self, action):
        (self.folder / str(os.getpid())).touch()
        time.sleep(FOREVER_S)


def asleep(folder: Path, count: int) -> list[psutil.Process]:
    """The environments' processes, once so many have arrived in `step`."""
    while len(numbers := [int(path.name) for path in folder.iterdir()]) < count:
        time.sleep(0.1)
    return [psutil.Process(number) for number in numbers]


def cpu_seconds(processes: list[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)


async def cpu_percent(processes: list[psutil.Process], window_s: float) -> float:
    before, started = cpu_seconds(processes), time.perf_counter()
    await asyncio.sleep(window_s)
    return 100 * (cpu_seconds(processes) - before) / (time.perf_counter() - started)


async def main() -> None:
    chosen = options(__doc__)
    episodes, window_s = (8, 0.5) if chosen.quick else (256, 10.0)
    async with tinsmith.connect(num_cpus=os.cpu_count()) as service:
        workers = await service.create_env_client(chosen.model, max_concurrent=episodes)
        with tempfile.TemporaryDirectory() as folder:
            spec = EpisodeSpec(
                "sleeper",
                Instant(chosen.model),
                env_kwargs={"folder": folder},
                limits=EpisodeLimits(step_seconds=FOREVER_S, episode_seconds=FOREVER_S),
            )
            started = time.perf_counter()
            playing = [workers.run_episode(spec) for _ in range(episodes)]
            environments = await asyncio.to_thread(asleep, Path(folder), episodes)
            say(f"{episodes} environments asleep after {time.perf_counter() - started:.1f} s")
            server = environments[0].parent()
            worker = server.parent()
            percents = []
            for _ in range(chosen.runs):
                percents.append(await cpu_percent([worker, server, *environments], window_s))
                say(f"{percents[-1]:.2f}% of a core")
            memory = sum(process.memory_full_info().pss for process in environments)
            for episode in playing:
                episode.cancel()
            await asyncio.gather(*playing, return_exceptions=True)
            await workers.close()
    percent = statistics.median(percents)
    report(
        "% of a core",
        percent,
        LIMIT_PERCENT,
        LIMIT_PERCENT / max(percent, 0.01),
        chosen.runs,
        environments=episodes,
        environment_mb=round(memory / episodes / 1e6, 2),
    )


if __name__ == "__main__":
    asyncio.run(main())
