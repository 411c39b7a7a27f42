"""The Learner actor: every run's log of operations, applied in order, exactly once.

Clients number their operations; an operation that arrives early waits for its turn, one that
arrives twice gets the recorded result. The heads of all logs are taken between two passes of the
engine, which computes the batches among them together. One thread owns the engine; saving and
publishing copy what they need in that thread and finish outside it, so that training goes on
meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import OrderedDict
from collections.abc import Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from ..engines import adapter_files
from ..engines.backbone import Backbone
from ..engines.base_weights import BaseWeights
from ..engines.layout import Layout
from ..engines.learner import Finished, LearnerEngine
from ..engines.memory import state_bytes
from ..engines.memory_budget import available_bytes
from ..engines.models import copies_folder
from ..engines.passes import Group, PassRunner
from ..primitives.errors import (
    InvalidInput,
    NotFound,
    OpCancelled,
    OutOfCapacity,
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
from .storage import MANIFEST, Storage
from .threads import engine_device, set_engine_threads

RESULTS_KEPT = 4096
BATCHES = ("forward", "forward_backward")  # what takes passes of the engine
PARKED = "state.safetensors"


def parked_folder(run_id: str) -> str:
    """Below the storage root: where a run waits for its learner to be started again."""
    return f"runs/{run_id}/parked"


@dataclass
class Entry:
    kind: str
    args: dict[str, Any]
    future: asyncio.Future[Any]
    arrived: float = field(default_factory=time.perf_counter)


@dataclass
class RunLog:
    """One run's operations: those waiting by number, the batch under way, and the results of those
    applied. `publish_steps`: every operation that changes the weights publishes them."""

    run_id: str
    next_seq_id: int = 1
    publish_steps: bool = False
    publishing: asyncio.Lock = field(default_factory=asyncio.Lock)
    waiting: dict[int, Entry] = field(default_factory=dict)
    under_way: Entry | None = None
    results: OrderedDict[int, asyncio.Future[Any]] = field(default_factory=OrderedDict)


class Learner:
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
    ) -> None:
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
        if run_id in self.logs:
            await self.close_run(run_id)
        await self._in_engine(self.engine.create_run, run_id, lora)
        try:
            if path is not None:
                await self._settle_writes()
                await self._in_engine(self._load_checkpoint, run_id, path, optimizer, True)
        except BaseException:
            await self._in_engine(self.engine.drop_run, run_id)
            raise
        self.logs[run_id] = RunLog(run_id, next_seq_id)
        return next_seq_id

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
        """Write down a run as it is, half-accumulated gradient and all, for `unpark`."""
        log = self._log(run_id)
        while log.under_way is not None:
            await asyncio.wait({log.under_way.future})
        state, about = await self._in_engine(self._whole_state, run_id)
        manifest = {
            **about,
            "next_seq_id": log.next_seq_id,
            "publish_steps": log.publish_steps,
        }
        files = {
            PARKED: safetensors.torch.save(state),
            MANIFEST: json.dumps(manifest, indent=1).encode(),
        }
        folder = parked_folder(run_id)
        staged = await asyncio.to_thread(self.storage.stage, folder, files)
        await asyncio.to_thread(self.storage.commit, staged, folder)

    def _whole_state(self, run_id: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        run, share = self.engine.runs[run_id], self.engine.queue.weights[run_id]
        about = {"lora": asdict(run.config), "version": run.version, "share": share}
        return self.engine.state(run_id, True), about

    async def unpark(self, run_id: str) -> int:
        """Open a parked run exactly as it was, its weights published; returns the number of its
        next operation.

        Raises:
            NotFound: it is not parked.
        """
        folder = parked_folder(run_id)
        files = await asyncio.to_thread(self.storage.read, folder)
        manifest, state = json.loads(files[MANIFEST]), safetensors.torch.load(files[PARKED])
        lora, share = LoraConfig(**manifest["lora"]), manifest["share"]
        await self._in_engine(self.engine.create_run, run_id, lora, share)
        params, version = state.pop("params"), manifest["version"]
        await self._in_engine(self.engine.load, run_id, params, state, version)
        log = RunLog(run_id, manifest["next_seq_id"], manifest["publish_steps"])
        self.logs[run_id] = log
        await (await self._in_engine(self._publication, run_id, False))
        await asyncio.to_thread(self.storage.delete, folder)
        return log.next_seq_id

    async def take_over(self, run_id: str) -> int | None:
        """Where a new client's operations go on, after all that has arrived; None if the run is
        not open. Numbers that the client before it took but never sent are passed over."""
        log = self.logs.get(run_id)
        if log is None:
            return None
        following = max([log.next_seq_id - 1, *log.waiting]) + 1
        for seq_id in range(log.next_seq_id, following):
            if seq_id not in log.waiting:
                future = self._append(log, seq_id, "skip", {})
                future.set_exception(OpCancelled(f"another client took over run {run_id}"))
        return following

    async def close_run(self, run_id: str) -> None:
        """Free a run's memory. Operations still waiting fail."""
        log = self.logs.pop(run_id, None)
        if log is None:
            return
        for entry in log.waiting.values():
            if not entry.future.done():
                entry.future.set_exception(NotFound(f"run {run_id} was closed"))
        await self._in_engine(self.engine.drop_run, run_id)
        async with log.publishing:  # what is on its way to the sampler arrives before it is dropped
            if self.sampler is not None:
                with contextlib.suppress(Unavailable):  # a dead one holds nothing
                    await Op(self.sampler.call("drop_run", run_id))

    async def settle(self) -> None:
        """Wait until what is being saved is saved."""
        await self._settle_writes()

    # ---- the log ----

    async def submit(self, run_id: str, seq_id: int, kind: str, args: dict[str, Any]) -> Any:
        """Append operation `seq_id` to a run's log and wait for its result."""
        log = self._log(run_id)
        future = log.results.get(seq_id)
        if future is None:
            if seq_id < log.next_seq_id:
                raise InvalidInput(
                    f"operation {seq_id} of run {run_id} was applied before; "
                    f"its result is no longer kept (next is {log.next_seq_id})"
                )
            future = self._append(log, seq_id, kind, args)
        return await asyncio.shield(future)

    def _append(
        self, log: RunLog, seq_id: int, kind: str, args: dict[str, Any]
    ) -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        # A result that no caller waits for any more is not an unhandled error.
        future.add_done_callback(lambda f: f.cancelled() or f.exception())
        log.waiting[seq_id] = Entry(kind, args, future)
        log.results[seq_id] = future
        while len(log.results) > RESULTS_KEPT and next(iter(log.results.values())).done():
            log.results.popitem(last=False)
        self.wake.set()
        return future

    async def withdraw(self, run_id: str, seq_id: int) -> bool:
        """Take an operation that has not started out of the log; its number stays used."""
        log = self._log(run_id)
        entry = log.waiting.get(seq_id)
        if entry is None and seq_id >= log.next_seq_id:
            # Calls to an asyncio actor may overtake each other: withdrawn before it came.
            self._append(log, seq_id, "operation", {})
            entry = log.waiting[seq_id]
        if entry is None or entry.kind == "skip":
            return False
        entry.future.set_exception(OpCancelled(f"operation {seq_id} ({entry.kind}) withdrawn"))
        entry.kind = "skip"
        return True

    def _log(self, run_id: str) -> RunLog:
        log = self.logs.get(run_id)
        if log is None:
            raise NotFound(
                f"run {run_id!r} is not open on this learner; "
                "service.resume_training_client(run_id) opens it from its newest checkpoint"
            )
        return log

    def _take_heads(self) -> list[tuple[RunLog, Entry]]:
        """The next operation of every run that has it and no batch under way."""
        heads = []
        for log in self.logs.values():
            if log.under_way is None and log.next_seq_id in log.waiting:
                entry = log.waiting.pop(log.next_seq_id)
                log.next_seq_id += 1
                log.under_way = entry if entry.kind in BATCHES else None
                heads.append((log, entry))
        return heads

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
                    _settle(entry.future, finished.output, finished.error)
            else:
                self.wake.clear()
                await self.wake.wait()

    async def _start(self, heads: list[tuple[RunLog, Entry]]) -> None:
        """Apply operations of different runs, or, of batches, hand them to the engine."""
        for _, entry in heads:
            if entry.kind == "skip" and not entry.future.done():
                entry.future.set_result(None)
        heads = [(log, entry) for log, entry in heads if entry.kind != "skip"]
        if any(entry.kind == "load_state" for _, entry in heads):
            await self._settle_writes()
        outcomes = await self._in_engine(self._apply_all, heads)
        for (log, entry), outcome in zip(heads, outcomes, strict=True):
            if isinstance(outcome, Exception):
                log.under_way = None
                entry.future.set_exception(outcome)
            elif entry.kind in BATCHES:
                self.batches[outcome] = log
            elif isinstance(outcome, Coroutine):
                task = asyncio.create_task(_finish(outcome, entry.future))
                self.finishing.add(task)
                task.add_done_callback(self.finishing.discard)
            else:
                entry.future.set_result(outcome)

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
    ) -> Coroutine[Any, Any, PublishResponse]:
        """Make the weights the run's newest. `keep` holds this version for clients pinned to it
        when newer ones come; `every_step` publishes after every later step too."""
        log.publish_steps = log.publish_steps or every_step
        return self._publication(log.run_id, keep)

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
        return self._save(CheckpointPath(log.run_id, "weights", name), **how)

    def _op_save_weights_for_sampler(self, log: RunLog, name: str, **how: Any) -> Any:
        return self._save(CheckpointPath(log.run_id, "sampler_weights", name), **how)

    def _op_save_weights_external(self, log: RunLog, name: str, **how: Any) -> Any:
        return self._save(CheckpointPath(log.run_id, "external_weights", name), **how)

    def _op_load_state(self, log: RunLog, path: str, optimizer: bool) -> Any:
        self._load_checkpoint(log.run_id, path, optimizer, False)
        return self._with_publication(log, SaveResponse(path))

    # ---- publishing and checkpoints ----

    async def _sampler(self) -> Handle:
        if self.sampler is None:
            self.sampler = await Op(self.controller.call("sampler_handle", self.base_model))
        assert self.sampler is not None
        return self.sampler

    def _with_publication(self, log: RunLog, response: Any) -> Any:
        """`response`, once the weights that came with it are published, if they are to be."""
        if not log.publish_steps:
            return response
        publication = self._publication(log.run_id, keep=False)

        async def publish() -> Any:
            published = await publication
            if isinstance(response, OptimStepResponse):
                metrics = {**response.metrics, "publish_s": published.seconds}
                return replace(response, metrics=metrics)
            return response

        return publish()

    def _publication(self, run_id: str, keep: bool) -> Coroutine[Any, Any, PublishResponse]:
        run = self.engine.runs[run_id]
        flat, version, config = self.engine.export(run_id).numpy(), run.version, run.config

        async def send() -> PublishResponse:
            started = time.perf_counter()
            # A run's versions reach the sampler in order: the last to arrive is what is live.
            async with self._log(run_id).publishing:
                sampler = await self._sampler()
                try:
                    await Op(sampler.call("add_adapter", run_id, version, config, flat, keep))
                except Unavailable:
                    self.sampler = None  # the next publication goes to its successor
                    raise
            return PublishResponse(version, time.perf_counter() - started)

        return send()

    def _save(
        self,
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
        manifest = {
            "base_model": self.base_model,
            "lora": asdict(run.config),
            "version": version,
            "user_metadata": metadata,
        }

        def write() -> tuple[Checkpoint, str]:
            params = state.pop("params")
            files = adapter_files.write_adapter(layout, params, self.base_model)
            if state:
                files["optimizer.safetensors"] = safetensors.torch.save(state)
            files[MANIFEST] = json.dumps(manifest, indent=1).encode()
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
            async with self.writing:  # in order: of two saves by one name the later one stays
                checkpoint, staged = await asyncio.to_thread(write)
                # The controller alone gives out names: saving, copying and deleting cannot collide.
                await Op(self.controller.call("add_checkpoint", checkpoint, staged, overwrite))
            return SaveResponse(str(path))

        return save()

    def _load_checkpoint(self, run_id: str, path: str, optimizer: bool, resume: bool) -> None:
        """Load weights (and optimizer); `resume` also takes over the checkpoint's version."""
        files, manifest = self.storage.read_checkpoint(path)
        if manifest["base_model"] != self.base_model:
            raise InvalidInput(
                f"{path} was trained on {manifest['base_model']!r}, this run on {self.base_model!r}"
            )
        run = self.engine.runs[run_id]
        params = adapter_files.read_adapter(files, run.layout)
        state = None
        if optimizer:
            if "optimizer.safetensors" not in files:
                raise InvalidInput(f"{path} holds no optimizer state: it was saved for sampling")
            state = safetensors.torch.load(files["optimizer.safetensors"])
        self.engine.load(run_id, params, state, manifest["version"] if resume else None)


def _settle(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


async def _finish(outcome: Coroutine[Any, Any, Any], future: asyncio.Future[Any]) -> None:
    try:
        result = await outcome
    except (TinsmithError, OSError, ValueError) as error:
        future.set_exception(error)
    except BaseException as error:
        future.set_exception(TinsmithError(f"{type(error).__name__}: {error}"))
        raise
    else:
        future.set_result(result)
