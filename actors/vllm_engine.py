"""Sampling by vLLM: its asynchronous engine behind the interface of the torch engine.

An adapter version reaches vLLM's workers in shared memory and is loaded there by vLLM's own code
(`engines/vllm_worker.py`). Requests name adapters by integer ids. A pinned version has one of its own. The live
requests of a run share one, whose weights are exchanged between two steps when a version is
published (`live_cache="keep"`), so that they go on under it with their cache as it is; or each
version has its own, and live requests are handed in again under it, so that their cache is computed
anew (`"recompute"`). Every version has a name of its own, which is part of the key of vLLM's prefix
cache: nothing computed under other weights serves a new request.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import transformers

from ..engines.adapter_files import adapter_config, peft_modules, tensor_places
from ..engines.adapter_store import BASE, AdapterKey, AdapterStore
from ..engines.lora import AdapterLayout
from ..engines.prompt_scores import PromptScores
from ..engines.requests import check_request, end_tokens
from ..engines.sampler import SamplerStats
from ..engines.shared_memory import SharedArray, SharedArrays
from ..engines.vllm_coverage import Coverage
from ..engines.vllm_start import VllmOptions, start_vllm
from ..primitives.errors import InvalidInput, NotFound, OutOfCapacity, TinsmithError
from ..primitives.types import LoraConfig, SampledToken, SampleRequest, SampleResponse
from .vllm_draw import Carried, Draw, Listener, Live, vllm_errors


@dataclass(frozen=True, eq=False)
class _Version:
    """A version that is held; vLLM's workers read its parameters where they are."""

    config: LoraConfig
    params: SharedArray

    def same_as(self, other: _Version) -> bool:
        return self.config == other.config and np.array_equal(
            self.params.values, other.params.values
        )


@dataclass(eq=False)
class _Request:
    """One under way, by the task that waits for it."""

    run_id: str
    task: asyncio.Task[Any]
    dropped: bool = False
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class VllmEngine:
    """All methods on one event loop.

    Args:
        model_path: folder of the base model.
        tokenizer: for end tokens and stop strings.
        kv_bytes: memory for keys and values; None: vLLM's own share of the device.

    Raises:
        InvalidInput: vLLM cannot run this model, or not with adapters.
        Unavailable: vLLM is not installed or did not start.
    """

    def __init__(
        self,
        model_path: str,
        tokenizer: Any,
        *,
        kv_bytes: int | None = None,
        options: VllmOptions | None = None,
    ) -> None:
        config = transformers.AutoConfig.from_pretrained(model_path)
        self.tokenizer, self.options = tokenizer, options or VllmOptions()
        self.vocab_size: int = config.vocab_size
        self.max_context: int = config.max_position_embeddings
        self.coverage = Coverage.of(model_path, self.options)
        self.coverage.check_model()
        self.end_tokens = end_tokens(model_path, tokenizer)
        self.vllm = start_vllm(
            model_path, self.max_context, kv_bytes, self.options, self.coverage.modules()
        )
        cache = self.vllm.vllm_config.cache_config
        self.stats = SamplerStats(num_blocks=cache.num_gpu_blocks or 0, block_size=cache.block_size)
        self.names = (str(number) for number in itertools.count())  # of vLLM's requests
        self.adapters: AdapterStore[_Version] = AdapterStore()
        self._memory = SharedArrays()
        self._kinds: set[str] = set()  # that they know
        self._numbers = itertools.count(1)
        self._live: dict[str, Live] = {}
        self._pinned: dict[AdapterKey, int] = {}  # integer ids
        self._using: Counter[AdapterKey] = Counter()
        self._moved: set[Live] = set()  # but still carried
        self._requests: set[_Request] = set()
        self._changing = asyncio.Lock()  # adapters, in the workers
        self._epoch = 0
        self._prepared = False

    def close(self) -> None:
        self.vllm.shutdown()
        del self.vllm  # at the interpreter's end, its `__del__` would find its modules gone

    async def check(self) -> None:
        """
        Raises:
            Unavailable: vLLM's engine died.
        """
        with vllm_errors():
            await self.vllm.check_health()

    def layout(self, config: LoraConfig) -> AdapterLayout:
        return AdapterLayout.of(config, self.coverage.targets)

    # ---- adapters ----

    async def add_adapter(
        self, run_id: str, version: int, config: LoraConfig, flat: np.ndarray, keep: bool = True
    ) -> None:
        """Hold a version (flat float32 parameters); it becomes the run's newest. `keep=False`
        lets it go once a newer one is there and no request uses it.

        Raises:
            InvalidInput: another number of parameters, or vLLM cannot serve it all.
        """
        layout = self.layout(config)
        if flat.shape != (layout.size,):
            raise InvalidInput(
                f"adapter of run {run_id!r}: {tuple(flat.shape)} parameters, expected {layout.size}"
            )
        self.coverage.check(config)
        async with self._changing:
            await self._prepare()
            kind = await self._kind(layout)
            adapter = _Version(config, self._memory.take(flat))
            key = self.adapters.key_for(run_id, version, adapter)
            async with self._between_steps(key, self._stage(key, kind, adapter.params)):
                self.adapters.add(key, adapter, keep)  # only what the workers have
                await self._go_live(key)
                await self._sweep()

    async def _stage(self, key: AdapterKey, kind: str, params: SharedArray) -> None:
        if self.adapters.holds(key):
            self._memory.give_back(params)
            return
        try:
            await self._workers("stage_adapter", _name(key), kind, params.path)
        except BaseException:
            await self._workers("drop_adapters", [_name(key)], [])
            self._memory.give_back(params)
            raise

    async def _prepare(self) -> None:
        if not self._prepared:
            await self._workers("prepare_adapters")
            self._prepared = True

    async def _kind(self, layout: AdapterLayout) -> str:
        """What the workers know adapters of that layout as.

        Raises:
            InvalidInput: no worker adapts one of its layers.
        """
        kind = str(hash((replace(layout.config, seed=None), *layout.targets)))
        if kind not in self._kinds:
            unserved = await self._workers("unserved_modules", peft_modules(layout))
            self.coverage.refuse(set.intersection(*map(set, unserved)))
            described = adapter_config(layout, base_model=""), tensor_places(layout)
            await self._workers("describe_adapters", kind, *described)
            self._kinds.add(kind)
        return kind

    async def _workers(self, method: str, *args: Any) -> list[Any]:
        """What each of vLLM's workers answers."""
        try:
            with vllm_errors():
                return await self.vllm.collective_rpc(method, args=args)
        except TinsmithError:
            raise
        except Exception as error:  # vLLM passes on only what it says
            raise TinsmithError(f"{method} failed in vLLM's workers: {error}") from error

    @asynccontextmanager
    async def _between_steps(
        self, key: AdapterKey, staging: Coroutine[Any, Any, None]
    ) -> AsyncIterator[None]:
        """No step meanwhile if the weights of live requests are exchanged: a token's version is the
        one that drew it. All of the change is made there, as each call would wait for a step; only
        staging need not wait for the pause."""
        live = self._live.get(key.run_id)
        if live is None or live.key == key or self.options.live_cache == "recompute":
            await staging
            yield
            return
        pausing = self.vllm.engine_core.pause_scheduler_async(mode="keep", clear_cache=False)
        try:
            await asyncio.gather(pausing, staging)
            yield
        finally:
            await self.vllm.resume_generation()

    async def _go_live(self, key: AdapterKey) -> None:
        """Make a version the one that its run's live requests go on under."""
        live = self._live.get(key.run_id)
        if live is not None and live.key == key:
            return
        if live is None or self.options.live_cache == "recompute":
            new = Live(next(self._numbers), key, [(0, key.version)])
            await self._workers("point_adapter", new.number, _name(key))
            self._live[key.run_id] = new
            if live is not None:
                await self._retire(live)
            return
        self._epoch += 1
        await asyncio.gather(  # one after the other there
            self._workers("point_adapter", live.number, _name(key)),
            self.vllm.update_weight_version(str(self._epoch)),
        )
        live.key = key
        live.versions.append((self._epoch, key.version))

    async def _retire(self, live: Live) -> None:
        """Nothing new carries it; forget it in the workers once nothing does."""
        live.moved = True
        if live.users:
            self._moved.add(live)
        else:
            self._moved.discard(live)
            await self._workers("drop_adapters", [], [live.number])

    async def drop_run(self, run_id: str) -> None:
        """Forget a run's weights; its requests under way fail."""
        self.adapters.drop_run(run_id)
        requests = [request for request in self._requests if request.run_id == run_id]
        for request in requests:
            request.dropped = True
            request.task.cancel()
        for request in requests:  # no step may ask for weights that are gone
            await request.ended.wait()
        async with self._changing:
            live = self._live.pop(run_id, None)
            if live is not None:
                await self._retire(live)
            await self._sweep()

    async def newest(self, run_id: str) -> int | None:
        return self.adapters.newest(run_id)

    async def _sweep(self) -> None:
        gone = self.adapters.sweep({*+self._using, *(live.key for live in self._moved)})
        numbers = [self._pinned.pop(key) for key in gone if key in self._pinned]
        if gone:
            await self._workers("drop_adapters", [_name(key) for key in gone], numbers)
        for adapter in gone.values():
            self._memory.give_back(adapter.params)

    # ---- requests ----

    async def sample(self, request: SampleRequest) -> SampleResponse:
        """
        Raises:
            InvalidInput: token ids out of range, or beyond the model's context.
            NotFound: the policy is not held, or its run was closed meanwhile.
            OutOfCapacity: it could never fit into the cache.
            Unavailable: vLLM's engine died.
        """
        draws = self._draws(request)
        async with self._under_way(request) as key:
            await _all_of(draws, key)
        scores = draws[0].scores
        return SampleResponse(
            [draw.sequence() for draw in draws],
            scores.logprobs,
            scores.top,
            scores.targets,
            scores.alternatives,
            draws[0].cached,
        )

    async def stream(self, request: SampleRequest) -> AsyncIterator[SampledToken]:
        """Tokens as they are drawn; leaving the iterator withdraws the request."""
        arrived: asyncio.Queue[SampledToken | None] = asyncio.Queue()
        draws = self._draws(request, arrived.put_nowait)
        async with self._under_way(request) as key:
            running = asyncio.create_task(_all_of(draws, key))
            running.add_done_callback(lambda _: arrived.put_nowait(None))
            try:
                while (token := await arrived.get()) is not None:
                    yield token
                await running
            finally:
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)

    def _draws(self, request: SampleRequest, listener: Listener | None = None) -> list[Draw]:
        max_tokens = check_request(request, self.vocab_size, self.max_context)
        if request.params.return_routed_experts:
            raise InvalidInput(
                "return_routed_experts: only the torch engine tells; connect with engine='torch'"
            )
        longest = len(request.prompt) + max_tokens
        needed = -(-(longest - 1) // self.stats.block_size)
        if needed > self.stats.num_blocks:
            raise OutOfCapacity(
                f"a sample of up to {longest} tokens needs {needed} cache blocks, the sampler has "
                f"{self.stats.num_blocks}; lower max_tokens, or give it more kv_bytes"
            )
        seed = secrets.randbits(63) if request.params.seed is None else request.params.seed
        scores = PromptScores(request, seed)
        return [
            Draw(self, request, index, max_tokens, scores, listener)
            for index in range(request.num_samples)
        ]

    @asynccontextmanager
    async def _under_way(self, request: SampleRequest) -> AsyncIterator[AdapterKey]:
        """Holds the version that a request begins with, and ends the request with its run."""
        key, task = self.adapters.resolve(request.policy), asyncio.current_task()
        assert task is not None
        mine = _Request(key.run_id, task)
        self._requests.add(mine)
        self._using[key] += 1
        self.stats.requests += 1
        self.stats.running += 1
        try:
            if not self._prepared:
                async with self._changing:
                    await self._prepare()
            if key != BASE and request.policy.version is not None:
                await self._pin(key)
            yield key
        except asyncio.CancelledError:
            if not mine.dropped:
                raise
            task.uncancel()
            raise NotFound(f"run {key.run_id!r} was closed while it sampled") from None
        finally:
            self.stats.running -= 1
            self._using[key] -= 1
            self._requests.discard(mine)
            mine.ended.set()

    async def _pin(self, key: AdapterKey) -> None:
        async with self._changing:
            if key not in self._pinned:
                number = next(self._numbers)
                await self._workers("point_adapter", number, _name(key))
                self._pinned[key] = number

    def carried(self, key: AdapterKey, pinned: bool) -> Carried:
        """What a request that began with that version now carries for vLLM."""
        if key == BASE:
            return Carried("", 0, 0)
        if pinned:
            return Carried(_name(key), self._pinned[key], key.version)
        live = self._live[key.run_id]
        # vLLM takes requests of one name for requests of one id.
        return Carried(f"{_name(live.key)} live", live.number, live.key.version, live)

    @asynccontextmanager
    async def carrying(self, carried: Carried) -> AsyncIterator[None]:
        """While one of vLLM's requests carries an adapter, it stays in the workers."""
        live = carried.live
        if live is None:
            yield
            return
        live.users += 1
        try:
            yield
        finally:
            live.users -= 1
            if live.moved and not live.users:
                async with self._changing:
                    await self._retire(live)


def _name(key: AdapterKey) -> str:
    """Of an adapter in vLLM; `serial` alone would do."""
    return f"{key.run_id}@{key.version}#{key.serial}"


async def _all_of(draws: list[Draw], key: AdapterKey) -> None:
    tasks = [asyncio.create_task(draw.run(key)) for draw in draws]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)  # vLLM has been told
