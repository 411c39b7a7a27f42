"""The Learner actor: every run's log of operations, applied in order, exactly once.

Clients number their operations; an operation that arrives early waits for its turn, one that
arrives twice gets the recorded result. The heads of all logs are taken between two passes of the
engine, which computes the batches among them together. One thread owns the engine; saving and
publishing copy what they need in that thread and finish outside it, so that training goes on
meanwhile.

Operations are written down when they come and computed beside that; results are given once they
are on disk (`journal.py`). A learner that is started again goes on from there (`recover`).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from prometheus_client.metrics_core import Metric

from ..engines import adapter_files
from ..engines.backbone import Backbone
from ..engines.base_weights import BaseWeights
from ..engines.layout import Layout
from ..engines.learner import Finished, LearnerEngine
from ..engines.memory import state_bytes
from ..engines.memory_budget import available_bytes
from ..engines.models import copies_folder
from ..engines.optimizer import check_state
from ..engines.passes import Group, PassRunner
from ..engines.tensor_files import read_tensors
from ..primitives.errors import (
    InvalidInput,
    NotFound,
    OpCancelled,
    OutOfCapacity,
    StorageFailure,
    TinsmithError,
    Unavailable,
)
from ..primitives.op import Handle, Op
from ..primitives.paths import CheckpointPath
from ..primitives.types import (
    AdamParams,
    Checkpoint,
    LoraConfig,
    OptimStepResponse,
    PublishResponse,
    SaveResponse,
    TrainingInfo,
)
from ..primitives.validation import check_ttl
from . import records
from .journal import Journal, log_folder, new_run_key
from .learner_watch import LearnerWatch
from .manifest import Manifest
from .observed import Observed, own_notes
from .run_log import BATCHES, EFFECTS, Entry, RunLog, finish, unhandled_is_fine
from .snapshots import About
from .storage import MANIFEST, Storage
from .threads import engine_device, set_engine_threads
from .wal import REPLAY_SECONDS, SyncThread

PROGRESS_SECONDS = 5.0  # between lines about a replay
MEND_SECONDS = 1.0  # between attempts to open a run's log again

logger = logging.getLogger(__name__)


class Learner(Observed):
    """Trains the LoRA runs of one base model. Wrapped by the controller with `ray.remote`."""

    def __init__(
        self,
        base_model: str,
        model_path: str,
        storage_root: str,
        controller: Handle,
        num_threads: int | None = None,
        run_bytes: int | None = None,
        learners: int = 1,
        weights: BaseWeights = "auto",
        layout: Layout | None = None,
        replay_seconds: float = REPLAY_SECONDS,
        service: str | None = None,
    ) -> None:
        self.observe("learner")
        notes = own_notes(storage_root, f"learner of {base_model}")
        self.watch = LearnerWatch(self.meters, notes, self._batch_under_way)
        self.journals = (SyncThread(), replay_seconds, service)  # what all of them are opened with
        self.base_model = base_model
        self.model_path = model_path
        self.run_bytes = run_bytes
        self.learners = learners
        self.layout = layout or Layout()
        self.engaging: dict[int, asyncio.Task[None]] = {}  # helpers on their way
        self.storage = Storage(storage_root)
        self.controller = controller
        self.num_threads = num_threads
        self.weights: BaseWeights = weights
        self.copies = copies_folder(storage_root)
        self.logs: dict[str, RunLog] = {}
        self.recovering: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self.mending: dict[str, asyncio.Task[None]] = {}  # runs whose log their disk has failed
        self.failing: dict[str, RunLog] = {}  # their logs
        # By run and number: the errors of operations that came meanwhile.
        self.refused: defaultdict[str, dict[int, StorageFailure]] = defaultdict(dict)
        self.taken: dict[str, asyncio.Task[None]] = {}  # runs that another learner has
        self.batches: dict[int, RunLog] = {}  # under way, by the engine's number
        self.sampler: Handle | None = None
        self.engine_thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self.finishing: set[asyncio.Task[None]] = set()
        self.writing = asyncio.Lock()
        self.wake = asyncio.Event()
        self.pump: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Load the base model.

        Raises:
            InvalidInput: the model's family is not supported, or it is stored quantised.
            Unavailable: quantised weights are asked for, and their library is not installed.
        """
        self._engage_helpers()  # they load while this one does
        await self._in_engine(self._load)
        await asyncio.gather(*self.engaging.values())
        self.pump = asyncio.create_task(self._apply_logs())

    async def ping(self) -> str:
        return self.base_model

    def _load(self) -> None:
        set_engine_threads(self.num_threads)
        group: Group | None = None
        if self.layout.world == 1:
            backbone = Backbone(self.model_path, self.weights, engine_device(), copies=self.copies)
        else:
            # What torch needs for it takes seconds to import.
            from .learner_layout import expected
            from .learner_rank import LearnerRanks

            plan = expected(self.model_path, self.weights, self.layout, engine_device())
            print(f"{self.base_model}: {plan}", flush=True)
            where = (self.base_model, self.model_path, self.layout, self.weights, self.copies)
            group = ranks = LearnerRanks(self.controller, *where)
            backbone = ranks.backbone
        free = available_bytes(backbone.device)
        self.engine = LearnerEngine(
            backbone,
            resident_bytes=free // 3 if self.run_bytes is None else self.run_bytes,
            host_bytes=available_bytes(torch.device("cpu")) // 3,
            learners=self.learners,
            group=group,
            folder=None if "://" in self.storage.root else Path(self.storage.root, "idle"),
        )
        self.engine.watcher = self.watch

    def _batch_under_way(self, number: int) -> asyncio.Future[Any]:
        entry = self.batches[number].under_way
        assert entry is not None
        return entry.future

    async def metrics(self) -> list[Metric]:
        return self.watch.collect(getattr(self, "engine", None))

    def _engage_helpers(self) -> None:
        """Ask for those that are not there."""
        there = self.engine.helpers if hasattr(self, "engine") else {}
        for index in range(1, self.learners):
            if index not in there and index not in self.engaging:
                self.engaging[index] = task = asyncio.create_task(self._engage(index))
                # Where none can be had now, the next step asks again.
                task.add_done_callback(lambda t: t.cancelled() or t.exception())

    async def _engage(self, index: int) -> None:
        try:
            helper = await Op(self.controller.call("learner_helper", self.base_model, index))
            run: PassRunner = partial(helper.call, "run_pass")
            await self._in_engine(lambda: self.engine.helpers.update({index: run}))
        finally:
            del self.engaging[index]

    async def _in_engine(self, function: Any, *args: Any) -> Any:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.engine_thread, function, *args)

    # ---- runs ----

    async def open_run(
        self,
        run_id: str,
        lora: LoraConfig,
        path: str | None,
        optimizer: bool,
        next_seq_id: int = 1,
    ) -> int:
        """Start a run, afresh or from a checkpoint; returns the number of its first operation,
        `next_seq_id`."""
        if path is not None:
            await self._settle_writes()
            told = await asyncio.to_thread(self.storage.read_manifest, path)
            Manifest.of(path, told)  # before anything is closed
        await self.close_run(run_id)
        await self._in_engine(self.engine.create_run, run_id, lora)
        try:
            if path is not None:
                await self._in_engine(self._load_checkpoint, run_id, path, optimizer, True)
            state, version, share = await self._in_engine(self._whole_state, run_id)
            about = About(
                new_run_key(),
                lora,
                version,
                share,
                False,
                False,
                next_seq_id,
                position=0,
                results=[],
            )
            how = (self._log_folder(run_id), *self.journals)
            journal = await asyncio.to_thread(Journal.begin, *how, about, state)
        except BaseException:
            await self._in_engine(self.engine.drop_run, run_id)
            raise
        self.logs[run_id] = self._run_log(run_id, journal, about)
        return next_seq_id

    def _run_log(self, run_id: str, journal: Journal, about: About) -> RunLog:
        return RunLog(
            run_id,
            journal,
            about.run_key,
            self.wake.set,
            self._failed,
            about.next_seq_id,
            about.publish_steps,
            about.published,
        )

    def _log_folder(self, run_id: str) -> Path:
        return Path(self.storage.root, log_folder(run_id))

    async def open_runs(self) -> list[str]:
        return list(self.logs)

    async def held_bytes(self) -> dict[str, int]:
        """Of every open run's adapter, gradients and optimizer state."""
        return {
            run_id: state_bytes([self.engine.runs.layout(run_id)]) for run_id in list(self.logs)
        }

    async def next_seq_id(self, run_id: str) -> int:
        """
        Raises:
            NotFound: the run is not open here.
        """
        return self._log(run_id).next_seq_id

    async def park(self, run_id: str) -> None:
        """Take a snapshot now, so that a learner started later has nothing to replay.

        Raises:
            StorageFailure: it cannot be written; the log has everything all the same.
        """
        await asyncio.shield(self._log(run_id).demand_snapshot())

    def _whole_state(self, run_id: str) -> tuple[dict[str, torch.Tensor], int, float]:
        """State, version and share."""
        share = self.engine.queue.weights[run_id]
        return self.engine.state(run_id, True), self.engine.runs[run_id].version, share

    async def recover(self, run_id: str, crashed: bool = True) -> int:
        """Open a run where its log ends: its last snapshot, and the operations since then applied
        again. Results that were given are given again; returns the number of the next operation.

        Args:
            crashed: the learner that had it died (or the service ended).

        Raises:
            CorruptLog: the log or the snapshot is damaged, or a checkpoint that was loaded since then
                is gone.
            OperationCrashed: replaying it has killed learners.
            StorageFailure: the log cannot be written.
            Unavailable: a process of another service has the run open, or another learner has taken it
                meanwhile.
        """
        async with self.recovering[run_id]:
            if crashed and (run_id in self.logs or run_id in self.mending):
                return self._log(run_id).next_seq_id
            how = (self._log_folder(run_id), *self.journals)
            journal, log = await asyncio.to_thread(Journal, *how), None
            self.taken.pop(run_id, None)
            try:
                about, state, written = await asyncio.to_thread(journal.read)
                log = self._run_log(run_id, journal, about)
                for record in about.results:
                    log.remember(record)
                log.enter(written, crashed)
                await self._in_engine(self.engine.create_run, run_id, about.lora, about.share)
                params = state.pop("params")
                await self._in_engine(self.engine.load, run_id, params, state, about.version)
                self.logs[run_id] = log
                await self._replay(log)
                await self._publish_again(log)
                if log.journal.log.failure is not None:
                    raise log.journal.log.failure
                if crashed:
                    log.mark_recovery(over=True)
                return log.next_seq_id
            except BaseException:
                if log is not None:
                    await self._forget(log)
                await self._settle_writes()
                await asyncio.to_thread(journal.close)
                raise

    async def _replay(self, log: RunLog) -> None:
        """Wait until what waits without a gap is applied."""
        end = log.next_seq_id
        while end in log.waiting:
            end += 1
        first, last = log.next_seq_id, log.waiting.get(end - 1)
        if last is None:
            return
        began = time.perf_counter()
        done = unhandled_is_fine(asyncio.get_running_loop().create_future())
        log.reached = (end, done)
        self.wake.set()
        while not done.done():
            await asyncio.wait({done}, timeout=PROGRESS_SECONDS)
            seconds = time.perf_counter() - began
            if seconds >= PROGRESS_SECONDS:
                logger.warning(
                    "run %s: %d of %d operations replayed in %.0f s",
                    log.run_id,
                    log.next_seq_id - first,
                    end - first,
                    seconds,
                )
        done.result()

    async def take_over(self, run_id: str) -> int:
        """Where a new client's operations go on, after all that has arrived. Numbers that the client
        before it took but never sent are passed over."""
        log = self._log(run_id)
        following = max([log.next_seq_id - 1, *log.waiting]) + 1
        gone = OpCancelled(f"another client took over run {run_id}")
        log.pass_over_missing(range(log.next_seq_id, following), gone)
        await log.on_disk()
        return following

    async def close_run(self, run_id: str) -> None:
        """Free a run's memory and delete its log. Operations still waiting fail."""
        self.failing.pop(run_id, None)
        self.refused.pop(run_id, None)
        mending = self.mending.pop(run_id, None)
        if mending is not None:
            mending.cancel()
            await asyncio.wait({mending})
        log = self.logs.get(run_id)
        if log is None:
            return
        await self._close(log)
        await asyncio.to_thread(log.journal.delete)
        self.watch.forget(run_id)
        async with log.publishing:  # what is on its way to the sampler arrives before it is dropped
            if self.sampler is not None:
                with contextlib.suppress(Unavailable):  # a dead one holds nothing
                    await Op(self.sampler.call("drop_run", run_id))

    async def _close(self, log: RunLog) -> None:
        log.closed = True
        gone = NotFound(f"run {log.run_id} was closed")
        waiting = [entry.future for entry in log.waiting.values()]
        for future in (*waiting, log.demanded, log.reached and log.reached[1]):
            if future is not None and not future.done():
                future.set_exception(gone)
        await self._forget(log)

    async def _forget(self, log: RunLog) -> None:
        """Free its memory."""
        if self.logs.get(log.run_id) is log:
            del self.logs[log.run_id]
        await self._in_engine(self.engine.drop_run, log.run_id)
        if log.snapshot is not None:
            await asyncio.wait({log.snapshot})

    # ---- disks that fail, and runs that another learner has taken ----

    def _failed(self, log: RunLog) -> None:
        if self.logs.get(log.run_id) is not log or self.recovering[log.run_id].locked():
            return
        if log.taken:
            self.taken[log.run_id] = asyncio.create_task(self._let_go(log))
        else:
            self.mending[log.run_id] = asyncio.create_task(self._mend(log))
            self.failing[log.run_id] = log

    async def _let_go(self, log: RunLog) -> None:
        logger.warning("run %s: %s", log.run_id, log.journal.log.failure)
        await self._forget(log)
        await self._settle_writes()
        await asyncio.to_thread(log.journal.close)

    async def _mend(self, log: RunLog) -> None:
        """Open a run again when the disk that failed its log takes it again: what was on disk goes
        on, as after a crash, and whoever waits for it gets it."""
        logger.warning("run %s: %s; opening it again", log.run_id, log.journal.log.failure)
        try:
            await self._forget(log)
            await self._settle_writes()
            await asyncio.to_thread(log.journal.close)
            while True:
                try:
                    await self.recover(log.run_id, crashed=False)
                    break
                except StorageFailure as error:
                    logger.warning("run %s: %s; trying again", log.run_id, error)
                    await asyncio.sleep(MEND_SECONDS)
            again = self.logs[log.run_id]
            # What came after it without a gap has nothing to wait for where it was refused.
            for seq_id, refused in {**self.refused.pop(log.run_id, {}), **log.refused()}.items():
                again.pass_over_missing([seq_id], refused)
            for seq_id, entry in log.unanswered.items():
                if not entry.future.done():
                    result = again.results[seq_id]
                    result.add_done_callback(partial(_pass_on, entry.future))
        except BaseException as error:
            gone = error if isinstance(error, TinsmithError) else NotFound("the run was closed")
            for entry in log.unanswered.values():
                if not entry.future.done():
                    entry.future.set_exception(gone)
            if not isinstance(error, TinsmithError):
                raise
            logger.warning("run %s could not be opened again: %s", log.run_id, error)
        finally:
            if self.mending.get(log.run_id) is asyncio.current_task():
                del self.mending[log.run_id]
            if self.failing.get(log.run_id) is log:
                del self.failing[log.run_id]
                self.refused.pop(log.run_id, None)

    async def settle(self) -> None:
        """Wait until what is being saved is saved."""
        await self._settle_writes()

    # ---- the log ----

    async def submit(
        self,
        run_id: str,
        seq_id: int,
        kind: str,
        args: dict[str, Any],
        answered: int = 1,
        failed: Collection[int] = (),
        delivered: tuple[int, int] = (1, 1),
        trace: str | None = None,
    ) -> Any:
        """Append operation `seq_id` to a run's log and wait for its result.

        Args:
            answered, failed: the client knows what became of all operations before this number, and
                that these, from it on, failed: those of them that are missing were refused, and are
                passed over.
            delivered: the client has the results of the operations from the first number to before the
                second: they are kept no longer.
            trace: the `traceparent` of who sent it.
        """
        known, future = self.logs.get(run_id) or self.failing.get(run_id), None
        if known is not None:
            start, end = delivered
            known.forget_results(start, min(end, seq_id))
            # What came before the disk failed is no longer refused: it is on disk, or was refused then.
            future = known.results.get(seq_id)
        if future is None:
            try:
                log = self._log(run_id)
            except StorageFailure as refused:
                self.refused[run_id][seq_id] = refused
                raise
            if seq_id < log.next_seq_id:
                raise InvalidInput(
                    f"operation {seq_id} of run {run_id} was applied before; "
                    f"its result is no longer kept (next is {log.next_seq_id})"
                )
            gone = StorageFailure("it was refused, by a learner that died since")
            missing = [*range(log.next_seq_id, min(answered, seq_id)), *failed]
            log.pass_over_missing(missing, gone)
            future = log.append(seq_id, kind, args).future
            self.watch.accepted(run_id, seq_id, kind, args, future, trace)
        return await asyncio.shield(future)

    async def outcome(self, run_id: str, seq_id: int) -> tuple[str, Any]:
        """The kind and the result of an operation that came before.

        Raises:
            NotFound: it did not, or its result is not kept any more.
        """
        log = self._log(run_id)
        result = log.results.get(seq_id)
        if result is None:
            raise NotFound(f"the log of run {run_id} has no result of operation {seq_id}")
        return log.kinds[seq_id], await asyncio.shield(result)

    async def withdraw(self, run_id: str, seq_id: int) -> bool:
        """Take an operation that has not started out of the log; its number stays used."""
        log = self._log(run_id)
        entry = log.waiting.get(seq_id)
        if entry is None and seq_id >= log.next_seq_id:
            # Calls to an asyncio actor may overtake each other: withdrawn before it came.
            entry = log.append(seq_id, "skip", {})
        elif entry is None or entry.kind == "skip" or entry.settled:
            return False
        else:
            log.journal.write(records.operation(seq_id, "skip", {}))
        if not entry.settled:  # there was room to write it down
            gone = OpCancelled(f"operation {seq_id} ({entry.kind}) withdrawn")
            entry.kind = "skip"
            log.settle(entry, None, gone, False)
        await asyncio.wait({entry.future})
        return isinstance(entry.future.exception(), OpCancelled)

    def _log(self, run_id: str) -> RunLog:
        log = self.logs.get(run_id)
        if run_id in self.mending or (log is not None and log.failed and not log.taken):
            raise StorageFailure(
                f"the log of run {run_id} cannot be written: its disk is full or broken. Nothing was "
                "done; try again when there is room"
            )
        if run_id in self.taken:
            raise Unavailable(f"another learner has taken over run {run_id}: ask that one")
        if log is None:
            raise NotFound(
                f"run {run_id!r} is not open on this learner; "
                "service.resume_training_client(run_id) opens it again"
            )
        return log

    def _take_heads(self) -> list[tuple[RunLog, Entry]]:
        """The next operation of every run that has it and no batch under way; where learners have
        died of one, that one alone."""
        for log in self.logs.values():
            if log.suspect:
                idle = not self.batches and not self.finishing
                entry = log.take_alone() if idle else None
                return [] if entry is None else [(log, entry)]
        heads = [(log, log.take_head()) for log in self.logs.values()]
        return [(log, entry) for log, entry in heads if entry is not None]

    async def _apply_logs(self) -> None:
        while True:
            while heads := self._take_heads():
                await self._start(heads)
            if self.batches:
                finished_batches = await self._in_engine(self._step)
                self._engage_helpers()
                for finished in finished_batches:
                    log = self.batches.pop(finished.number)
                    entry, log.under_way = log.under_way, None
                    assert entry is not None
                    applied = entry.kind in EFFECTS and finished.error is None
                    log.settle(entry, finished.output, finished.error, applied)
            else:
                self.wake.clear()
                await self.wake.wait()

    async def _start(self, heads: list[tuple[RunLog, Entry]]) -> None:
        """Apply operations of different runs, or, of batches, hand them to the engine."""
        for log, entry in heads:
            if entry.kind == "skip":
                log.settle(entry, None, None, False)
        heads = [(log, entry) for log, entry in heads if entry.kind != "skip"]
        if any(entry.kind == "load_state" for _, entry in heads):
            await self._settle_writes()
        for log, entry in heads:
            self.watch.began(log.run_id, entry.seq_id, entry.kind, entry.future)
        outcomes = await self._in_engine(self._apply_all, heads)
        for (log, entry), outcome in zip(heads, outcomes, strict=True):
            if isinstance(outcome, Exception):
                log.under_way = None
                self._settle(log, entry, None, outcome, False)
                continue
            if entry.kind == "load_state":
                log.rest()  # the checkpoint may be deleted
            if entry.kind in BATCHES:
                self.batches[outcome] = log
            elif isinstance(outcome, Coroutine):
                task = asyncio.create_task(self._finish(log, entry, outcome))
                self.finishing.add(task)
                task.add_done_callback(self._finished)
            else:
                self._settle(log, entry, outcome, None, entry.kind in EFFECTS)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self.finishing.discard(task)
        self.wake.set()

    async def _finish(self, log: RunLog, entry: Entry, outcome: Coroutine[Any, Any, Any]) -> None:
        result, error = None, None
        try:
            result = await outcome
        except (TinsmithError, OSError, ValueError) as failure:
            error = failure
        except BaseException as failure:
            error = TinsmithError(f"{type(failure).__name__}: {failure}")
            raise
        finally:
            self._settle(log, entry, result, error, entry.kind in EFFECTS)

    def _settle(
        self, log: RunLog, entry: Entry, value: Any, error: BaseException | None, applied: bool
    ) -> None:
        if entry.kind == "snapshot":
            log.settle_snapshot(entry, error)
            if error is not None:
                logger.warning("no snapshot of run %s: %s", log.run_id, error)
            return
        log.settle(entry, value, error, applied)

    async def _settle_writes(self) -> None:
        if self.finishing:
            await asyncio.wait(set(self.finishing))

    def _step(self) -> list[Finished]:
        try:
            return self.engine.step()
        except Exception as error:
            failure = TinsmithError(f"the learner's pass failed: {type(error).__name__}: {error}")
            failure.__cause__ = error
            return self.engine.fail_all(failure)

    def _apply_all(self, heads: list[tuple[RunLog, Entry]]) -> list[Any]:
        """Runs in the engine's thread. For each operation: what it raised, its result, a coroutine
        that finishes it outside, or, for a batch, the engine's number."""
        due = {
            log.run_id: entry.args["adam_params"]
            for log, entry in heads
            if entry.kind == "optim_step"
        }
        steps = self._steps(due) if due else {}
        outcomes: list[Any] = []
        for log, entry in heads:
            log.given_before = entry.settled
            try:
                outcomes.append(self._apply(log, entry, steps))
            except Exception as error:
                outcomes.append(error)
        return outcomes

    def _steps(self, due: Mapping[str, AdamParams]) -> Mapping[str, OptimStepResponse]:
        """Optimizer steps, if all these runs can take them together; else none."""
        with contextlib.suppress(OutOfCapacity, NotFound):
            return dict(zip(due, self.engine.optim_steps(due), strict=True))
        return {}

    def _apply(self, log: RunLog, entry: Entry, steps: Mapping[str, OptimStepResponse]) -> Any:
        if entry.kind in BATCHES:
            return self.engine.submit(
                log.run_id,
                **entry.args,
                backward=entry.kind == "forward_backward",
                arrived=entry.arrived,
            )
        if entry.kind == "optim_step":
            step = steps.get(log.run_id) or self.engine.optim_step(log.run_id, **entry.args)
            return self._with_publication(log, step)
        apply = getattr(self, f"_op_{entry.kind}", None)
        if apply is None:
            raise InvalidInput(f"unknown operation {entry.kind!r}")
        return apply(log, **entry.args)

    # ---- operations ----

    def _op_publish(
        self, log: RunLog, keep: bool, every_step: bool
    ) -> Coroutine[Any, Any, PublishResponse] | None:
        """Make the weights the run's newest. `keep` holds this version for clients pinned to it
        when newer ones come; `every_step` publishes after every later step too."""
        log.publish_steps, log.published = log.publish_steps or every_step, True
        if log.given_before:
            return None
        return self._publication(log, keep, None if every_step else log.next_seq_id - 1)

    def _op_snapshot(self, log: RunLog, seconds: float, **about: Any) -> Coroutine[Any, Any, None]:
        state, version, share = self._whole_state(log.run_id)
        lora = self.engine.runs[log.run_id].config

        async def write() -> None:
            # What is under way before it, as saving, has its result in the log or in here.
            before = about["next_seq_id"]
            waiting = {f for i, f in log.results.items() if i < before and not f.done()}
            if waiting:
                there = asyncio.create_task(asyncio.wait(waiting))
                ends: set[asyncio.Future[Any]] = {there, log.over}
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            await log.on_disk()
            results = log.journal.results(before)
            all_about = About(log.run_key, lora, version, share, results=results, **about)
            await asyncio.to_thread(log.journal.save, all_about, state)

        return write()

    def _op_set_share(self, log: RunLog, share: float) -> None:
        self.engine.queue.weights[log.run_id] = share

    def _op_get_info(self, log: RunLog) -> TrainingInfo:
        backbone, run = self.engine.backbone, self.engine.runs[log.run_id]
        return TrainingInfo(
            log.run_id,
            self.base_model,
            self.model_path,
            run.config,
            run.version,
            backbone.max_context,
            backbone.vocab_size,
            run.layout.size,
            backbone.weights,
        )

    def _op_save_state(self, log: RunLog, name: str, **how: Any) -> Any:
        return self._save(log, CheckpointPath(log.run_id, "weights", name), **how)

    def _op_save_weights_for_sampler(self, log: RunLog, name: str, **how: Any) -> Any:
        return self._save(log, CheckpointPath(log.run_id, "sampler_weights", name), **how)

    def _op_save_weights_external(self, log: RunLog, name: str, **how: Any) -> Any:
        return self._save(log, CheckpointPath(log.run_id, "external_weights", name), **how)

    def _op_load_state(self, log: RunLog, path: str, optimizer: bool) -> Any:
        self._load_checkpoint(log.run_id, path, optimizer, False)
        return self._with_publication(log, SaveResponse(path))

    # ---- publishing and checkpoints ----

    async def _sampler(self) -> Handle:
        if self.sampler is None:
            self.sampler = await Op(self.controller.call("sampler_handle", self.base_model))
        assert self.sampler is not None
        return self.sampler

    async def _hand_out(self, work: Callable[[Handle], Coroutine[Any, Any, None]]) -> None:
        """`work` with the samplers; if they die under it, with those that take their place.

        Raises:
            Unavailable: they cannot be started, or live and have failed.
        """
        while True:
            sampler = await self._sampler()
            try:
                return await work(sampler)
            except Unavailable:
                self.sampler = None
                if await self._sampler() == sampler:
                    raise

    async def publish_again(self, run_id: str, sampler: Handle | None = None) -> None:
        """Give the samplers (`sampler`, if others took their place) what the run has published, if
        they were started anew."""
        self.sampler = sampler or self.sampler
        await self._publish_again(self._log(run_id))

    async def _publish_again(self, log: RunLog) -> None:
        async def refill(sampler: Handle) -> None:
            if await self._refill(log, sampler) and log.publish_steps:
                newest = await self._in_engine(self._weights, log.run_id)
                await log.on_disk()
                await Op(sampler.call("add_adapter", log.run_id, *newest, False))

        if log.published:
            async with log.publishing:
                await self._hand_out(refill)

    async def _refill(self, log: RunLog, sampler: Handle) -> bool:
        """Samplers that hold nothing of a run get the weights that it published by operations of
        their own, before they get anything newer. Whether they held nothing."""
        if log.holder == sampler:
            return False
        empty = await Op(sampler.call("latest_version", log.run_id)) is None
        if empty:
            config = self.engine.runs[log.run_id].config
            saved = log.journal.published.read()
            while (weights := await asyncio.to_thread(next, saved, None)) is not None:
                version, flat, keep = weights
                await Op(sampler.call("add_adapter", log.run_id, version, config, flat, keep))
        log.holder = sampler
        return empty

    def _weights(self, run_id: str) -> tuple[int, LoraConfig, np.ndarray]:
        """Version, configuration and parameters, as they are now."""
        run = self.engine.runs[run_id]
        return run.version, run.config, self.engine.export(run_id).numpy()

    def _with_publication(self, log: RunLog, response: Any) -> Any:
        """`response`, once the weights that came with it are published, if they are to be."""
        if not log.publish_steps or log.given_before:
            return response
        publication = self._publication(log, keep=False)

        async def publish() -> Any:
            published = await publication
            if isinstance(response, OptimStepResponse):
                metrics = {**response.metrics, "publish_s": published.seconds}
                return replace(response, metrics=metrics)
            return response

        return publish()

    def _publication(
        self, log: RunLog, keep: bool, saved_as: int | None = None
    ) -> Coroutine[Any, Any, PublishResponse]:
        """`saved_as`: also write the weights beside the log, under that operation's number."""
        run_id = log.run_id
        version, config, flat = self._weights(run_id)

        async def add(sampler: Handle) -> None:
            await self._refill(log, sampler)
            await Op(sampler.call("add_adapter", run_id, version, config, flat, keep))

        async def send() -> PublishResponse:
            started = time.perf_counter()
            # A run's versions reach the sampler in order: the last to arrive is what is live.
            await log.on_disk()
            async with log.publishing:
                log.check_claim()
                if saved_as is not None:
                    await asyncio.gather(
                        asyncio.to_thread(
                            log.journal.published.save, saved_as, version, flat, keep
                        ),
                        self._hand_out(add),
                    )
                else:
                    await self._hand_out(add)
            return PublishResponse(version, time.perf_counter() - started)

        return send()

    def _save(
        self,
        log: RunLog,
        path: CheckpointPath,
        user_metadata: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        ttl_seconds: int | None = None,
    ) -> Coroutine[Any, Any, SaveResponse]:
        check_ttl(ttl_seconds)
        metadata = dict(user_metadata or {})
        run = self.engine.runs[path.run_id]
        if path.kind == "weights":
            state = self.engine.state(path.run_id)
        else:
            state = {"params": self.engine.export(path.run_id)}
        version, layout = run.version, run.layout
        seq_id = log.next_seq_id - 1
        operation = f"{log.run_key}:{seq_id}"
        manifest = Manifest(self.base_model, run.config, version, metadata, operation)

        def write() -> tuple[Checkpoint, str]:
            params = state.pop("params")
            files = adapter_files.write_adapter(layout, params, self.base_model)
            if state:
                files["optimizer.safetensors"] = safetensors.torch.save(state)
            files[MANIFEST] = json.dumps(asdict(manifest), indent=1).encode()
            staged, now = self.storage.stage(path.folder, files), time.time()
            checkpoint = Checkpoint(
                str(path),
                path.run_id,
                path.kind,
                path.name,
                version,
                now,
                sum(map(len, files.values())),
                metadata,
                None if ttl_seconds is None else now + ttl_seconds,
            )
            return checkpoint, staged

        async def save() -> SaveResponse:
            # A learner that died may have saved it, before it could write that down.
            if seq_id <= log.replayed and await self._is_saved(path, operation):
                return SaveResponse(str(path))
            await log.on_disk()
            async with self.writing:  # in order: of two saves by one name the later one stays
                checkpoint, staged = await asyncio.to_thread(write)
                # The controller alone gives out names: saving, copying and deleting cannot collide.
                log.check_claim()
                await Op(self.controller.call("add_checkpoint", checkpoint, staged, overwrite))
            return SaveResponse(str(path))

        return save()

    async def _is_saved(self, path: CheckpointPath, operation: str) -> bool:
        try:
            await Op(self.controller.call("get_checkpoint", str(path)))
            manifest = await asyncio.to_thread(self.storage.read_manifest, str(path))
        except NotFound:
            return False
        return manifest.get("operation") == operation

    def _load_checkpoint(self, run_id: str, path: str, optimizer: bool, resume: bool) -> None:
        """Load weights (and optimizer); `resume` also takes over the checkpoint's version."""
        files, told = self.storage.read_checkpoint(path)
        manifest = Manifest.of(path, told)
        if manifest.base_model != self.base_model:
            raise InvalidInput(
                f"{path} was trained on {manifest.base_model!r}, this run on {self.base_model!r}"
            )
        run = self.engine.runs[run_id]
        params = adapter_files.read_adapter(files, run.layout)
        state = None
        if optimizer:
            if "optimizer.safetensors" not in files:
                raise InvalidInput(f"{path} holds no optimizer state: it was saved for sampling")
            state = read_tensors(files["optimizer.safetensors"], f"the optimizer state of {path}")
            check_state(state, run.params, path)
        self.engine.load(run_id, params, state, manifest.version if resume else None)


def _pass_on(future: asyncio.Future[Any], done: asyncio.Future[Any]) -> None:
    if not future.done() and not done.cancelled():
        error = done.exception()
        finish(future, None if error else done.result(), error)
