"""The Controller actor: knows every run and checkpoint, and starts what serves them.

It hands out grants (handles to learners and samplers); the work itself never passes through it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import ray

from ..algorithms.losses import loss_names
from ..engines import models
from ..engines.backbone import SUPPORTED_FAMILIES
from ..primitives.client import RunGrant, SamplerGrant
from ..primitives.errors import InvalidInput, NotFound, Unavailable
from ..primitives.op import Op
from ..primitives.paths import CheckpointPath
from ..primitives.types import (
    Checkpoint,
    LoraConfig,
    PolicyRef,
    ServerCapabilities,
    SupportedModel,
    TrainingRun,
    expiry,
)
from .env_worker import EnvWorker
from .handle import RayHandle
from .learner import Learner, parked_folder
from .registry import Registry
from .sampler import Sampler
from .storage import Storage
from .threads import ENGINE_ENV

# Waiting operations are coroutines of the actor: let hundreds of clients keep hundreds each.
MAX_WAITING_CALLS = 100_000
EXPIRY_PAUSE_S = 60.0


class Controller:
    def __init__(
        self,
        home: str,
        learner_threads: int | None = None,
        sampler_threads: int | None = None,
        kv_bytes: int | None = None,
    ) -> None:
        self.home = home
        self.registry = Registry(f"{home}/registry.sqlite")
        self.storage = Storage(home)
        self.learner_threads = learner_threads
        self.sampler_threads = sampler_threads
        self.kv_bytes = kv_bytes
        self.started: dict[tuple[str, str], asyncio.Task[RayHandle]] = {}
        self.models: dict[str, tuple[str, str]] = {}
        self.env_workers_running: list[RayHandle] = []
        self.creating: set[str] = set()
        self.expiring: asyncio.Task[None] | None = None

    async def ping(self) -> str:
        if self.expiring is None:
            self.expiring = asyncio.create_task(self._delete_expired())
        return self.home

    # ---- starting actors ----

    async def _model(self, base_model: str) -> tuple[str, str]:
        """The name and the folder of a base model, which may have been asked for by either."""
        if base_model not in self.models:
            path = await asyncio.to_thread(models.resolve_model, base_model, self.home)
            path = path.resolve()
            facts = await asyncio.to_thread(models.model_facts, path)
            if facts.family not in SUPPORTED_FAMILIES:
                raise InvalidInput(
                    f"base model {base_model!r} is of family {facts.family!r}; "
                    f"supported: {', '.join(SUPPORTED_FAMILIES)}"
                )
            self.models[base_model] = (models.model_name(path, self.home), str(path))
        return self.models[base_model]

    async def _running(
        self, kind: str, path: str, start: Callable[[], Coroutine[Any, Any, RayHandle]]
    ) -> RayHandle:
        """The actor of that kind for that model folder, started by whoever asks first; one that
        has died is replaced."""
        key = (kind, path)
        while True:
            starting = key not in self.started
            if starting:
                self.started[key] = asyncio.create_task(start())
            task = self.started[key]
            try:
                handle = await asyncio.shield(task)
                await Op(handle.call("ping"))
                return handle
            except Exception as error:
                if self.started.get(key) is task:
                    del self.started[key]
                if starting or not isinstance(error, Unavailable):
                    raise

    async def _learner(self, base_model: str) -> RayHandle:
        name, path = await self._model(base_model)
        me = RayHandle(ray.get_runtime_context().current_actor, "controller")

        async def start() -> RayHandle:
            actor = (
                ray.remote(Learner)
                .options(num_cpus=0, max_concurrency=MAX_WAITING_CALLS, runtime_env=ENGINE_ENV)
                .remote(name, path, self.home, me, self.learner_threads)
            )
            handle = RayHandle(actor, "learner")
            await Op(handle.call("start"))
            return handle

        return await self._running("learner", path, start)

    async def sampler_handle(self, base_model: str) -> RayHandle:
        name, path = await self._model(base_model)

        async def start() -> RayHandle:
            actor = (
                ray.remote(Sampler)
                .options(num_cpus=0, max_concurrency=MAX_WAITING_CALLS, runtime_env=ENGINE_ENV)
                .remote(
                    path,
                    name=name,
                    num_threads=self.sampler_threads,
                    kv_bytes=self.kv_bytes,
                )
            )
            return RayHandle(actor, "sampler")

        return await self._running("sampler", path, start)

    async def env_workers(self, base_model: str, count: int, max_concurrent: int) -> list[Any]:
        if count < 1:
            raise InvalidInput(f"num_workers must be at least 1, got {count}")
        _, path = await self._model(base_model)
        workers = [
            RayHandle(
                ray.remote(EnvWorker)
                .options(num_cpus=0, max_concurrency=MAX_WAITING_CALLS, max_restarts=-1)
                .remote(path, max_concurrent=max_concurrent),
                "environment worker",
            )
            for _ in range(count)
        ]
        self.env_workers_running += workers
        return workers

    async def end_env_workers(self, workers: list[RayHandle]) -> None:
        ended = {worker.actor for worker in workers}
        for worker in workers:
            ray.kill(worker.actor)
        self.env_workers_running = [w for w in self.env_workers_running if w.actor not in ended]

    # ---- runs ----

    async def create_run(
        self,
        run_id: str,
        base_model: str | None,
        lora: LoraConfig | None,
        path: str | None,
        optimizer: bool,
        user_metadata: dict[str, Any],
    ) -> RunGrant:
        """A new run on `base_model` under `lora`, or from the checkpoint `path`.

        Raises:
            InvalidInput: there is a run of that id.
        """
        if run_id in self.creating or self.registry.has_run(run_id):
            raise InvalidInput(f"there is a run {run_id!r} already")
        self.creating.add(run_id)
        try:
            return await self._create_run(run_id, base_model, lora, path, optimizer, user_metadata)
        finally:
            self.creating.discard(run_id)

    async def _create_run(
        self,
        run_id: str,
        base_model: str | None,
        lora: LoraConfig | None,
        path: str | None,
        optimizer: bool,
        user_metadata: dict[str, Any],
    ) -> RunGrant:
        if path is not None:
            _, manifest = await asyncio.to_thread(self.storage.read_checkpoint, path)
            base_model, lora = manifest["base_model"], LoraConfig(**manifest["lora"])
        assert base_model is not None
        assert lora is not None
        name, model_path = await self._model(base_model)
        learner = await self._learner(base_model)
        first = await Op(learner.call("open_run", run_id, lora, path, optimizer))
        now = time.time()
        self.registry.add_run(TrainingRun(run_id, name, lora, now, now, user_metadata))
        return RunGrant(run_id, name, model_path, learner, first)

    async def resume_run(self, run_id: str, path: str | None, next_seq_id: int = 1) -> RunGrant:
        """Go on with a run; opened from a checkpoint, its operations count from `next_seq_id`."""
        run = self.registry.run(run_id)
        learner = await self._learner(run.base_model)
        following = await Op(learner.call("take_over", run_id))
        if path is not None or following is None:
            if path is None:
                checkpoints = self.registry.checkpoints(run_id, "weights")
                if not checkpoints:
                    raise NotFound(f"run {run_id!r} is not in memory and has no saved state")
                path = checkpoints[0].path
            following = await Op(
                learner.call("open_run", run_id, run.lora, path, True, next_seq_id)
            )
        self.registry.touch_run(run_id)
        name, model_path = await self._model(run.base_model)
        return RunGrant(run_id, name, model_path, learner, following)

    async def list_runs(self) -> list[TrainingRun]:
        return self.registry.runs()

    async def get_run(self, run_id: str) -> TrainingRun:
        return self.registry.run(run_id)

    async def park_runs(self) -> None:
        """Write down all runs in memory, as they are, before the cluster ends."""
        for (kind, _), task in list(self.started.items()):
            if kind == "learner":
                with contextlib.suppress(Unavailable):  # a dead one holds nothing
                    learner = await asyncio.shield(task)
                    for run_id in await Op(learner.call("open_runs")):
                        await Op(learner.call("park", run_id))

    async def reopen_run(self, run_id: str) -> RunGrant:
        """Go on with a run exactly where it is: in memory, or parked.

        Raises:
            NotFound: no such run, or it is neither.
        """
        run = self.registry.run(run_id)
        name, path = await self._model(run.base_model)
        started = self.started.get(("learner", path))
        if started is not None:
            with contextlib.suppress(NotFound, Unavailable):
                learner = await asyncio.shield(started)
                following = await Op(learner.call("next_seq_id", run_id))
                return RunGrant(run_id, name, path, learner, following)
        if not await asyncio.to_thread(self.storage.exists, parked_folder(run_id)):
            raise NotFound(f"run {run_id!r} is neither in memory nor parked")
        learner = await self._learner(run.base_model)
        following = await Op(learner.call("unpark", run_id))
        return RunGrant(run_id, name, path, learner, following)

    async def close_run(self, run_id: str) -> None:
        """Free a run's memory; what is saved of it stays."""
        self.registry.run(run_id)
        for (kind, _), task in list(self.started.items()):
            if kind == "learner":
                with contextlib.suppress(Unavailable):  # a dead one holds nothing
                    await Op((await asyncio.shield(task)).call("close_run", run_id))
        await asyncio.to_thread(self.storage.delete, parked_folder(run_id))

    async def delete_run(self, run_id: str) -> None:
        await self.close_run(run_id)
        await asyncio.to_thread(self.storage.delete, f"runs/{run_id}")
        self.registry.delete_run(run_id)

    async def unload(self, base_model: str) -> bool:
        """End a model's learner and sampler, unless runs are open on it; the next use loads it
        again."""
        _, path = await self._model(base_model)
        learner = self.started.get(("learner", path))
        if learner is not None:
            with contextlib.suppress(Unavailable):
                if await Op((await asyncio.shield(learner)).call("open_runs")):
                    return False
        for kind in ("learner", "sampler"):
            started = self.started.pop((kind, path), None)
            if started is not None:
                with contextlib.suppress(Unavailable):
                    ray.kill((await started).actor)
        return True

    # ---- samplers and checkpoints ----

    async def grant_sampler(self, base_model: str, policy: PolicyRef) -> SamplerGrant:
        name, path = await self._model(base_model)
        return SamplerGrant(name, path, await self.sampler_handle(base_model), policy)

    async def grant_checkpoint_sampler(self, path: str) -> SamplerGrant:
        """Load a saved adapter into its base model's sampler, under its path as name."""
        files, manifest = await asyncio.to_thread(self.storage.read_checkpoint, path)
        version, lora = manifest["version"], LoraConfig(**manifest["lora"])
        grant = await self.grant_sampler(manifest["base_model"], PolicyRef(path, version))
        await Op(grant.sampler.call("add_adapter_files", path, version, lora, files))
        return grant

    async def record_checkpoint(self, checkpoint: Checkpoint) -> None:
        self.registry.add_checkpoint(checkpoint)
        self.registry.touch_run(checkpoint.run_id)

    async def list_checkpoints(self, run_id: str | None) -> list[Checkpoint]:
        if run_id is not None:
            self.registry.run(run_id)
        return self.registry.checkpoints(run_id)

    async def get_checkpoint(self, path: str) -> Checkpoint:
        return self.registry.checkpoint(path)

    async def set_checkpoint_ttl(self, path: str, seconds: float | None) -> None:
        """Let a checkpoint be deleted after `seconds`; None keeps it for good."""
        self.registry.set_checkpoint(path, expires=expiry(seconds))

    async def publish_checkpoint(self, path: str, public: bool) -> None:
        """Let every owner that a gateway serves read a checkpoint, or its own alone."""
        self.registry.set_checkpoint(path, public=public)

    async def copy_checkpoint(self, path: str, run_id: str) -> str:
        """Copy a checkpoint to another run, under its name; returns the copy's path.

        Raises:
            InvalidInput: the run has one of that name.
        """
        source, run = self.registry.checkpoint(path), self.registry.run(run_id)
        copy = CheckpointPath(run.run_id, source.kind, source.name)
        if await asyncio.to_thread(self.storage.exists, copy.folder):
            raise InvalidInput(f"{copy} exists already")
        await asyncio.to_thread(self.storage.copy, CheckpointPath.parse(path).folder, copy.folder)
        self.registry.add_checkpoint(
            replace(
                source,
                path=str(copy),
                run_id=run_id,
                created=time.time(),
                expires=None,
                public=False,
            )
        )
        return str(copy)

    async def _delete_expired(self) -> None:
        while True:
            for checkpoint in self.registry.expired_checkpoints():
                with contextlib.suppress(NotFound):
                    await self.delete_checkpoint(checkpoint.path)
            await asyncio.sleep(EXPIRY_PAUSE_S)

    async def delete_checkpoint(self, path: str) -> None:
        folder = CheckpointPath.parse(path).folder
        self.registry.delete_checkpoint(path)
        await asyncio.to_thread(self.storage.delete, folder)

    async def capabilities(self) -> ServerCapabilities:
        found = await asyncio.to_thread(models.local_models, self.home)
        return ServerCapabilities(
            [SupportedModel(name, facts.max_context) for name, facts in found], loss_names()
        )
