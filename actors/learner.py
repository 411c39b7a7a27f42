"""The Learner actor: every run's log of operations, applied in order, exactly once.

Clients number their operations; an operation that arrives early waits for its turn, one that
arrives twice gets the recorded result. One thread owns the engine; saving and publishing copy
what they need in that thread and finish outside it, so that training goes on meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import OrderedDict
from collections.abc import Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import safetensors.torch

from ..engines import adapter_files
from ..engines.backbone import Backbone
from ..engines.base_weights import BaseWeights
from ..engines.learner import LearnerEngine
from ..engines.models import copies_folder
from ..primitives.errors import InvalidInput, NotFound, OpCancelled, TinsmithError, Unavailable
from ..primitives.op import Handle, Op
from ..primitives.paths import CheckpointPath
from ..primitives.types import (
    Checkpoint,
    LoraConfig,
    PublishResponse,
    SaveResponse,
    TrainingInfo,
)
from ..primitives.validation import check_ttl
from .storage import MANIFEST, Storage
from .threads import engine_device, set_engine_threads

RESULTS_KEPT = 4096
PARKED = "state.safetensors"


def parked_folder(run_id: str) -> str:
    """Below the storage root: where a run waits for its learner to be started again."""
    return f"runs/{run_id}/parked"


@dataclass
class Entry:
    kind: str
    args: dict[str, Any]
    future: asyncio.Future[Any]


@dataclass
class RunLog:
    """One run's operations: those waiting by number, and the results of those applied.
    `publish_steps`: every operation that changes the weights publishes them."""

    run_id: str
    next_seq_id: int = 1
    publish_steps: bool = False
    publishing: asyncio.Lock = field(default_factory=asyncio.Lock)
    waiting: dict[int, Entry] = field(default_factory=dict)
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
        weights: BaseWeights = "auto",
    ) -> None:
        self.base_model = base_model
        self.model_path = model_path
        self.storage = Storage(storage_root)
        self.controller = controller
        self.num_threads = num_threads
        self.weights: BaseWeights = weights
        self.copies = copies_folder(storage_root)
        self.logs: dict[str, RunLog] = {}
        self.turn: list[str] = []
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
        await self._in_engine(self._load)
        self.pump = asyncio.create_task(self._apply_logs())

    async def ping(self) -> str:
        return self.base_model

    def _load(self) -> None:
        set_engine_threads(self.num_threads)
        backbone = Backbone(self.model_path, self.weights, engine_device(), copies=self.copies)
        self.engine = LearnerEngine(backbone)

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
        self.turn.append(run_id)
        return next_seq_id

    async def open_runs(self) -> list[str]:
        return list(self.logs)

    async def next_seq_id(self, run_id: str) -> int:
        """
        Raises:
            NotFound: the run is not open here.
        """
        return self._log(run_id).next_seq_id

    async def park(self, run_id: str) -> None:
        """Write down a run as it is, half-accumulated gradient and all, for `unpark`."""
        log = self._log(run_id)
        state = await self._in_engine(self.engine.state, run_id, True)
        run = self.engine.runs[run_id]
        manifest = {
            "lora": asdict(run.config),
            "version": run.version,
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

    async def unpark(self, run_id: str) -> int:
        """Open a parked run exactly as it was, its weights published; returns the number of its
        next operation.

        Raises:
            NotFound: it is not parked.
        """
        folder = parked_folder(run_id)
        files = await asyncio.to_thread(self.storage.read, folder)
        manifest, state = json.loads(files[MANIFEST]), safetensors.torch.load(files[PARKED])
        await self._in_engine(self.engine.create_run, run_id, LoraConfig(**manifest["lora"]))
        params, version = state.pop("params"), manifest["version"]
        await self._in_engine(self.engine.load, run_id, params, state, version)
        log = RunLog(run_id, manifest["next_seq_id"], manifest["publish_steps"])
        self.logs[run_id] = log
        self.turn.append(run_id)
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
        self.turn.remove(run_id)
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

    def _next_ready(self) -> RunLog | None:
        """The next run, in turn, whose next operation is here."""
        for position, run_id in enumerate(self.turn):
            log = self.logs[run_id]
            if log.next_seq_id in log.waiting:
                self.turn.append(self.turn.pop(position))
                return log
        return None

    async def _apply_logs(self) -> None:
        while True:
            log = self._next_ready()
            if log is None:
                self.wake.clear()
                await self.wake.wait()
                continue
            entry = log.waiting.pop(log.next_seq_id)
            log.next_seq_id += 1
            if entry.kind == "skip":
                if not entry.future.done():
                    entry.future.set_result(None)
                continue
            try:
                if entry.kind == "load_state":
                    await self._settle_writes()
                outcome = await self._in_engine(self._apply, log, entry)
            except Exception as error:
                entry.future.set_exception(error)
                continue
            if isinstance(outcome, Coroutine):
                task = asyncio.create_task(_finish(outcome, entry.future))
                self.finishing.add(task)
                task.add_done_callback(self.finishing.discard)
            else:
                entry.future.set_result(outcome)

    async def _settle_writes(self) -> None:
        if self.finishing:
            await asyncio.wait(set(self.finishing))

    def _apply(self, log: RunLog, entry: Entry) -> Any:
        """Runs in the engine's thread: the result, or a coroutine that finishes outside it."""
        apply = getattr(self, f"_op_{entry.kind}", None)
        if apply is None:
            raise InvalidInput(f"unknown operation {entry.kind!r}")
        return apply(log, **entry.args)

    # ---- operations ----

    def _op_forward(self, log: RunLog, **args: Any) -> Any:
        return self.engine.forward(log.run_id, **args)

    def _op_forward_backward(self, log: RunLog, **args: Any) -> Any:
        return self.engine.forward_backward(log.run_id, **args)

    def _op_optim_step(self, log: RunLog, adam_params: Any) -> Any:
        return self._with_publication(log, self.engine.optim_step(log.run_id, adam_params))

    def _op_publish(
        self, log: RunLog, keep: bool, every_step: bool
    ) -> Coroutine[Any, Any, PublishResponse]:
        """Make the weights the run's newest. `keep` holds this version for clients pinned to it
        when newer ones come; `every_step` publishes after every later step too."""
        log.publish_steps = log.publish_steps or every_step
        return self._publication(log.run_id, keep)

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
            await publication
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
