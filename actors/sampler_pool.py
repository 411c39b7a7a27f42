"""The SamplerPool actor: a base model's samplers as one, behind the methods of `Sampler`.

It starts them, hands every adapter to all of them, and gives each request to one of them. A sampler
that dies is replaced, is given all adapters again, and what it was sampling is sampled anew.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray
from prometheus_client.metrics_core import Metric

from ..engines.adapter_store import AdapterKey, AdapterStore
from ..engines.vllm_start import VllmOptions
from ..primitives.errors import Busy, NotFound, Unavailable
from ..primitives.op import Op
from ..primitives.types import (
    LoraConfig,
    PolicyRef,
    SampledToken,
    SampleRequest,
    SampleResponse,
)
from .deaths import Deaths, Report
from .gathering import INNER_PATIENCE_S, gather
from .handle import MAX_WAITING_CALLS, RayHandle
from .observed import Observed, own_notes
from .placement import Plan, Seat
from .replica import Change, Replica
from .reservation import Reservation, has_room
from .routing import PrefixTable, choose, prefixes
from .sampler import Sampler
from .sampler_watch import PoolWatch
from .scaling import Replicas, Scaler
from .threads import engine_env
from .withdrawal import Withdrawable

SCALING_SECONDS = 0.5
# How long a publication waits for a sampler that is slower than the others.
PATIENCE_S = 5.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Published:
    """An adapter version as the learner or a checkpoint gave it.

    Attributes:
        method: of `Sampler`, that takes it.
        stored: its parameters or files in Ray's object store, from where every sampler reads them.
        content: the parameters (memory of the store), or a digest of the files.
    """

    method: str
    config: LoraConfig
    stored: Any
    content: np.ndarray | bytes

    @classmethod
    def put(cls, method: str, config: LoraConfig, content: Any) -> Published:
        stored = ray.put(content)
        if isinstance(content, np.ndarray):
            return cls(method, config, stored, ray.get(stored))
        hashed = hashlib.blake2b()
        for name in sorted(content):
            hashed.update(content[name])
        return cls(method, config, stored, hashed.digest())

    def same_as(self, other: Published) -> bool:
        same_kind = (self.method, self.config) == (other.method, other.config)
        return same_kind and np.array_equal(self.content, other.content)

    def change(self, key: AdapterKey, keep: bool) -> Change:
        rest = (keep,) if self.method == "add_adapter" else ()
        return Change(self.method, (key.run_id, key.version, self.config, self.stored, *rest))


class SamplerPool(Withdrawable, Observed):
    """Wrapped by the controller with `ray.remote`.

    Args:
        name: what the model is called in messages.
        sampler: arguments of each `Sampler`.
        replicas: how many there are.
        plan, reservation: where they go.
        crashed: is told of samplers that die.
    """

    def __init__(
        self,
        name: str,
        sampler: dict[str, Any],
        replicas: Replicas,
        plan: Plan,
        reservation: Reservation,
        crashed: Report,
    ) -> None:
        super().__init__()
        self.observe("sampler pool")
        self.notes = own_notes(sampler["home"], f"sampler pool of {name}")
        self.deaths = Deaths(crashed)
        self.name, self.sampler_args, self.limits = name, sampler, replicas
        self.plan, self.reservation = plan, reservation
        self.replicas: list[Replica] = []
        self.starting: dict[asyncio.Task[None], Seat] = {}
        self.adapters: AdapterStore[Published] = AdapterStore()
        self.watch = PoolWatch(self.meters, self.adapters)
        self.prefixes = PrefixTable()
        self.scaler = Scaler(replicas)
        self._using: Counter[AdapterKey] = Counter()
        self._numbers = itertools.count()
        self._scaling: asyncio.Task[None] | None = None

    async def ping(self) -> str:
        """
        Raises:
            Unavailable: no sampler runs, and none could be started.
        """
        if self._scaling is None:
            while len(self.starting) < self.limits.min_replicas:
                self._start()
            self._scaling = asyncio.create_task(self._keep_scaling())
        await self._running()
        return self.name

    # ---- samplers ----

    def _start(self) -> None:
        taken = Counter([*(r.seat for r in self.replicas), *self.starting.values()])
        seat = next(iter(Counter(self.plan.samplers) - taken), self.plan.another)
        task = asyncio.create_task(self._started(seat))
        self.starting[task] = seat
        task.add_done_callback(self._has_started)

    def _has_started(self, task: asyncio.Task[None]) -> None:
        del self.starting[task]
        if not task.cancelled() and task.exception() is not None:
            logger.warning("a sampler of %s did not start: %s", self.name, task.exception())

    async def _started(self, seat: Seat) -> None:
        if seat.bundle is not None:
            await self.reservation.there()
        args = dict(self.sampler_args)
        if args["vllm"] is not None and 0 < seat.gpus < 1:
            args["vllm"] = _on_a_part(args["vllm"], seat.gpus)
        actor = (
            ray.remote(Sampler)
            .options(
                max_concurrency=MAX_WAITING_CALLS,
                runtime_env=engine_env(self.sampler_args["home"]),
                **self.reservation.options(seat),
            )
            .remote(**args)
        )
        handle = RayHandle(actor, "sampler", self.sampler_args["home"])
        try:
            await Op(handle.call("ping"))
            self.deaths.watch(handle)
            held = [published.change(key, keep) for key, published, keep in self.adapters.held()]
            replica = Replica(next(self._numbers), handle, seat, deque(held))
            self.replicas.append(replica)
            await replica.catch_up()
        except BaseException:
            self.replicas = [r for r in self.replicas if r.handle is not handle]
            ray.kill(handle.actor)
            raise

    async def _running(self) -> list[Replica]:
        """The samplers that may be given something; those that have caught up, if there are any.

        Raises:
            Unavailable: there is none, and none could be started.
        """
        while True:
            running = [r for r in self.replicas if not r.retiring]
            if running:
                return [r for r in running if not r.changes] or running
            if not self.starting:
                self._start()
            done, _ = await asyncio.wait(self.starting, return_when=asyncio.FIRST_COMPLETED)
            if not self.replicas and not self.starting:
                for task in done:
                    await task

    def _lost(self, replica: Replica) -> None:
        """Replace a sampler that died, or that is alive with a dead engine."""
        if replica in self.replicas:
            self._end(replica)
            there = len(self.replicas) + len(self.starting)
            if there < self.limits.min_replicas:
                self._start()

    def _end(self, replica: Replica) -> None:
        self.replicas.remove(replica)
        self.prefixes.forget(replica.number)
        ray.kill(replica.handle.actor)

    async def _keep_scaling(self) -> None:
        while True:
            await asyncio.sleep(SCALING_SECONDS)
            try:
                self._scale()
            except Exception:
                logger.exception("scaling the samplers of %s failed; trying again", self.name)

    def _scale(self) -> None:
        for replica in [r for r in self.replicas if r.retiring and not r.load]:
            self._end(replica)
        running = [r for r in self.replicas if not r.retiring]
        there = len(running) + len(self.starting)
        change = self.scaler.change(there, sum(r.load for r in running))
        for _ in range(change):
            if there >= len(self.plan.samplers) and not has_room(self.plan.another):
                logger.warning("no room for another sampler of %s", self.name)
                break
            self._start()
        # The last to come goes first: it sits outside of the placement group.
        for replica in sorted(running, key=lambda r: -r.number)[: max(-change, 0)]:
            replica.retiring = True

    # ---- adapters ----

    async def add_adapter(
        self, run_id: str, version: int, config: LoraConfig, flat: np.ndarray, keep: bool
    ) -> None:
        await self._publish("add_adapter", run_id, version, config, flat, keep)

    async def add_adapter_files(
        self, run_id: str, version: int, config: LoraConfig, files: Mapping[str, bytes]
    ) -> None:
        await self._publish("add_adapter_files", run_id, version, config, files, True)

    async def _publish(
        self, method: str, run_id: str, version: int, config: LoraConfig, content: Any, keep: bool
    ) -> None:
        """Hand a version to all samplers at once.

        Raises:
            InvalidInput: they cannot serve it.
            Unavailable: none of them lives, and none could be started.
        """
        published = await asyncio.to_thread(Published.put, method, config, content)
        key = self.adapters.key_for(run_id, version, published)
        known = self.adapters.holds(key)
        self.adapters.add(key, published, keep)  # a sampler that starts meanwhile takes it too
        change = published.change(key, keep)
        await self._tell(change)
        if change.refused is not None:
            if not known:
                self.adapters.remove(key)
            raise change.refused
        self._sweep()

    async def _tell(self, change: Change) -> None:
        """Until all samplers have taken it, or one has and the others are slow: these go on by
        themselves, and are asked for nothing before they have."""
        for replica in self.replicas:
            replica.changes.append(change)
        waiting = {asyncio.create_task(self._catch_up(replica)) for replica in self.replicas}
        while waiting:
            done, waiting = await asyncio.wait(
                waiting,
                timeout=PATIENCE_S if any(change not in r.changes for r in self.replicas) else None,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if not done:
                return
        await self._running()  # if all have died, another one begins with what is held now

    async def _catch_up(self, replica: Replica) -> None:
        try:
            await replica.catch_up()
        except Unavailable:
            self._lost(replica)

    async def drop_run(self, run_id: str) -> None:
        """Forget a run's weights; its requests under way fail."""
        self.adapters.drop_run(run_id)
        self.meters.forget(run_id)
        self._sweep()
        if self.replicas or self.starting:
            await self._tell(Change("drop_run", (run_id,)))

    async def latest_version(self, run_id: str) -> int | None:
        return self.adapters.newest(run_id)

    async def holds(self, policy: PolicyRef) -> bool:
        try:
            self.adapters.resolve(policy)
        except NotFound:
            return False
        return True

    def _sweep(self) -> None:
        self.adapters.sweep(+self._using)

    # ---- requests ----

    async def sample(self, request: SampleRequest, name: str | None = None) -> SampleResponse:
        """`name`, unique among those under way, is what `withdraw` calls the request."""
        with (
            self.under_way(name),
            self._holding(request) as key,
            self.watch.request(request) as served,
        ):
            for left in self._attempts():
                replica = await self._chosen(request, key)
                try:
                    return served.response(await self._sample_on(replica, request, key))
                except Unavailable:
                    self._lost(replica)
                    if not left:
                        raise
        raise AssertionError("unreachable")

    async def stream(self, request: SampleRequest) -> AsyncIterator[SampledToken]:
        """Tokens as they are drawn; leaving the iterator withdraws the request. One whose sampler
        dies begins again only if it has given nothing yet."""
        with self._holding(request) as key, self.watch.request(request) as served:
            for left in self._attempts():
                replica, told = await self._chosen(request, key), False
                try:
                    with _carrying(replica, request, key):
                        await replica.catch_up()
                        tokens = replica.handle.stream("stream", request)
                        async with aclosing(tokens):  # type: ignore[type-var]
                            async for token in tokens:
                                told = True
                                served.drew(token.version)
                                yield token
                    return
                except Unavailable:
                    self._lost(replica)
                    if told or not left:
                        raise

    def _attempts(self) -> Iterator[int]:
        """How many are left, down to 0: all samplers there are may have died, and their successor
        may not; a request that kills each that takes it ends all the same."""
        return iter(range(len(self.replicas), -1, -1))

    @contextmanager
    def _holding(self, request: SampleRequest) -> Iterator[AdapterKey]:
        """The version that a request begins with is not forgotten while it is under way.

        Raises:
            Busy: as many requests as may be are under way.
            NotFound: the policy is not held.
        """
        if self._using.total() >= self.limits.max_requests:
            raise Busy(
                f"the samplers of {self.name} have {self._using.total()} requests under way: try "
                "again in a moment"
            )
        key = self.adapters.resolve(request.policy)
        self._using[key] += 1
        try:
            yield key
        finally:
            self._using[key] -= 1

    async def _chosen(self, request: SampleRequest, key: AdapterKey) -> Replica:
        running = await self._running()
        if len(running) == 1:
            return running[0]
        names = prefixes(request.prompt, key)
        replica = choose(running, self.prefixes.holder(names), key.run_id)
        self.prefixes.note(names, replica.number)
        return replica

    async def _sample_on(
        self, replica: Replica, request: SampleRequest, key: AdapterKey
    ) -> SampleResponse:
        with _carrying(replica, request, key):
            await replica.catch_up()
            name = str(next(self._numbers))
            try:
                return await Op(replica.handle.call("sample", request, name))
            except asyncio.CancelledError:
                replica.handle.call("withdraw", name)
                raise

    async def stats(self) -> dict[str, int]:
        """Sums over the samplers (what one cache has room for: of the smallest)."""
        each: list[dict[str, int]] = []
        while not each:
            for replica in await self._running():
                try:
                    each.append(await Op(replica.handle.call("stats")))
                except Unavailable:
                    self._lost(replica)
        least = ("num_blocks", "block_size")
        total = {name: sum(stats[name] for stats in each) for name in each[0]}
        return {
            **total,
            **{name: min(stats[name] for stats in each) for name in least},
            "replicas": len(self.replicas),
        }

    async def metrics(self) -> list[Metric]:
        return self.watch.collect()

    async def metrics_of_each(self) -> dict[str, list[Metric]]:
        """The samplers' own, by name."""
        samplers = {f"sampler {r.number}": r.handle for r in self.replicas}
        return await gather(samplers, patience_s=INNER_PATIENCE_S)


@contextmanager
def _carrying(replica: Replica, request: SampleRequest, key: AdapterKey) -> Iterator[None]:
    replica.load += request.num_samples
    replica.serving[key.run_id] += 1
    try:
        yield
    finally:
        replica.load -= request.num_samples
        replica.serving[key.run_id] -= 1


def _on_a_part(options: VllmOptions, share: float) -> VllmOptions:
    """vLLM takes nine tenths of a GPU's memory unless it is told not to."""
    return replace(options, more={"gpu_memory_utilization": round(0.9 * share, 3), **options.more})
