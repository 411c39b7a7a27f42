"""The learner's engine: forward, backward and optimizer steps of the LoRA runs of one base model.

A batch is cut into units (`batch.py`); a pass takes units of whatever runs wait, in fair turns,
through the frozen base at once (`passes.py`). Gradients are added to the run's flat buffer once
its whole batch has gone through and is finite, so a bad batch leaves it unchanged, and costs
nobody else anything.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter, deque
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.profiler import record_function

from ..primitives.errors import InvalidInput, NotFound, OutOfCapacity, TinsmithError, Unavailable
from ..primitives.types import (
    AdamParams,
    Datum,
    ForwardBackwardOutput,
    LoraConfig,
    OptimStepResponse,
)
from .backbone import Backbone
from .batch import Batch, Unit
from .fair_queue import FairQueue
from .memory_budget import Budget
from .optimizer import AdamState, Due, adam_steps
from .passes import Group, Outcome, PassRunner, Result, Work, pass_shape, run_pass
from .run_store import Run, RunStore


@dataclass(eq=False)
class _Task:
    """A batch of one run on its way through."""

    number: int
    run_id: str
    loss_fn: str
    batch: Batch
    units: deque[Unit]
    backward: bool
    arrived: float
    pack_s: float
    missing: int = field(init=False)  # units that are not done
    grad: Tensor | None = None
    failure: TinsmithError | None = None
    queue_s: float | None = None
    forward_s: float = 0.0
    backward_s: float = 0.0

    def __post_init__(self) -> None:
        self.missing = len(self.units)

    def note(self, share: float, began: float, outcome: Outcome) -> None:
        """This batch had a `share` of a pass."""
        if self.queue_s is None:
            self.queue_s = began - self.arrived
        self.forward_s += share * outcome.forward_s
        self.backward_s += share * outcome.backward_s

    def output(self) -> ForwardBackwardOutput:
        return self.batch.output(
            {
                "queue_s:max": self.queue_s or 0.0,
                "pack_s:sum": self.pack_s,
                "forward_s:sum": self.forward_s,
                "backward_s:sum": self.backward_s,
            }
        )


@dataclass(frozen=True, eq=False)
class _Part:
    """A unit's place in a pass."""

    task: _Task
    unit: Unit
    run: Run

    @property
    def rows(self) -> int:
        return len(self.unit.pack.tokens)

    @property
    def work(self) -> Work:
        task, run = self.task, self.run
        loss, config = task.batch.loss, task.batch.config
        return Work(self.unit, run.layout, run.params, loss, config, task.backward)


def _failure(task: _Task, error: Exception) -> TinsmithError:
    if isinstance(error, TinsmithError):
        return error
    failure = TinsmithError(
        f"{task.loss_fn!r} on this batch failed: {type(error).__name__}: {error}"
    )
    failure.__cause__ = error
    return failure


def _finite(values: Tensor) -> bool:
    """Without a copy: the largest magnitude of all."""
    return bool(torch.linalg.vector_norm(values, float("inf")).isfinite())


@dataclass(frozen=True, eq=False)
class Finished:
    """What came of a batch: an output or an error."""

    number: int
    output: ForwardBackwardOutput | None = None
    error: BaseException | None = None


class PassWatcher(Protocol):
    """Is told of passes, as they are computed; batches are named by their numbers."""

    def pass_begins(self, numbers: Collection[int]) -> None:
        """These batches have a part in what is computed next."""
        ...

    def pass_ended(
        self, rows: Mapping[int, int], began: float, forward_s: float, backward_s: float
    ) -> None:
        """A pass of so many rows of each; `began` by `time.perf_counter()`."""
        ...


class LearnerEngine:
    """Not thread-safe: one call at a time.

    Args:
        backbone: the frozen base model.
        max_pack_tokens: rows of one pass; bounds the memory that activations take.
        memory_bytes: for runs and passes; None: most of what is free.
        learners: with how many others' help, itself included, batches are to be computed.
        group: computes the passes in its place, `learners` of them at once.
        runs: options of the `RunStore`.

    Attributes:
        helpers: the others, as they come and go; what is computed does not depend on it.
        watcher: is told of passes.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        max_pack_tokens: int = 2048,
        memory_bytes: int | None = None,
        learners: int = 1,
        group: Group | None = None,
        **runs: Any,
    ) -> None:
        self.backbone = backbone
        self.budget = Budget(backbone, memory_bytes)
        self.max_pack_tokens = max_pack_tokens
        self.group = group
        self.learners = learners if group is None else group.parts
        self.helpers: dict[int, PassRunner] = {}
        self.watcher: PassWatcher | None = None
        self.runs = RunStore(backbone.device, **{"resident_bytes": memory_bytes, **runs})
        self.queue = FairQueue()
        self._numbers = itertools.count()
        self._tasks: dict[str, deque[_Task]] = {}  # by run; never empty
        self._finished: list[Finished] = []

    # ---- runs ----

    def create_run(self, run_id: str, lora: LoraConfig, share: float = 1.0) -> None:
        """
        Args:
            share: how much of the learner the run gets for another's 1, while both want it.

        Raises:
            OutOfCapacity: the run is larger than all the room for runs.
        """
        self.runs.create(run_id, lora, self.backbone.layout(lora))
        self.queue.weights[run_id] = share

    def drop_run(self, run_id: str) -> None:
        for task in self._tasks.pop(run_id, ()):
            gone = NotFound(f"run {run_id!r} was closed")
            self._finished.append(Finished(task.number, error=gone))
        self.queue.forget(run_id)
        self.runs.drop(run_id)

    def export(self, run_id: str) -> Tensor:
        """A copy of the run's flat parameters, on the CPU."""
        return self.runs[run_id].params.detach().to("cpu", copy=True)

    def state(self, run_id: str, gradient: bool = False) -> dict[str, Tensor]:
        """Copies of everything that the run's next steps depend on, on the CPU; `gradient`: also
        what has been accumulated for the next step."""
        run = self.runs[run_id]
        kept = {
            n: t.to("cpu", copy=True) for n, t in run.tensors.items() if n != "grad" or gradient
        }
        return {**kept, "step": torch.tensor(run.adam.step)}

    def load(
        self, run_id: str, params: Tensor, state: Mapping[str, Tensor] | None, version: int | None
    ) -> None:
        """Replace the run's parameters, and its optimizer by `state` (None: a fresh one).

        The accumulated gradient is dropped, unless `state` has one. `version=None` counts as a
        step, so that samplers take the loaded weights for new.
        """
        run = self.runs[run_id]
        run.params.copy_(params)
        run.grad.zero_()
        run.adam = AdamState.zeros(run.params)
        if state is not None:
            run.adam.exp_avg.copy_(state["exp_avg"])
            run.adam.exp_avg_sq.copy_(state["exp_avg_sq"])
            run.adam.step = int(state["step"])
            if "grad" in state:
                run.grad.copy_(state["grad"])
        run.version = run.version + 1 if version is None else version

    # ---- one batch, by itself ----

    def forward(
        self,
        run_id: str,
        data: Sequence[Datum],
        loss_fn: str,
        loss_fn_config: Mapping[str, float] | None = None,
        logprobs: str = "all",
    ) -> ForwardBackwardOutput:
        """Loss and logprobs, no gradient. Errors as `forward_backward`."""
        return self._alone(run_id, data, loss_fn, loss_fn_config, logprobs, backward=False)

    def forward_backward(
        self,
        run_id: str,
        data: Sequence[Datum],
        loss_fn: str,
        loss_fn_config: Mapping[str, float] | None = None,
        logprobs: str = "all",
    ) -> ForwardBackwardOutput:
        """Add the gradient of the summed loss to the run's accumulated gradient.

        Raises:
            InvalidInput: a bad datum or config, or a gradient that is not finite; the
                accumulated gradient is unchanged.
            NotFound: no such loss or run.
            OutOfCapacity: a pass would not fit into memory, even with activation checkpointing;
                nothing was computed.
        """
        return self._alone(run_id, data, loss_fn, loss_fn_config, logprobs, backward=True)

    def _alone(self, run_id: str, *batch: Any, backward: bool) -> ForwardBackwardOutput:
        if self.busy:
            raise RuntimeError("batches are under way: submit this one too")
        self.submit(run_id, *batch, backward=backward)
        while self.busy:
            for finished in self.step():
                if finished.error is not None:
                    raise finished.error
                assert finished.output is not None
                return finished.output
        raise AssertionError("a batch ended without a result")

    # ---- batches of many runs ----

    @property
    def busy(self) -> bool:
        return bool(self._tasks or self._finished)

    def submit(
        self,
        run_id: str,
        data: Sequence[Datum],
        loss_fn: str,
        loss_fn_config: Mapping[str, float] | None = None,
        logprobs: str = "all",
        *,
        backward: bool,
        arrived: float | None = None,
    ) -> int:
        """Queue a batch (`forward_backward`, or `forward` if not `backward`); some `step()`
        returns what came of it under the number returned here. A run's batches go in order.

        Args:
            arrived: since when it waits, by `time.perf_counter()`.

        Raises:
            InvalidInput: a bad datum or config.
            NotFound: no such loss or run.
            OutOfCapacity: a pass would not fit into memory, even with activation checkpointing.
        """
        started = time.perf_counter()
        layout = self.runs.layout(run_id)
        with record_function("pack"):
            batch = Batch(self.backbone, data, loss_fn, loss_fn_config, logprobs)
            units = deque(batch.units(self.max_pack_tokens, self.learners))
        self.budget.checkpointing(
            [(pass_shape([unit]), [layout]) for unit in units],
            self.runs.resident(),
            gradient=backward,
        )
        packed = time.perf_counter()
        task = _Task(
            next(self._numbers),
            run_id,
            loss_fn,
            batch,
            units,
            backward,
            started if arrived is None else arrived,
            packed - started,
        )
        if run_id not in self._tasks:
            self._tasks[run_id] = deque()
            self.queue.arrive(run_id)
        self._tasks[run_id].append(task)
        return task.number

    def step(self) -> list[Finished]:
        """Run a pass here and one with each helper, and return the batches that are done (none, if
        all go on)."""
        with ExitStack() as held:
            passes = self._choose_passes(held)
            if self.watcher is not None:
                self.watcher.pass_begins({p.task.number for parts in passes for p in parts})
            self._run(passes)
        finished, self._finished = self._finished, []
        return finished

    def fail_all(self, error: TinsmithError) -> list[Finished]:
        """After a step that raised: every batch under way gets the error."""
        numbers = [task.number for tasks in self._tasks.values() for task in tasks]
        self._tasks.clear()
        finished, self._finished = self._finished, []
        return [*finished, *(Finished(number, error=error) for number in numbers)]

    def _choose_passes(self, held: ExitStack) -> list[list[_Part]]:
        """What each learner computes next; `held` keeps the runs in memory."""
        for tasks in list(self._tasks.values()):
            if not tasks[0].units:
                self._close(tasks[0])  # its loss depends on nothing
        learners = 1 + len(self.helpers) if self.group is None else self.group.parts
        rows = sum(len(u.pack.tokens) for tasks in self._tasks.values() for u in tasks[0].units)
        room = min(self.max_pack_tokens, -(-rows // learners))
        runs: dict[str, Run] = {}
        passes = [self._choose(held, runs, room) for _ in range(learners)]
        return [chosen for chosen in passes if chosen]

    def _choose(self, held: ExitStack, runs: dict[str, Run], room: int) -> list[_Part]:
        """The units of a pass, in fair turns as long as there is room. `runs`: those already held."""
        chosen: list[_Part] = []
        waiting = {run_id: tasks[0] for run_id, tasks in self._tasks.items() if tasks[0].units}
        while waiting:
            run_id = self.queue.next(waiting)
            task = waiting[run_id]
            fits = not chosen or (
                task.backward == chosen[0].task.backward and len(task.units[0].pack.tokens) <= room
            )
            if fits and run_id not in runs:
                try:
                    runs[run_id] = held.enter_context(self.runs.using(run_id))
                except OutOfCapacity as error:
                    # Beside these there is no room for it: it goes without them, next time.
                    fits = False
                    if not runs:
                        self._close(task, error)
            if not fits:
                del waiting[run_id]
                continue
            unit = task.units.popleft()
            chosen.append(_Part(task, unit, runs[run_id]))
            self.queue.charge(run_id, len(unit.pack.tokens))
            room -= len(unit.pack.tokens)
            if not task.units:
                del waiting[run_id]
        return chosen

    def _run(self, passes: Sequence[Sequence[_Part]]) -> None:
        """The first here, the others by helpers meanwhile; what a helper fails at is done here."""
        began, cpu = time.perf_counter(), torch.device("cpu")
        if self.group is not None:
            self._run_in_group(self.group, passes, began)
            return
        helped = {
            name: (parts, helper([part.work.to(cpu) for part in parts]))
            for parts, (name, helper) in zip(passes[1:], self.helpers.items(), strict=False)
        }
        for first in passes[:1]:
            self._run_here(first, began)
        for name, (parts, future) in helped.items():
            try:
                outcome = future.result().to(self.backbone.device)
            except Exception as error:
                if isinstance(error, Unavailable):
                    del self.helpers[name]
                self._run_here(parts, began)
            else:
                self._take_all(parts, outcome, began)

    def _run_here(self, parts: Sequence[_Part], began: float) -> None:
        parts = [part for part in parts if part.task.failure is None]
        if not parts:
            return
        try:
            outcome = run_pass(
                self.backbone, [part.work for part in parts], self._checkpointing(parts)
            )
        except Exception as error:
            # One of them is to blame, or they are too large together: each by itself.
            for part in parts if len(parts) > 1 else []:
                self._run_here([part], began)
            if len(parts) == 1:
                self._close(parts[0].task, _failure(parts[0].task, error))
        else:
            self._take_all(parts, outcome, began)

    def _run_in_group(
        self, group: Group, passes: Sequence[Sequence[_Part]], began: float, again: bool = True
    ) -> None:
        """All at once. If ranks were lost the others, and new ones, compute it again; what then fails is
        computed part by part."""
        passes = [[p for p in parts if p.task.failure is None] for parts in passes]
        passes = [parts for parts in passes if parts]
        if not passes:
            return
        failure = None
        try:
            checkpointing = any(map(self._checkpointing, passes))
            outcomes = group.run([[part.work for part in parts] for parts in passes], checkpointing)
        except Exception as error:
            # Without its traceback, which would keep what the pass held.
            failure = error.with_traceback(None)
        else:
            for parts, outcome in zip(passes, outcomes, strict=True):
                self._take_all(parts, outcome, began)
        single = [part for parts in passes for part in parts]
        if isinstance(failure, Unavailable) and again:
            self._run_in_group(group, passes, began, again=False)
        elif failure is not None and len(single) > 1:
            for part in single:
                self._run_in_group(group, [[part]], began)
        elif failure is not None:
            self._close(single[0].task, _failure(single[0].task, failure))

    def _checkpointing(self, parts: Sequence[_Part]) -> bool:
        """
        Raises:
            OutOfCapacity: the pass does not fit into memory; if of several parts, not without
                computing anything twice.
        """
        shape, layouts = pass_shape([p.unit for p in parts]), [p.run.layout for p in parts]
        (wanted,) = self.budget.checkpointing(
            [(shape, layouts)], self.runs.resident(), gradient=parts[0].task.backward
        )
        if wanted and len(parts) > 1:
            raise OutOfCapacity(f"a pass of {shape.rows} rows would have to be checkpointed")
        return wanted

    def _take_all(self, parts: Sequence[_Part], outcome: Outcome, began: float) -> None:
        rows = sum(part.rows for part in parts)
        if self.watcher is not None:
            of_each = Counter[int]()
            for part in parts:
                of_each[part.task.number] += part.rows
            self.watcher.pass_ended(of_each, began, outcome.forward_s, outcome.backward_s)
        for part, result in zip(parts, outcome.results, strict=True):
            part.task.note(part.rows / rows, began, outcome)
            if part.task.failure is None:
                self._take(part, result)

    def _take(self, part: _Part, result: Result | InvalidInput) -> None:
        """What a unit gave; with the last one the batch is done."""
        task, run = part.task, part.run
        if isinstance(result, InvalidInput):
            self._close(task, result)
            return
        task.batch.add(part.unit, result.loss, result.logprobs_M, result.load)
        task.missing -= 1
        if result.grad is not None:
            task.grad = result.grad if task.grad is None else task.grad.add_(result.grad)
        if task.missing:
            return
        if task.grad is not None and not _finite(task.grad):
            failure = InvalidInput(
                f"the gradient of {task.loss_fn!r} on this batch is not finite (loss "
                f"{task.batch.loss_sum:g}); the run's gradient is unchanged. "
                "Look for logprobs far from the policy's, or diverged weights"
            )
            self._close(task, failure)
            return
        if task.grad is not None:
            run.grad += task.grad
        self._close(task)

    def _close(self, task: _Task, failure: TinsmithError | None = None) -> None:
        """The batch at the head of its run's queue is done, or failed."""
        tasks = self._tasks[task.run_id]
        assert tasks[0] is task
        tasks.popleft()
        if not tasks:
            del self._tasks[task.run_id]
        task.failure = failure
        output = None if failure is not None else task.output()
        self._finished.append(Finished(task.number, output, failure))

    # ---- steps ----

    def optim_step(self, run_id: str, adam_params: AdamParams) -> OptimStepResponse:
        """One Adam step on the accumulated gradient, which is zero afterwards."""
        (response,) = self.optim_steps({run_id: adam_params})
        return response

    def optim_steps(self, due: Mapping[str, AdamParams]) -> list[OptimStepResponse]:
        """A step of each of these runs, in one pass over their memory where it holds them all."""
        with ExitStack() as held:
            runs = [
                (held.enter_context(self.runs.using(run_id)), adam) for run_id, adam in due.items()
            ]
            started = time.perf_counter()
            with record_function("optimizer"):
                norms = adam_steps(
                    [Due(run.params, run.grad, run.adam, adam) for run, adam in runs]
                )
                for run, _ in runs:
                    run.grad.zero_()
                    run.version += 1
            seconds = (time.perf_counter() - started) / len(runs)
        return [
            OptimStepResponse(run.version, {"grad_norm": norm, "optimizer_s": seconds})
            for (run, _), norm in zip(runs, norms, strict=True)
        ]
