"""The Sampler actor: a sampling engine, behind one interface whichever it is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from prometheus_client.metrics_core import Metric

from ..engines.adapter_files import read_adapter
from ..engines.backbone import Backbone
from ..engines.base_weights import BaseWeights
from ..engines.sampler import SamplerEngine, default_kv_bytes
from ..engines.vllm_start import VllmOptions
from ..primitives.client import load_tokenizer
from ..primitives.types import LoraConfig, SampledToken, SampleRequest, SampleResponse
from .engine_thread import EngineThread
from .observed import Observed, own_notes
from .sampler_watch import SamplerWatch
from .threads import engine_device, set_engine_threads
from .withdrawal import Withdrawable


class Sampler(Withdrawable, Observed):
    """Serves one base model and any number of adapters. Wrapped by the controller with
    `ray.remote`.

    Args:
        model_path: folder of the base model.
        name: what the model is called in messages.
        num_threads: torch threads (None: one per CPU).
        kv_bytes: memory for keys and values (None: a quarter of what is free, at most 4 GiB; with
            vLLM on a GPU, its own share of the device).
        vllm: sample by vLLM, started so.
        weights, copies: of the torch engine's `Backbone`.
        reorder: of the `SamplerEngine`.
        home: where its notes for a crash report go (None: nowhere).
    """

    def __init__(
        self,
        model_path: str,
        *,
        name: str,
        num_threads: int | None = None,
        kv_bytes: int | None = None,
        vllm: VllmOptions | None = None,
        weights: BaseWeights = "auto",
        copies: Path | None = None,
        reorder: bool = False,
        home: str | None = None,
    ) -> None:
        super().__init__()
        self.observe("sampler")
        self.watch = SamplerWatch(self.meters, own_notes(home, f"sampler of {name}"))
        self.name = name
        if vllm is not None:
            self.engine: Any = _vllm_engine(model_path, kv_bytes, vllm)
        else:
            set_engine_threads(num_threads)
            backbone = Backbone(model_path, weights, engine_device(), copies=copies)
            self.engine = _torch_engine(backbone, kv_bytes, reorder)
            self.engine.engine.on_finished = self.watch.finished

    async def ping(self) -> str:
        """
        Raises:
            Unavailable: the engine died; the controller then starts another sampler.
        """
        await self.engine.check()
        return self.name

    async def sample(self, request: SampleRequest, name: str | None = None) -> SampleResponse:
        """`name`, unique among those under way, is what `withdraw` calls the request."""
        with self.under_way(name), self.watch.serving(request) as watched:
            return await self.engine.sample(watched)

    async def stream(self, request: SampleRequest) -> AsyncIterator[SampledToken]:
        """Tokens as they are drawn; leaving the iterator withdraws the request."""
        with self.watch.serving(request) as watched:
            async with aclosing(self.engine.stream(watched)) as tokens:
                async for token in tokens:
                    yield token

    async def add_adapter(
        self, run_id: str, version: int, config: LoraConfig, flat: np.ndarray, keep: bool
    ) -> None:
        """Take a version, given as its flat parameters; see `SamplerEngine.add_adapter`."""
        await self.engine.add_adapter(run_id, version, config, flat, keep)

    async def add_adapter_files(
        self, run_id: str, version: int, config: LoraConfig, files: Mapping[str, bytes]
    ) -> None:
        """Take a version from its PEFT files."""
        params = await asyncio.to_thread(read_adapter, files, self.engine.layout(config))
        await self.engine.add_adapter(run_id, version, config, params.numpy(), True)

    async def drop_run(self, run_id: str) -> None:
        await self.engine.drop_run(run_id)

    async def latest_version(self, run_id: str) -> int | None:
        return await self.engine.newest(run_id)

    async def stats(self) -> dict[str, int]:
        return asdict(self.engine.stats)

    async def metrics(self) -> list[Metric]:
        return self.watch.collect(asdict(self.engine.stats))


def _host_kv_bytes() -> int:
    return default_kv_bytes(psutil.virtual_memory().available)


def _vllm_kv_bytes(asked: int | None) -> int | None:
    """None: vLLM's own share of the GPU; the host's memory says nothing about it."""
    on_gpu = torch.cuda.is_available()
    return asked if asked is not None or on_gpu else _host_kv_bytes()


def _vllm_engine(model_path: str, kv_bytes: int | None, options: VllmOptions) -> Any:
    from .vllm_engine import VllmEngine

    tokenizer = load_tokenizer(model_path)
    return VllmEngine(model_path, tokenizer, kv_bytes=_vllm_kv_bytes(kv_bytes), options=options)


def _torch_engine(backbone: Backbone, kv_bytes: int | None, reorder: bool) -> Any:
    tokenizer = load_tokenizer(backbone.path)
    size = _host_kv_bytes() if kv_bytes is None else kv_bytes
    return EngineThread(SamplerEngine(backbone, tokenizer, kv_bytes=size, reorder=reorder))
