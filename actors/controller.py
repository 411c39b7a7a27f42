"""The Controller actor: knows every run and checkpoint, and starts what serves them.

It hands out grants (handles to learners and samplers); the work itself never passes through it.

When it dies, Ray ends the actors that it started and starts it again under the same handle; calls to
it wait, and are made again. It then knows what the registry, the logs and the checkpoints say, and
starts an actor again when somebody needs it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any, Literal

import ray
from prometheus_client.metrics_core import Metric

from ..algorithms.losses import loss_names
from ..engines import models
from ..engines.backbone import SUPPORTED_FAMILIES
from ..engines.base_weights import BaseWeights
from ..engines.layout import Layout
from ..engines.vllm_coverage import Coverage
from ..engines.vllm_start import VllmOptions
from ..primitives.errors import InvalidInput, NotFound, TinsmithError, Unavailable
from ..primitives.learner_link import RunGrant
from ..primitives.op import Op
from ..primitives.paths import SCHEME, CheckpointPath, check_name
from ..primitives.sampler_link import SamplerGrant
from ..primitives.types import (
    Checkpoint,
    Crash,
    LoraConfig,
    PolicyRef,
    ServerCapabilities,
    SupportedModel,
    TrainingRun,
)
from ..primitives.validation import check_ttl
from .archive import adapter_files
from .controller_watch import (
    ControllerWatch,
    Reports,
    died_before,
    left_behind,
    service_metrics,
)
from .deaths import Deaths
from .env_worker import EnvWorker
from .handle import MAX_WAITING_CALLS, ActorGone, RayHandle
from .journal import log_folder
from .learner import Learner
from .learner_helper import LearnerHelper
from .manifest import Manifest
from .observed import Observed, own_notes
from .placement import Placement, Plan, Seat, plan
from .registry import Registry
from .reservation import Reservation, release_left_over
from .sampler_pool import SamplerPool
from .scaling import Replicas
from .storage import Storage
from .threads import engine_env
from .wal import REPLAY_SECONDS

EXPIRY_SECONDS = 60.0
OPENINGS = 3  # of a run, where learners die under them
# For actors that a service cannot do without: the head's node is the one whose loss ends a cluster anyway.
ON_THE_HEAD = {"node:__internal_head__": 0.0001}

logger = logging.getLogger(__name__)


def _is_there(task: asyncio.Task[Any]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is None


@dataclass(frozen=True)
class Place:
    plan: Plan
    reservation: Reservation
    layout: Layout


class Controller(Observed):
    def __init__(
        self,
        home: str,
        learner_threads: int | None = None,
        sampler_threads: int | None = None,
        kv_bytes: int | None = None,
        vllm: VllmOptions | None = None,
        replicas: Replicas | None = None,
        placement: Placement | None = None,
        run_bytes: int | None = None,
        learners: int = 1,
        base_weights: BaseWeights = "auto",
        reorder_sampler_weights: bool = False,
        layout: Layout | Literal["auto"] | None = None,
        replay_seconds: float = REPLAY_SECONDS,
    ) -> None:
        self.observe("controller")
        self.watch = ControllerWatch(self.meters)
        self.deaths = Deaths(self.crashed)
        self.home = home
        self.restarted = ray.get_runtime_context().was_current_actor_reconstructed
        self.died = died_before(home) if self.restarted else None
        self.notes = own_notes(home, "controller")
        self.registry = Registry(f"{home}/registry.sqlite")
        self.storage = Storage(home)
        self.learner_threads = learner_threads
        self.sampler_threads = sampler_threads
        self.kv_bytes = kv_bytes
        self.run_bytes = run_bytes
        self.learners = learners
        self.vllm = vllm
        self.base_weights: BaseWeights = base_weights
        self.reorder_sampler_weights = reorder_sampler_weights
        self.layout = layout
        self.replay_seconds = replay_seconds
        self.service = ray.get_runtime_context().get_session_name()  # of this cluster
        self.replicas = replicas or Replicas()
        self.placement = placement or Placement()
        self.places: dict[str, asyncio.Task[Place]] = {}  # by model folder
        self.started: dict[tuple[str, str], asyncio.Task[RayHandle]] = {}
        self.models: dict[str, tuple[str, str]] = {}
        self.env_pools: dict[str, tuple[list[RayHandle], Reservation]] = {}
        self.open_runs: dict[str, str] = {}  # run -> folder of the model whose learner holds it
        self.openings: Counter[str] = Counter()  # how many are being opened, by that folder
        # By run: who opens or closes it, and who gives or takes its checkpoints' names. Two locks,
        # because opening a run may wait for saves, which end with the second.
        self.opening: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self.naming: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self.expiry: asyncio.Task[None] | None = None
        if self.restarted:
            release_left_over()
            # Whoever started the service did that the first time.
            ray.get_runtime_context().current_actor.ping.remote()

    async def ping(self) -> str:
        if self.expiry is None:
            self.expiry = asyncio.create_task(self._keep_deleting_expired())
            if self.died is not None:
                await self.crashed(self.died)
            reason = "the controller died" if self.restarted else "the whole service ended"
            for crash in await asyncio.to_thread(left_behind, self.home, reason):
                await self.crashed(crash)
        return self.home

    @property
    def me(self) -> RayHandle:
        return RayHandle(ray.get_runtime_context().current_actor, "controller")

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
                gone = not _is_there(task) or isinstance(error, ActorGone)
                if (gone or starting) and self.started.get(key) is task:
                    del self.started[key]
                    if _is_there(task):
                        ray.kill(task.result().actor)  # it may only be out of reach
                if starting or not gone or not isinstance(error, Unavailable):
                    raise

    async def _place(self, name: str, path: str) -> Place:
        """Where a model's learner and samplers go, reserved by whoever asks first.

        Raises:
            OutOfCapacity: there is no room for them.
            Unavailable: there was, and is none now.
        """

        async def reserve() -> Place:
            gpus = ray.cluster_resources().get("GPU", 0.0)
            tensor_parallel = 1 if self.vllm is None else self.vllm.tensor_parallel
            samplers = self.replicas.min_replicas
            if self.layout == "auto":
                from .learner_layout import chosen_layout

                left = int(gpus - samplers * (self.placement.sampler_gpus or tensor_parallel))
                layout = await asyncio.to_thread(chosen_layout, path, self.base_weights, left)
            else:
                layout = self.layout or Layout()
            count = max(self.learners, layout.world)
            planned = plan(self.placement, gpus, tensor_parallel, samplers, count)
            learners = "the learner" if self.learners == 1 else f"{self.learners} learners"
            if layout.world > 1:
                learners = f"the learner's {layout.world} ranks ({layout})"
            what = f"{learners} of {name} and {samplers} of its samplers"
            reservation = await Reservation.make(what, planned.bundles, self.placement)
            return Place(planned, reservation, layout)

        if path in self.places and _is_there(self.places[path]):
            place = self.places[path].result()
            if await asyncio.to_thread(place.reservation.given_back):
                self.places.pop(path, None)
        if path not in self.places:
            self.places[path] = asyncio.create_task(reserve())
        task = self.places[path]
        try:
            place = await asyncio.shield(task)
        except TinsmithError:
            if self.places.get(path) is task:
                del self.places[path]
            raise
        await place.reservation.there()
        return place

    async def _learner(self, base_model: str) -> RayHandle:
        name, path = await self._model(base_model)
        me = self.me

        async def start() -> RayHandle:
            self._forget_open_runs(path)  # they died with the learner before
            place = await self._place(name, path)
            actor = (
                ray.remote(Learner)
                .options(
                    max_concurrency=MAX_WAITING_CALLS,
                    runtime_env=engine_env(self.home),
                    **place.reservation.options(place.plan.learner),
                )
                .remote(
                    name,
                    path,
                    self.home,
                    me,
                    self.learner_threads,
                    self.run_bytes,
                    self.learners,
                    self.base_weights,
                    place.layout,
                    self.replay_seconds,
                    self.service,
                )
            )
            handle = RayHandle(actor, "learner", self.home)
            await Op(handle.call("start"))
            self.deaths.watch(handle)
            return handle

        return await self._running("learner", path, start)

    async def learner_helper(self, base_model: str, index: int) -> RayHandle:
        """Another learner of a model, for the one that holds its runs: the `index`th, from 1."""
        name, path = await self._model(base_model)

        async def start() -> RayHandle:
            place = await self._place(name, path)
            actor = (
                ray.remote(LearnerHelper)
                .options(
                    runtime_env=engine_env(self.home),
                    **place.reservation.options(place.plan.helpers[index - 1]),
                )
                .remote(path, self.home, self.learner_threads, self.base_weights)
            )
            return RayHandle(actor, "learner's helper")

        return await self._running(f"learner helper {index}", path, start)

    async def learner_rank(self, base_model: str, rank: int, layout: Layout) -> RayHandle:
        """A new process for that rank (from 1) of a model's learner, in the place of the one before."""
        from .learner_rank import LearnerRank

        name, path = await self._model(base_model)
        place = await self._place(name, path)
        before = self.started.pop((f"learner rank {rank}", path), None)
        if before is not None and _is_there(before):
            ray.kill(before.result().actor)

        async def start() -> RayHandle:
            actor = (
                ray.remote(LearnerRank)
                .options(
                    max_concurrency=2,  # it serves for as long as it lives, and answers meanwhile
                    runtime_env=engine_env(self.home),
                    **place.reservation.options(place.plan.helpers[rank - 1]),
                )
                .remote(
                    path,
                    layout,
                    rank,
                    self.learner_threads,
                    self.base_weights,
                    models.copies_folder(self.home),
                )
            )
            return RayHandle(actor, f"learner's rank {rank}")

        return await self._running(f"learner rank {rank}", path, start)

    async def sampler_handle(self, base_model: str) -> RayHandle:
        name, path = await self._model(base_model)
        crashed = Reports(self.me)

        async def start() -> RayHandle:
            place = await self._place(name, path)
            sampler = dict(
                model_path=path,
                name=name,
                num_threads=self.sampler_threads,
                kv_bytes=self.kv_bytes,
                vllm=self.vllm,
                weights=self.base_weights,
                copies=models.copies_folder(self.home),
                reorder=self.reorder_sampler_weights,
                home=self.home,
            )
            actor = (
                ray.remote(SamplerPool)
                .options(num_cpus=0, max_concurrency=MAX_WAITING_CALLS, resources=ON_THE_HEAD)
                .remote(name, sampler, self.replicas, place.plan, place.reservation, crashed)
            )
            handle = RayHandle(actor, "sampler", self.home)
            self.deaths.watch(handle)
            return handle

        return await self._running("sampler", path, start)

    async def env_workers(
        self, pool: str, base_model: str, count: int, max_concurrent: int
    ) -> list[RayHandle]:
        """The environment workers of a client's `pool`, started by whoever asks first."""
        if pool in self.env_pools:
            return self.env_pools[pool][0]
        if count < 1:
            raise InvalidInput(f"num_workers must be at least 1, got {count}")
        _, path = await self._model(base_model)
        cpus = self.placement.env_worker_cpus
        bundles = [{"CPU": cpus}] * count if cpus else []
        reservation = await Reservation.make(
            f"{count} environment workers", bundles, replace(self.placement, strategy="SPREAD")
        )
        seats = [Seat(cpus, 0, index if cpus else None) for index in range(count)]
        workers = [
            RayHandle(
                ray.remote(EnvWorker)
                .options(
                    max_concurrency=MAX_WAITING_CALLS,
                    max_restarts=-1,
                    **reservation.options(seat),
                )
                .remote(path, max_concurrent=max_concurrent),
                "environment worker",
            )
            for seat in seats
        ]
        self.env_pools[pool] = workers, reservation
        return workers

    async def end_env_workers(self, pool: str) -> None:
        if pool not in self.env_pools:
            return  # called again
        workers, reservation = self.env_pools.pop(pool)
        for worker in workers:
            ray.kill(worker.actor)
        reservation.release()

    # ---- runs ----

    async def create_run(
        self,
        run_id: str,
        base_model: str | None,
        lora: LoraConfig | None,
        path: str | None,
        optimizer: bool,
        user_metadata: dict[str, Any],
        creation: str | None = None,
    ) -> RunGrant:
        """A new run on `base_model` under `lora`, or from the checkpoint `path`. `creation` names this
        call: made again, because the controller died, it gives the run that it made before.

        Raises:
            InvalidInput: there is a run of that id already, or the sampling engine could not serve
                it.
        """
        check_name("run id", run_id)
        if path is not None:
            manifest = await self._manifest(path)
            base_model, lora = manifest.base_model, manifest.lora
        assert base_model is not None
        assert lora is not None
        name, _ = await self._model(base_model)
        async with self.opening[run_id]:
            if creation is not None and self.registry.made_by(run_id, creation):
                return await self._reopened(self.registry.run(run_id))
            if self.registry.has_run(run_id):
                raise InvalidInput(f"run {run_id!r} exists already; take another id, or resume it")
            grant = await self._open(run_id, name, lora, path, optimizer)
            now = time.time()
            run = TrainingRun(run_id, name, lora, now, now, user_metadata)
            self.registry.add_run(run, creation)
        return grant

    async def resume_run(self, run_id: str, path: str | None, next_seq_id: int = 1) -> RunGrant:
        """Go on with a run where its log ends, in memory or on disk; where it was closed, from its
        newest `weights` checkpoint. With `path`, from there, with `next_seq_id` for the first
        operation's number."""
        if next_seq_id < 1:
            raise InvalidInput(f"next_seq_id must be at least 1, got {next_seq_id}")
        async with self.opening[run_id]:
            run = self.registry.run(run_id)
            if path is None:
                with contextlib.suppress(NotFound):
                    grant = await self._reopened(run)
                    following = await Op(grant.learner.call("take_over", run_id))
                    self.registry.touch_run(run_id)
                    return replace(grant, next_seq_id=following)
                checkpoints = self.registry.checkpoints(run_id, "weights")
                if not checkpoints:
                    raise NotFound(f"run {run_id!r} has no log and no saved state")
                path = checkpoints[0].path
            grant = await self._open(run_id, run.base_model, run.lora, path, True, next_seq_id)
            self.registry.touch_run(run_id)
        return grant

    async def _open(
        self,
        run_id: str,
        base_model: str,
        lora: LoraConfig,
        path: str | None,
        optimizer: bool,
        next_seq_id: int = 1,
    ) -> RunGrant:
        await self._check_served(base_model, lora)
        return await self._opened(
            run_id, base_model, "open_run", lora, path, optimizer, next_seq_id
        )

    async def _check_served(self, base_model: str, lora: LoraConfig) -> None:
        """
        Raises:
            InvalidInput: vLLM could not serve such a run of that model.
        """
        if self.vllm is not None:
            _, path = await self._model(base_model)
            coverage = await asyncio.to_thread(Coverage.of, path, self.vllm)
            coverage.check(lora)

    async def _opened(self, run_id: str, base_model: str, method: str, *args: Any) -> RunGrant:
        """Have the learner open a run, by one of its methods that return the next number."""
        name, model_path = await self._model(base_model)
        self.openings[model_path] += 1
        try:
            for left in reversed(range(OPENINGS)):
                try:
                    learner = await self._learner(base_model)
                    first = await Op(learner.call(method, run_id, *args))
                    break
                except ActorGone:  # it died meanwhile; both methods may be done again
                    if not left:
                        raise
            self.open_runs[run_id] = model_path
        except BaseException:
            self.open_runs.pop(run_id, None)  # a learner closes a run before it opens it again
            raise
        finally:
            self.openings[model_path] -= 1
        return RunGrant(run_id, name, model_path, learner, first)

    async def _manifest(self, path: str) -> Manifest:
        return Manifest.of(path, await asyncio.to_thread(self.storage.read_manifest, path))

    async def park_runs(self) -> None:
        """Take snapshots of all runs in memory, before the cluster ends."""
        for run_id, path in list(self.open_runs.items()):
            learner = self.started.get(("learner", path))
            if learner is not None:
                # A dead one holds nothing, and the logs have everything.
                with contextlib.suppress(TinsmithError):
                    await Op((await asyncio.shield(learner)).call("park", run_id))

    async def reopen_run(self, run_id: str) -> RunGrant:
        """Go on with a run exactly where it is: in memory, or where its log ends.

        Raises:
            NotFound: no such run, or it is closed.
        """
        async with self.opening[run_id]:
            return await self._reopened(self.registry.run(run_id))

    async def _reopened(self, run: TrainingRun) -> RunGrant:
        folder = log_folder(run.run_id)
        if not await asyncio.to_thread(self.storage.exists, folder):
            raise NotFound(f"run {run.run_id!r} is closed: it is not in memory and has no log")
        await self._check_served(run.base_model, run.lora)
        return await self._opened(run.run_id, run.base_model, "recover")

    async def close_run(self, run_id: str) -> None:
        """Free a run's memory in its learner and sampler; what was saved stays."""
        self.registry.run(run_id)
        async with self.opening[run_id]:
            await self._close(self.registry.run(run_id))

    async def _close(self, run: TrainingRun) -> None:
        await self._tell("learner", run.base_model, "close_run", run.run_id)
        # Also what a learner that died had published.
        await self._tell("sampler", run.base_model, "drop_run", run.run_id)
        self.open_runs.pop(run.run_id, None)
        await asyncio.to_thread(self.storage.delete, log_folder(run.run_id))

    async def _tell(self, kind: str, base_model: str, method: str, *args: Any) -> None:
        """Call a base model's actor, if there is one; a dead one holds nothing."""
        task = self.started.get((kind, self._loaded(base_model) or ""))
        if task is not None:
            with contextlib.suppress(TinsmithError):
                await Op((await asyncio.shield(task)).call(method, *args))

    async def unload(self, base_model: str) -> bool:
        """End a base model's learners and samplers; False while runs are open or being opened."""
        path = self._loaded(base_model)
        if path is None:
            return True
        learner = self.started.get(("learner", path))
        if learner is not None:
            try:
                await Op((await asyncio.shield(learner)).call("settle"))
            except TinsmithError:  # it died, or never started
                if self.started.get(("learner", path)) is learner:
                    self._forget_open_runs(path)
        if self.openings[path] or path in self.open_runs.values():
            return False
        for key in [key for key in self.started if key[1] == path]:
            task = self.started.pop(key)
            if _is_there(task):
                ray.kill(task.result().actor)
        place = self.places.pop(path, None)
        if place is not None and _is_there(place):
            place.result().reservation.release()
        return True

    def _loaded(self, base_model: str) -> str | None:
        """The folder of a base model that was used, by any of its names; never fetches one."""
        for asked, (name, path) in self.models.items():
            if base_model in (asked, name, path):
                return path
        return None

    def _forget_open_runs(self, path: str) -> None:
        self.open_runs = {run: where for run, where in self.open_runs.items() if where != path}

    async def held_bytes(self) -> dict[str, int]:
        """Of every open run's adapter, gradients and optimizer state; 0 where its learner is gone."""
        held = dict.fromkeys(self.open_runs, 0)
        for path in set(self.open_runs.values()):
            learner = self.started.get(("learner", path))
            if learner is not None:
                with contextlib.suppress(Unavailable):
                    held |= await Op((await asyncio.shield(learner)).call("held_bytes"))
        return held

    # ---- what is told of the service ----

    async def crashed(self, crash: Crash) -> None:
        """A process died: keep it, count it, log it."""
        self.registry.add_crash(crash)
        self.watch.crashed(crash)

    async def metrics(self) -> list[Metric]:
        """Of all processes of the service that answer; families that Prometheus's library renders."""
        names = {path: name for name, path in self.models.values()}
        learners, pools = (
            {
                names[path]: task.result()
                for (kind, path), task in self.started.items()
                if kind == wanted and _is_there(task)
            }
            for wanted in ("learner", "sampler")
        )
        workers = [worker for together, _ in self.env_pools.values() for worker in together]
        own = self.watch.collect(self.registry)
        return await service_metrics(own, learners, pools, workers)

    async def list_runs(self) -> list[TrainingRun]:
        return self.registry.runs()

    async def get_run(self, run_id: str) -> TrainingRun:
        return self.registry.run(run_id)

    async def delete_run(self, run_id: str) -> None:
        async with self.opening[run_id]:
            run = self.registry.run(run_id)
            await self._close(run)
            # What it was saving when it was closed would be written into the folder being deleted.
            await self._tell("learner", run.base_model, "settle")
            async with self.naming[run_id]:
                checkpoints = self.registry.checkpoints(run_id)
                await asyncio.to_thread(self.storage.delete, f"runs/{run_id}")
                self.registry.delete_run(run_id)
        for checkpoint in checkpoints:
            await self._tell("sampler", run.base_model, "drop_run", checkpoint.path)

    # ---- samplers ----

    async def grant_sampler(self, base_model: str, policy: PolicyRef) -> SamplerGrant:
        """The way to a sampler, which holds the policy: also where it was started anew since, for as
        long as the run is open or the checkpoint there."""
        name, path = await self._model(base_model)
        sampler = await self.sampler_handle(base_model)
        if policy.run_id is not None and not await Op(sampler.call("holds", policy)):
            with contextlib.suppress(NotFound):  # whoever samples is told
                if policy.run_id.startswith(SCHEME):
                    return await self.grant_checkpoint_sampler(policy.run_id)
                run = await self.reopen_run(policy.run_id)
                await Op(run.learner.call("publish_again", policy.run_id, sampler))
        return SamplerGrant(name, path, sampler, policy, self.me)

    async def grant_checkpoint_sampler(self, path: str) -> SamplerGrant:
        """Load a saved adapter into its base model's sampler, under its path as name."""
        manifest = await self._manifest(path)
        files = await asyncio.to_thread(adapter_files, self.storage, path)
        version, lora = manifest.version, manifest.lora
        name, model_path = await self._model(manifest.base_model)
        sampler = await self.sampler_handle(manifest.base_model)
        await Op(sampler.call("add_adapter_files", path, version, lora, files))
        return SamplerGrant(name, model_path, sampler, PolicyRef(path, version), self.me)

    # ---- checkpoints: each change of a run's names under that run's lock ----

    async def add_checkpoint(self, checkpoint: Checkpoint, staged: str, overwrite: bool) -> None:
        """Give what a learner staged its name.

        Raises:
            InvalidInput: the name is taken.
            NotFound: the run was deleted meanwhile.
        """
        async with self.naming[checkpoint.run_id]:
            try:
                self.registry.run(checkpoint.run_id)
                if not overwrite:
                    self._check_free(checkpoint.path)
                folder = CheckpointPath.parse(checkpoint.path).folder
                await asyncio.to_thread(self.storage.commit, staged, folder)
            except BaseException:
                await asyncio.to_thread(self.storage.delete, staged)
                raise
            self.registry.touch_run(checkpoint.run_id)
            self.registry.add_checkpoint(checkpoint)  # if this fails, nothing has the name

    def _check_free(self, path: str) -> None:
        with contextlib.suppress(NotFound):
            self.registry.checkpoint(path)
            raise InvalidInput(f"{path} exists already; take another name, or overwrite=True")

    async def copy_checkpoint(self, source_path: str, run_id: str) -> str:
        """Copy a checkpoint's files to another run, under the same kind and name.

        Raises:
            InvalidInput: the name is taken, or the run has another base model or LoRA.
        """
        source, run = self.registry.checkpoint(source_path), self.registry.run(run_id)
        origin = self.registry.run(source.run_id)
        if (origin.base_model, replace(origin.lora, seed=None)) != (
            run.base_model,
            replace(run.lora, seed=None),
        ):
            raise InvalidInput(
                f"{source_path} is of {origin.base_model} with {origin.lora}; "
                f"run {run_id} of {run.base_model} with {run.lora}"
            )
        target = CheckpointPath(run_id, source.kind, source.name)
        self._check_free(str(target))
        staged, size = await asyncio.to_thread(self.storage.stage_copy, source_path, target.folder)
        copied = replace(
            source,
            path=str(target),
            run_id=run_id,
            created=time.time(),
            size_bytes=size,
            expires=None,
            public=False,
        )
        await self.add_checkpoint(copied, staged, overwrite=False)
        return copied.path

    async def list_checkpoints(self, run_id: str | None) -> list[Checkpoint]:
        if run_id is not None:
            self.registry.run(run_id)
        return self.registry.checkpoints(run_id)

    async def get_checkpoint(self, path: str) -> Checkpoint:
        return self.registry.checkpoint(path)

    async def set_checkpoint_ttl(self, path: str, ttl_seconds: int | None) -> None:
        """Delete a checkpoint that long from now; None: never."""
        check_ttl(ttl_seconds)
        self.registry.set_expires(path, None if ttl_seconds is None else time.time() + ttl_seconds)

    async def publish_checkpoint(self, path: str, public: bool) -> None:
        self.registry.set_public(path, public)

    async def delete_checkpoint(self, path: str) -> None:
        checkpoint = self.registry.checkpoint(path)
        async with self.naming[checkpoint.run_id]:
            self.registry.checkpoint(path)
            await self._delete_files(path)
        await self._drop_from_sampler(checkpoint)

    async def delete_expired(self) -> None:
        for checkpoint in self.registry.expired_checkpoints():
            async with self.naming[checkpoint.run_id]:
                # Looked up again: it may have been saved anew while this waited.
                if checkpoint not in self.registry.expired_checkpoints():
                    continue
                await self._delete_files(checkpoint.path)
            await self._drop_from_sampler(checkpoint)

    async def _delete_files(self, path: str) -> None:
        await asyncio.to_thread(self.storage.delete, CheckpointPath.parse(path).folder)
        self.registry.delete_checkpoint(path)

    async def _drop_from_sampler(self, checkpoint: Checkpoint) -> None:
        with contextlib.suppress(NotFound):  # the run was deleted meanwhile
            run = self.registry.run(checkpoint.run_id)
            await self._tell("sampler", run.base_model, "drop_run", checkpoint.path)

    async def _keep_deleting_expired(self) -> None:
        while True:
            try:
                await self.delete_expired()
            except Exception:
                logger.exception("deleting expired checkpoints failed; trying again")
            await asyncio.sleep(EXPIRY_SECONDS)

    async def capabilities(self) -> ServerCapabilities:
        found = await asyncio.to_thread(models.local_models, self.home)
        return ServerCapabilities(
            [SupportedModel(name, facts.max_context) for name, facts in found], loss_names()
        )
