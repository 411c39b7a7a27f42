"""The Controller actor: knows every run and checkpoint, and starts what serves them.

It hands out grants (handles to learners and samplers); the work itself never passes through it.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Coroutine
from typing import Any

import ray

from ..algorithms.losses import loss_names
from ..engines import models
from ..engines.backbone import SUPPORTED_FAMILIES
from ..primitives.client import RunGrant, SamplerGrant
from ..primitives.errors import InvalidInput, NotFound
from ..primitives.op import Op
from ..primitives.paths import CheckpointPath
from ..primitives.types import (
    Checkpoint,
    LoraConfig,
    PolicyRef,
    ServerCapabilities,
    SupportedModel,
    TrainingRun,
)
from .env_worker import EnvWorker
from .handle import RayHandle
from .learner import Learner
from .registry import Registry
from .sampler import Sampler
from .storage import Storage
from .threads import ENGINE_ENV

# Waiting operations are coroutines of the actor: let hundreds of clients keep hundreds each.
MAX_WAITING_CALLS = 100_000


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
        self.paths: dict[str, str] = {}
        self.env_pools: list[RayHandle] = []

    async def ping(self) -> str:
        return self.home

    # ---- starting actors ----

    async def _model_path(self, base_model: str) -> str:
        if base_model not in self.paths:
            path = str(await asyncio.to_thread(models.resolve_model, base_model, self.home))
            facts = await asyncio.to_thread(models.model_facts, path)
            if facts.family not in SUPPORTED_FAMILIES:
                raise InvalidInput(
                    f"base model {base_model!r} is of family {facts.family!r}; "
                    f"supported: {', '.join(SUPPORTED_FAMILIES)}"
                )
            self.paths[base_model] = path
        return self.paths[base_model]

    async def _start_once(
        self, kind: str, path: str, start: Coroutine[Any, Any, RayHandle]
    ) -> RayHandle:
        """The actor of that kind for that model folder, started by whoever asks first."""
        key = (kind, path)
        if key in self.started:
            start.close()
        else:
            self.started[key] = asyncio.create_task(start)
        try:
            return await asyncio.shield(self.started[key])
        except Exception:
            self.started.pop(key, None)
            raise

    async def _learner(self, base_model: str) -> RayHandle:
        path = await self._model_path(base_model)
        me = RayHandle(ray.get_runtime_context().current_actor, "controller")

        async def start() -> RayHandle:
            actor = (
                ray.remote(Learner)
                .options(num_cpus=0, max_concurrency=MAX_WAITING_CALLS, runtime_env=ENGINE_ENV)
                .remote(base_model, path, self.home, me, self.learner_threads)
            )
            handle = RayHandle(actor, "learner")
            await Op(handle.call("start"))
            return handle

        return await self._start_once("learner", path, start())

    async def sampler_handle(self, base_model: str) -> RayHandle:
        path = await self._model_path(base_model)

        async def start() -> RayHandle:
            actor = (
                ray.remote(Sampler)
                .options(num_cpus=0, max_concurrency=MAX_WAITING_CALLS, runtime_env=ENGINE_ENV)
                .remote(
                    path,
                    name=base_model,
                    num_threads=self.sampler_threads,
                    kv_bytes=self.kv_bytes,
                )
            )
            handle = RayHandle(actor, "sampler")
            await Op(handle.call("ping"))
            return handle

        return await self._start_once("sampler", path, start())

    async def env_workers(self, base_model: str, count: int, max_concurrent: int) -> list[Any]:
        if count < 1:
            raise InvalidInput(f"num_workers must be at least 1, got {count}")
        path = await self._model_path(base_model)
        workers = [
            RayHandle(
                ray.remote(EnvWorker)
                .options(num_cpus=0, max_concurrency=MAX_WAITING_CALLS, max_restarts=-1)
                .remote(path, max_concurrent=max_concurrent),
                "environment worker",
            )
            for _ in range(count)
        ]
        self.env_pools.extend(workers)
        return workers

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
        """A new run on `base_model` under `lora`, or from the checkpoint `path`."""
        if path is not None:
            manifest = await self._manifest(path)
            base_model, lora = manifest["base_model"], LoraConfig(**manifest["lora"])
        assert base_model is not None
        assert lora is not None
        learner = await self._learner(base_model)
        first = await Op(learner.call("open_run", run_id, lora, path, optimizer))
        now = time.time()
        self.registry.add_run(TrainingRun(run_id, base_model, lora, now, now, user_metadata))
        return RunGrant(run_id, base_model, await self._model_path(base_model), learner, first)

    async def resume_run(self, run_id: str, path: str | None) -> RunGrant:
        run = self.registry.run(run_id)
        learner = await self._learner(run.base_model)
        following = await Op(learner.call("next_seq_id", run_id))
        if path is not None or following is None:
            if path is None:
                checkpoints = self.registry.checkpoints(run_id, "weights")
                if not checkpoints:
                    raise NotFound(f"run {run_id!r} is not in memory and has no saved state")
                path = checkpoints[0].path
            following = await Op(learner.call("open_run", run_id, run.lora, path, True))
        self.registry.touch_run(run_id)
        model_path = await self._model_path(run.base_model)
        return RunGrant(run_id, run.base_model, model_path, learner, following)

    async def list_runs(self) -> list[TrainingRun]:
        return self.registry.runs()

    async def get_run(self, run_id: str) -> TrainingRun:
        return self.registry.run(run_id)

    async def delete_run(self, run_id: str) -> None:
        run = self.registry.run(run_id)
        key = ("learner", self.paths.get(run.base_model, ""))
        if key in self.started:
            await Op((await self.started[key]).call("close_run", run_id))
        await asyncio.to_thread(self.storage.delete, f"runs/{run_id}")
        self.registry.delete_run(run_id)

    # ---- samplers and checkpoints ----

    async def grant_sampler(self, base_model: str, policy: PolicyRef) -> SamplerGrant:
        sampler = await self.sampler_handle(base_model)
        return SamplerGrant(base_model, await self._model_path(base_model), sampler, policy)

    async def grant_checkpoint_sampler(self, path: str) -> SamplerGrant:
        """Load a saved adapter into its base model's sampler, under its path as name."""
        manifest = await self._manifest(path)
        sampler = await self.sampler_handle(manifest["base_model"])
        files = await asyncio.to_thread(self.storage.read, CheckpointPath.parse(path).folder)
        version = manifest["version"]
        await Op(
            sampler.call("add_adapter_files", path, version, LoraConfig(**manifest["lora"]), files)
        )
        policy = PolicyRef(path, version)
        return await self.grant_sampler(manifest["base_model"], policy)

    async def _manifest(self, path: str) -> dict[str, Any]:
        folder = CheckpointPath.parse(path).folder
        if not self.storage.exists(folder):
            raise NotFound(f"no checkpoint {path!r}; list_checkpoints() shows those there are")
        files = await asyncio.to_thread(self.storage.read, folder)
        return json.loads(files["manifest.json"])

    async def record_checkpoint(self, checkpoint: Checkpoint) -> None:
        self.registry.add_checkpoint(checkpoint)
        self.registry.touch_run(checkpoint.run_id)

    async def list_checkpoints(self, run_id: str | None) -> list[Checkpoint]:
        if run_id is not None:
            self.registry.run(run_id)
        return self.registry.checkpoints(run_id)

    async def delete_checkpoint(self, path: str) -> None:
        folder = CheckpointPath.parse(path).folder
        self.registry.delete_checkpoint(path)
        await asyncio.to_thread(self.storage.delete, folder)

    async def capabilities(self) -> ServerCapabilities:
        found = await asyncio.to_thread(models.local_models, self.home)
        return ServerCapabilities(
            [SupportedModel(name, facts.max_context) for name, facts in found], loss_names()
        )
