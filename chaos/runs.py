"""A training run as a tenant sees it: through Tinsmith's own client, or through Tinker's over HTTP."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import warnings
from collections.abc import Awaitable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..primitives.client import SamplingClient, ServiceClient, TrainingClient
from ..primitives.errors import StorageFailure, Unavailable
from ..primitives.paths import CheckpointPath
from ..primitives.types import SamplingParams
from .ledger import Result
from .script import ADAM, PROMPT, SAMPLED_TOKENS, Step

SAMPLES = 2
# What a StorageFailure says, and what is told of requests that the server was at when it was killed,
# where only words come through.
_REFUSALS = ("cannot be written", "could not be kept", "it was refused", "the server stopped")


class Refused(Exception):
    """An operation was refused for want of a disk, or lost on its way, and not done."""


class Run(Protocol):
    """`submit`, `save` and `load` send an operation when they are called, and return what awaits its
    result. All raise `Refused`."""

    run_id: str

    def submit(self, step: Step) -> Awaitable[Result]: ...

    def save(self, name: str) -> Awaitable[str]: ...

    def load(self, path: str) -> Awaitable[object]: ...

    async def publish(self) -> Any:
        """A sampler of the weights as they are now."""

    async def sample(self, sampler: Any, seed: int) -> Result: ...

    async def close(self, service: ServiceClient) -> None: ...


class OwnRun:
    """`live`: it samples from whatever is newest, so that every step publishes."""

    def __init__(self, training: TrainingClient, live: bool) -> None:
        self.training, self.run_id = training, training.run_id
        self.live = training.live_sampling_client() if live else None

    @classmethod
    async def open(cls, service: ServiceClient, model: str, rank: int, live: bool) -> OwnRun:
        return cls(await service.create_lora_training_client(model, rank=rank, seed=rank), live)

    def submit(self, step: Step) -> Awaitable[Result]:
        if step.kind == "optim_step":
            op: Any = self.training.optim_step(ADAM)
        else:
            op = getattr(self.training, step.kind)(list(step.data), step.loss_fn)
        return self._result(step.kind, op)

    async def _result(self, kind: str, op: Any) -> Result:
        done = await _own(op)
        if kind == "optim_step":
            return {"grad_norm": np.asarray(done.metrics["grad_norm"])}
        return _batch(done.metrics, [out["logprobs"] for out in done.loss_fn_outputs])

    async def _path(self, op: Any) -> str:
        return (await _own(op)).path

    def save(self, name: str) -> Awaitable[str]:
        return self._path(self.training.save_state(name))

    def load(self, path: str) -> Awaitable[object]:
        return _own(self.training.load_state_with_optimizer(path))

    async def publish(self) -> SamplingClient:
        if self.live is not None:
            return self.live
        return await _own(self.training.save_weights_and_get_sampling_client())

    async def sample(self, sampler: SamplingClient, seed: int) -> Result:
        params = SamplingParams(max_tokens=SAMPLED_TOKENS, stop=[], seed=seed)
        response = await _own(sampler.sample(PROMPT, SAMPLES, params))
        return _samples([s.tokens for s in response.sequences])

    async def close(self, service: ServiceClient) -> None:
        await service.close_training_run(self.run_id)


async def _own(op: Any) -> Any:
    try:
        return await op
    except StorageFailure as error:
        raise Refused(str(error)) from None


class TinkerRun:
    """Through the official SDK, whose calls block until they are sent."""

    def __init__(self, client: Any, training: Any) -> None:
        self.client, self.training, self.run_id = client, training, training.model_id

    @classmethod
    async def open(cls, url: str, model: str, rank: int) -> TinkerRun:
        os.environ.setdefault("TINKER_TELEMETRY", "0")
        import tinker

        # It tells of every connection that is dropped.
        logging.getLogger("tinker").setLevel(logging.CRITICAL)
        warnings.filterwarnings("ignore", category=FutureWarning, module="tinker")
        client = await asyncio.to_thread(
            tinker.ServiceClient, base_url=url, api_key="tml-of-the-campaign"
        )
        # Blocks until there is a session, which comes through the proxy of this event loop.
        future = await asyncio.to_thread(
            client.create_lora_training_client, model, rank=rank, seed=rank
        )
        return cls(client, await future)

    def submit(self, step: Step) -> Awaitable[Result]:
        from tinker import types

        if step.kind == "optim_step":
            adam = types.AdamParams(
                learning_rate=ADAM.learning_rate,
                beta1=ADAM.beta1,
                beta2=ADAM.beta2,
                eps=ADAM.eps,
                weight_decay=ADAM.weight_decay,
                grad_clip_norm=ADAM.grad_clip_norm,
            )
            return self._result(step.kind, self.training.optim_step(adam))
        data = [
            types.Datum(
                model_input=types.ModelInput.from_ints(datum.model_input.to_ints()),
                loss_fn_inputs={
                    name: types.TensorData.from_numpy(array)
                    for name, array in datum.loss_fn_inputs.items()
                },
            )
            for datum in step.data
        ]
        return self._result(step.kind, getattr(self.training, step.kind)(data, step.loss_fn))

    async def _result(self, kind: str, future: Any) -> Result:
        done = await _tinkers(future)
        if kind == "optim_step":
            return {"grad_norm": np.asarray(done.metrics["grad_norm"])}
        return _batch(done.metrics, [out["logprobs"].to_numpy() for out in done.loss_fn_outputs])

    async def _path(self, future: Any) -> str:
        return (await _tinkers(future)).path

    def save(self, name: str) -> Awaitable[str]:
        return self._path(self.training.save_state(name))

    def load(self, path: str) -> Awaitable[object]:
        return _tinkers(self.training.load_state_with_optimizer(path))

    async def publish(self) -> Any:
        return await _tinkers(self.training.save_weights_and_get_sampling_client())

    async def sample(self, sampler: Any, seed: int) -> Result:
        from tinker import types

        params = types.SamplingParams(max_tokens=SAMPLED_TOKENS, stop=[], seed=seed)
        prompt = types.ModelInput.from_ints(PROMPT)
        response = await _tinkers(sampler.sample(prompt, SAMPLES, params))
        return _samples([np.asarray(s.tokens) for s in response.sequences])

    async def close(self, service: ServiceClient) -> None:
        await (await asyncio.to_thread(self.client.close, "success"))


async def _tinkers(future: Any) -> Any:
    import tinker

    try:
        return await future
    except tinker.RequestFailedError as error:
        if any(words in error.message for words in _REFUSALS):
            raise Refused(error.message) from None
        raise


def _batch(metrics: Any, logprobs: list[np.ndarray]) -> Result:
    told = {f"logprobs {i}": array for i, array in enumerate(logprobs)}
    return {**told, "loss": np.asarray(metrics["loss:sum"])}


def _samples(tokens: list[np.ndarray]) -> Result:
    return {f"tokens {i}": array for i, array in enumerate(tokens)}


async def insist(attempt: Any, *args: Any, seconds: float = 120.0) -> tuple[Any, int]:
    """`await attempt(*args)`, again while it is refused; also returns how often it was.

    Raises:
        Refused: for longer than that.
    """
    refused, ending = 0, asyncio.get_running_loop().time() + seconds
    while True:
        try:
            return await attempt(*args), refused
        except (Refused, Unavailable):
            if asyncio.get_running_loop().time() > ending:
                raise
            refused += 1
            await asyncio.sleep(0.1)


def manifest(home: str, path: str) -> dict[str, Any]:
    """Of the checkpoint `tinker://…`."""
    return json.loads((folder(home, path) / "manifest.json").read_text())


def folder(home: str, path: str) -> Path:
    return Path(home, CheckpointPath.parse(path).folder)
