"""What a run's log costs a training step: writing operations and results, and waiting for the disk.

Steps of `forward_backward` and `optim_step`, each awaited (a client that does not wait hides more of
it), by the learner with its log on disk, and by the same with an fsync that does nothing and the log
in memory (`/dev/shm`), alternating. `ours` is a step's median seconds with the log on disk, `theirs`
in memory, so that `1 / ratio - 1` is the disk's share.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from dense_batches import datums
from harness import alternate, options, report

from tinsmith import AdamParams, LoraConfig, default_home
from tinsmith.actors.learner import Learner

RUN = "run"


class Side:
    """A learner in this process with one run, whose log is in `folder`."""

    def __init__(self, model: str, folder: Path, sync: Callable[[int], None], small: bool) -> None:
        self.learner = Learner("model", model, str(folder), None)
        self.sync = sync
        self.next = 1
        self.steps = 2 if small else 5
        self.shape = (2, 16) if small else (8, 256)
        self.lora = LoraConfig(rank=2 if small else 16, seed=0, train_unembed=False)

    async def start(self) -> None:
        await self.learner.start()
        await self.learner.open_run(RUN, self.lora, None, False)
        self.vocabulary = self.learner.engine.backbone.vocab_size

    async def train(self) -> None:
        os.fsync = self.sync
        for step in range(self.steps):
            sequences, length = self.shape
            rng = np.random.default_rng(step)
            data = datums(rng.integers(0, self.vocabulary, (sequences, length + 1)))
            await self.do("forward_backward", data=data, loss_fn="cross_entropy")
            await self.do("optim_step", adam_params=AdamParams())

    async def do(self, kind: str, **args: object) -> None:
        seq_id, self.next = self.next, self.next + 1
        await self.learner.submit(RUN, seq_id, kind, args)


def main() -> None:
    chosen = options(__doc__)
    real, home = os.fsync, default_home()
    home.mkdir(parents=True, exist_ok=True)
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with (
        tempfile.TemporaryDirectory(dir=home) as disk,
        tempfile.TemporaryDirectory(dir=memory) as elsewhere,
        asyncio.Runner() as runner,
    ):
        logged = Side(chosen.model, Path(disk), real, chosen.quick)
        free = Side(chosen.model, Path(elsewhere), lambda _: None, chosen.quick)
        runner.run(logged.start())
        runner.run(free.start())
        ours, theirs = alternate(
            lambda: runner.run(logged.train()), lambda: runner.run(free.train()), chosen.runs
        )
        os.fsync = real
    share = ours / theirs - 1
    report("s", ours / logged.steps, theirs / free.steps, theirs / ours, chosen.runs, share=share)


if __name__ == "__main__":
    main()
