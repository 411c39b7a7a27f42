"""What a run's log costs a training step: encoding, checksums, writing, and waiting for the disk.

Steps of `forward_backward` and `optim_step`, each awaited (a client that does not wait hides more of
it), by the learner with its log on disk. `ours` is a step's median seconds from the call to the
result, `theirs` what of that the engine computed (packing, forward, backward, optimizer, as the results
say), so that `share`, `1 / ratio - 1`, is the whole cost of the log and of the scheduler around it: a bound
on the log's. `log` is the log's own part of a step: the seconds of writing operations and results, and
of the waits for the disk before results are given.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np
from dense_batches import datums
from harness import options, report, say

from tinsmith import AdamParams, LoraConfig, default_home
from tinsmith.actors import records
from tinsmith.actors.journal import Journal
from tinsmith.actors.learner import Learner

RUN = "run"
COMPUTED = ("pack_s:sum", "forward_s:sum", "backward_s:sum", "optimizer_s")


class LogSeconds:
    """Adds up what goes through the log: from here on."""

    def __init__(self) -> None:
        self.total = 0.0
        for owner, name in (
            (records, "operation"),
            (records, "result"),
            (Journal, "write"),
        ):
            setattr(owner, name, self._timed(getattr(owner, name)))
        on_disk = Journal.on_disk

        def waited(journal: Journal) -> Future[None]:
            began, future = time.perf_counter(), on_disk(journal)
            future.add_done_callback(lambda _: self._add(began))
            return future

        Journal.on_disk = waited  # type: ignore[method-assign]

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._add(began)

        return timed

    def _add(self, began: float) -> None:
        self.total += time.perf_counter() - began


async def measure(
    model: str, home: str, runs: int, small: bool
) -> list[tuple[float, float, float]]:
    """Of every step: its seconds, those computed, those of the log."""
    learner = Learner("model", model, home, None)
    await learner.start()
    lora = LoraConfig(rank=2 if small else 16, seed=0, train_unembed=False)
    await learner.open_run(RUN, lora, None, False)
    vocabulary = learner.engine.backbone.vocab_size
    sequences, length = (2, 16) if small else (8, 256)
    rng, log, steps = np.random.default_rng(0), LogSeconds(), []
    for step in range(1 + runs):
        data = datums(rng.integers(0, vocabulary, (sequences, length + 1)))
        log.total, began = 0.0, time.perf_counter()
        first = 2 * step + 1
        batch = dict(data=data, loss_fn="cross_entropy")
        output = await learner.submit(RUN, first, "forward_backward", batch)
        stepped = await learner.submit(RUN, first + 1, "optim_step", dict(adam_params=AdamParams()))
        taken = time.perf_counter() - began
        metrics = {**output.metrics, **stepped.metrics}
        steps.append((taken, sum(metrics.get(name, 0.0) for name in COMPUTED), log.total))
        say(f"step {step}: {taken:.3f} s, of which {1e3 * log.total:.1f} ms the log")
    return steps[1:]  # the first warms up


def main() -> None:
    chosen = options(__doc__)
    home = default_home()
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home) as folder:
        steps = asyncio.run(measure(chosen.model, folder, chosen.runs, chosen.quick))
    ours, theirs, _ = (statistics.median(column) for column in zip(*steps, strict=True))
    report(
        "s",
        ours,
        theirs,
        theirs / ours,
        chosen.runs,
        share=ours / theirs - 1,
        log=statistics.median(log_s / taken for taken, _, log_s in steps),
    )


if __name__ == "__main__":
    main()
