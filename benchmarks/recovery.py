"""How long a client waits when the learner is killed: from kill -9 to its next result.

A run trains some steps after its last snapshot; its learner is killed, and an operation submitted.
`ours` is the median of the seconds until its result, `theirs` of those that a learner takes to start
and give a new run's first result. `beyond_start`, the difference, is what recovery itself takes.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from dense_batches import datums
from harness import options, report, say

import tinsmith


def kill_learners() -> None:
    for process in psutil.Process().children(recursive=True):
        try:
            if process.name().startswith("ray::Learner"):
                process.kill()
        except psutil.NoSuchProcess:
            continue


async def measure(model: str, home: str, runs: int, small: bool) -> tuple[float, float]:
    steps, shape, rank = (2, (2, 16), 2) if small else (10, (8, 128), 16)
    rng = np.random.default_rng(0)
    ours, theirs = [], []
    async with tinsmith.connect(home=home) as service:
        for run in range(runs):
            started = time.perf_counter()
            training = await service.create_lora_training_client(model, rank=rank, seed=0)
            vocabulary = (await training.get_info()).vocab_size
            theirs.append(time.perf_counter() - started)
            for _ in range(steps):
                tokens = rng.integers(0, vocabulary, (shape[0], shape[1] + 1))
                training.forward_backward(datums(tokens))
                await training.optim_step()
            started = time.perf_counter()
            kill_learners()
            await training.get_info()
            ours.append(time.perf_counter() - started)
            say(f"run {run}: {ours[-1]:.2f} s to recover, {theirs[-1]:.2f} s to start")
            await service.close_training_run(training.run_id)
            await service.unload_model(model)
    return statistics.median(ours), statistics.median(theirs)


def main() -> None:
    chosen = options(__doc__)
    with tempfile.TemporaryDirectory() as home:
        model = str(Path(chosen.model).resolve())
        ours, theirs = asyncio.run(measure(model, home, chosen.runs, chosen.quick))
    report("s", ours, theirs, theirs / ours, chosen.runs, beyond_start=ours - theirs)


if __name__ == "__main__":
    main()
