"""Training on a fixed set of examples, whatever the objective: batches, schedule, evaluation,
checkpoints, and going on exactly where it stopped.

Which examples a step trains on depends only on the seed and the step, and the next step's batch is
on its way while the learner works on this one's.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from ..primitives.client import ServiceClient, TrainingClient
from ..primitives.errors import InvalidInput, NotFound
from ..primitives.op import Op
from ..primitives.types import ForwardBackwardOutput, OptimStepResponse, TrainingInfo
from .fit_config import FitConfig
from .rows import DataReport
from .run_files import appending, checkpoint_name, forget_after, write_json
from .run_folder import load_run_of, new_run_folder
from .run_start import new_training_client
from .stopping import stop_on_signals, unless

E = TypeVar("E")
T = TypeVar("T")


class Objective(ABC, Generic[E]):
    """What is learnt from examples of the kind `E`.

    Batches are submitted while the step before is under way, unless one `waits` for the weights
    that it leaves.
    """

    waits = False

    @abstractmethod
    async def submit(
        self, training: TrainingClient, batch: Sequence[E], step: int
    ) -> Op[ForwardBackwardOutput]:
        """Submit the forward and backward pass of a batch; the optimizer's step follows."""

    @abstractmethod
    def metrics(self, batch: Sequence[E], output: ForwardBackwardOutput) -> dict[str, float]:
        """What the pass tells of the batch; `loss` among it."""

    @abstractmethod
    async def evaluate(self, training: TrainingClient, held_out: Sequence[E]) -> dict[str, Any]:
        """How well the weights as they are do on held-out examples: JSON values."""


@dataclass(frozen=True, eq=False)
class Prepared(Generic[E]):
    """What a run trains on. `fingerprint` tells whether a resumed run has the same examples."""

    objective: Objective[E]
    train: Sequence[E]
    held_out: Sequence[E]
    fingerprint: str
    reports: Mapping[str, DataReport] = field(default_factory=dict)


Prepare = Callable[[TrainingClient, TrainingInfo, Path], Awaitable[Prepared[E]]]
"""Makes the examples of a run from its client, its model's facts and its folder."""


class FitWatcher:
    """Sees the loop's progress; override what you want to show."""

    def started(self, run_id: str, run_dir: Path, first_step: int, steps: int) -> None: ...

    def data(self, reports: Mapping[str, DataReport]) -> None: ...

    def step(self, metrics: dict[str, float]) -> None: ...

    def evaluated(self, step: int, result: dict[str, Any]) -> None: ...


@dataclass(frozen=True, eq=False)
class FitResult:
    """`stopped`: a signal ended the loop early, after a checkpoint. `before` and `after` are None
    where that evaluation was not run (also `before` after a resume)."""

    run_id: str
    run_dir: Path
    checkpoint: str
    steps: int
    stopped: bool
    before: dict[str, Any] | None
    after: dict[str, Any] | None
    reports: Mapping[str, DataReport]
    tokens: int
    seconds: float


@dataclass
class _State:
    """What a checkpoint keeps besides the weights. `step` counts optimizer steps."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    fingerprint: str = ""


def split(rows: Sequence[T], share: float, seed: int) -> tuple[list[T], list[T]]:
    """(train, held out): a seeded random `share` of the rows held out, at least one of each if
    `share` is above 0; both in their order.

    Raises:
        InvalidInput: one row cannot be split.
    """
    if share == 0:
        return list(rows), []
    if len(rows) < 2:
        raise InvalidInput("one row cannot be split into training and validation")
    count = min(max(round(share * len(rows)), 1), len(rows) - 1)
    held = np.zeros(len(rows), bool)
    held[np.random.default_rng([seed, 0]).permutation(len(rows))[:count]] = True
    return (
        [row for row, out in zip(rows, held, strict=True) if not out],
        [row for row, out in zip(rows, held, strict=True) if out],
    )


def batch_indices(examples: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Which examples optimizer step `step` (from 0) trains on: every epoch goes through all of them
    in an order of its own; its last batch may be smaller."""
    epoch, batch = divmod(step, math.ceil(examples / batch_size))
    order = np.random.default_rng([seed, 1, epoch]).permutation(examples)
    return order[batch * batch_size : (batch + 1) * batch_size]


async def gather_bounded(
    function: Callable[[E], Awaitable[T]], items: Sequence[E], at_once: int = 256
) -> list[T]:
    """`function` of every item, in order, a bounded number of them at a time."""
    free = asyncio.Semaphore(at_once)

    async def one(item: E) -> T:
        async with free:
            return await function(item)

    return await asyncio.gather(*map(one, items))


async def start_fit(
    service: ServiceClient,
    config: FitConfig,
    prepare: Prepare[E],
    *,
    about: Mapping[str, Any],
    run_dir: str | Path | None = None,
    watch: FitWatcher | None = None,
) -> FitResult:
    """Start a run. `about` is said of it by `tinsmith runs`; `run_dir` defaults to `<home>/runs/<run
    id>`. A run whose data cannot be used is none."""
    watch = watch or FitWatcher()
    metadata = {**about, **({"run_dir": new_run_folder(run_dir)} if run_dir else {})}
    training = await new_training_client(service, config, metadata)
    folder = Path(run_dir) if run_dir else Path(service.home) / "runs" / training.run_id
    try:
        folder.mkdir(parents=True, exist_ok=True)
        prepared = await prepare(training, await training.get_info(), folder)
    except BaseException:
        await service.delete_training_run(training.run_id)
        raise
    watch.data(prepared.reports)
    kind = type(config).__name__
    saved = {"run_id": training.run_id, "kind": kind, "config": asdict(config)}
    saved["data"] = {name: report.to_json() for name, report in prepared.reports.items()}
    write_json(folder / "run.json", saved)
    loop = _Loop(training, config, prepared, folder, _State(), watch)
    await loop.checkpoint()
    return await loop.run(first=True)


async def resume_fit(
    service: ServiceClient,
    run_dir: str | Path,
    kind: type[FitConfig],
    prepare: Callable[[Any], Prepare[E]],
    *,
    steps: int | None = None,
    watch: FitWatcher | None = None,
) -> FitResult:
    """Go on with the run in `run_dir` from its last checkpoint; `steps` sets another end.
    `prepare(config)` makes what `start_fit` got as `prepare`.

    Raises:
        NotFound: there is no run of that kind in `run_dir`, or the service does not know it.
        InvalidInput: the data is no longer what the run was started with.
    """
    folder = Path(run_dir)
    run_id, config = load_run_of(kind, folder)
    if steps is not None:
        config = replace(config, steps=steps)
    saved = [c for c in await service.list_checkpoints(run_id) if "fit" in c.user_metadata]
    if not saved:
        raise NotFound(f"run {run_id} has no checkpoint to go on from")
    newest = max(saved, key=lambda c: c.user_metadata["fit"]["step"])
    state = _State(**newest.user_metadata["fit"])
    training = await service.resume_training_client(run_id, path=newest.path)
    prepared = await prepare(config)(training, await training.get_info(), folder)
    if prepared.fingerprint != state.fingerprint:
        raise InvalidInput(
            f"the data is not what run {run_id} was started with, so it cannot go on as if it had "
            "not stopped; start a new run from its checkpoint instead (start=" + newest.path + ")"
        )
    forget_after(folder / "metrics.jsonl", state.step if state.step else -1)
    watch = watch or FitWatcher()
    watch.data(prepared.reports)
    loop = _Loop(training, config, prepared, folder, state, watch, newest.path)
    return await loop.run(first=state.step == 0)


@dataclass(frozen=True, eq=False)
class _Submitted(Generic[E]):
    step: int
    batch: Sequence[E]
    learning_rate: float
    forward_backward: Op[ForwardBackwardOutput]
    optim_step: Op[OptimStepResponse]


class _Loop(Generic[E]):
    """One process's part of a run."""

    def __init__(
        self,
        training: TrainingClient,
        config: FitConfig,
        prepared: Prepared[E],
        folder: Path,
        state: _State,
        watch: FitWatcher,
        saved: str = "",
    ) -> None:
        self.training, self.config, self.folder = training, config, folder
        self.prepared, self.objective = prepared, prepared.objective
        self.state, self.watch = state, watch
        self.state.fingerprint = prepared.fingerprint
        self.saved = saved
        self.total = config.total_steps(len(prepared.train))
        self.batches_per_epoch = math.ceil(len(prepared.train) / config.batch_size)
        self.step_started = time.monotonic()

    async def run(self, first: bool) -> FitResult:
        state, config = self.state, self.config
        self.watch.started(self.training.run_id, self.folder, state.step, self.total)
        before = after = None
        with stop_on_signals() as stop, appending(self.folder / "metrics.jsonl") as self.log:
            if first:
                before = await unless(stop, self.evaluate())
            saved = state.step
            self.step_started = time.monotonic()
            under_way: _Submitted[E] | None = None
            while not stop.is_set() and (under_way or state.step < self.total):
                ahead = None
                if self._next_step(under_way) < self.total and not self._pause_after(under_way):
                    ahead = await unless(stop, self._submit(self._next_step(under_way)))
                if under_way is not None:
                    await self._finish(under_way)
                under_way = ahead
                if under_way is None and state.step > 0:
                    if self._due(config.eval_every) and state.step < self.total:
                        await unless(stop, self.evaluate())
                    if self._due(config.checkpoint_every) and state.step > saved:
                        await self.checkpoint()
                        saved = state.step
            if under_way is not None:
                await self._finish(under_way)
            if state.step > saved:
                await self.checkpoint()
            if state.step >= self.total and not stop.is_set():
                after = await unless(stop, self.evaluate())
        return FitResult(
            self.training.run_id,
            self.folder,
            self.saved,
            state.step,
            state.step < self.total,
            before,
            after,
            self.prepared.reports,
            state.tokens,
            state.seconds,
        )

    def _next_step(self, under_way: _Submitted[E] | None) -> int:
        return self.state.step if under_way is None else under_way.step + 1

    def _pause_after(self, under_way: _Submitted[E] | None) -> bool:
        """Whether something else has its turn after the step under way."""
        if under_way is None:
            return False
        if self.objective.waits:
            return True
        done = under_way.step + 1
        every = (self.config.eval_every, self.config.checkpoint_every)
        return any(number and done % number == 0 for number in every)

    def _due(self, every: int) -> bool:
        return bool(every) and self.state.step % every == 0

    async def _submit(self, step: int) -> _Submitted[E]:
        config, train = self.config, self.prepared.train
        indices = batch_indices(len(train), config.batch_size, config.seed, step)
        batch = [train[i] for i in indices]
        adam = config.adam(step, self.total)
        forward_backward = await self.objective.submit(self.training, batch, step)
        optim_step = self.training.optim_step(adam)
        return _Submitted(step, batch, adam.learning_rate, forward_backward, optim_step)

    async def _finish(self, submitted: _Submitted[E]) -> None:
        output, updated = await asyncio.gather(submitted.forward_backward, submitted.optim_step)
        now = time.monotonic()
        seconds, self.step_started = now - self.step_started, now
        tokens = int(output.metrics.get("tokens:sum", 0))
        state = self.state
        state.step = submitted.step + 1
        state.tokens += tokens
        state.seconds += seconds
        row = {
            "step": state.step,
            "version": updated.version,
            "epoch": state.step / self.batches_per_epoch,
            "learning_rate": submitted.learning_rate,
            **self.objective.metrics(submitted.batch, output),
            **updated.metrics,
            "tokens": state.tokens,
            "tokens_per_s": tokens / seconds,
            "step_s": seconds,
            "seconds": state.seconds,
        }
        self._append(row)
        self.watch.step(row)

    def _append(self, row: dict[str, Any]) -> None:
        self.log.write(json.dumps(row) + "\n")
        self.log.flush()

    async def evaluate(self) -> dict[str, Any] | None:
        """On what is held out, None if nothing is; the time it takes is not the steps'."""
        if not self.prepared.held_out:
            return None
        started = time.monotonic()
        result = await self.objective.evaluate(self.training, self.prepared.held_out)
        seconds = time.monotonic() - started
        self._append({"step": self.state.step, "eval": result, "eval_s": seconds})
        self.watch.evaluated(self.state.step, result)
        self.step_started += seconds
        return result

    async def checkpoint(self) -> None:
        started = time.monotonic()
        saved = await self.training.save_state(
            checkpoint_name(self.state.step),
            user_metadata={"fit": asdict(self.state)},
            overwrite=True,
        )
        self.saved = saved.path
        self.step_started += time.monotonic() - started
