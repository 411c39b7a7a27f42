"""The Sampler actor: one thread steps the engine while there is work; callers wait on futures.

Calls reach the engine between two steps, through a queue, so nothing else ever touches it.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Future
from dataclasses import asdict
from typing import Any

import numpy as np
import psutil
import torch

from ..engines.adapter_files import read_adapter
from ..engines.backbone import Backbone
from ..engines.sampler import Event, SamplerEngine, default_kv_bytes
from ..primitives.client import load_tokenizer
from ..primitives.errors import OpCancelled, TinsmithError, Unavailable
from ..primitives.types import LoraConfig, SampledToken, SampleRequest, SampleResponse
from .threads import set_engine_threads

Listener = Callable[[Event], None]


class Sampler:
    """Serves one base model and any number of adapters. Wrapped by the controller with
    `ray.remote`.

    Args:
        model_path: folder of the base model.
        name: what the model is called in messages.
        num_threads: torch threads (None: one per CPU).
        kv_bytes: memory for keys and values (None: a quarter of what is free, at most 4 GiB).
    """

    def __init__(
        self,
        model_path: str,
        *,
        name: str,
        num_threads: int | None = None,
        kv_bytes: int | None = None,
    ) -> None:
        self.name = name
        set_engine_threads(num_threads)
        memory = (
            default_kv_bytes(psutil.virtual_memory().available) if kv_bytes is None else kv_bytes
        )
        self.engine = SamplerEngine(
            Backbone(model_path), load_tokenizer(model_path), kv_bytes=memory
        )
        self.calls: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        self.listeners: dict[int, Listener] = {}
        self.named: dict[str, asyncio.Task[Any]] = {}
        threading.Thread(target=self._run, name="engine", daemon=True).start()

    # ---- the engine's thread ----

    def _run(self) -> None:
        while True:
            self._take_calls(block=not self.engine.busy)
            if not self.engine.busy:
                continue
            try:
                events = self.engine.step()
            except Exception as error:
                failure = TinsmithError(f"sampling failed: {type(error).__name__}: {error}")
                failure.__cause__ = error
                self.engine.fail_all(failure)
                continue
            for event in events:
                listener = self.listeners.get(event.request)
                if event.token is None:
                    self.listeners.pop(event.request, None)
                if listener is not None:
                    listener(event)

    def _take_calls(self, block: bool) -> None:
        """Run the calls that have come in; with `block`, wait for one."""
        while True:
            try:
                function, future = self.calls.get(block=block)
            except queue.Empty:
                return
            block = False
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

    async def _in_engine(self, function: Callable[..., Any], *args: Any) -> Any:
        future: Future[Any] = Future()
        self.calls.put((lambda: function(*args), future))
        # Shielded: what has been handed to the engine is done there.
        return await asyncio.shield(asyncio.wrap_future(future))

    def _submit(self, request: SampleRequest, streaming: bool, listener: Listener) -> int:
        number = self.engine.submit(request, streaming)
        self.listeners[number] = listener
        return number

    def _withdraw(self, submitted: Future[int]) -> None:
        """Queued behind the submission, which is therefore done."""
        if submitted.exception() is None:
            self.listeners.pop(submitted.result(), None)
            self.engine.cancel(submitted.result())

    # ---- calls ----

    async def ping(self) -> str:
        return self.name

    async def sample(self, request: SampleRequest, name: str | None = None) -> SampleResponse:
        """`name`, unique among those under way, is what `withdraw` calls the request."""
        task = asyncio.current_task()
        if name is not None and task is not None:
            self.named[name] = task
        try:
            async for event in self._events(request, streaming=False):
                if event.response is not None:
                    return event.response
        except asyncio.CancelledError:
            raise OpCancelled("the sampling request was withdrawn") from None
        finally:
            self.named.pop(name, None)  # type: ignore[arg-type]
        raise Unavailable("the request ended without a response")

    async def withdraw(self, name: str) -> bool:
        """End the request of that name; it raises `OpCancelled`. False if it is not under way."""
        task = self.named.get(name)
        if task is None:
            return False
        task.cancel()
        return True

    async def stream(self, request: SampleRequest) -> AsyncIterator[SampledToken]:
        """Tokens as they are drawn; leaving the iterator withdraws the request."""
        async for event in self._events(request, streaming=True):
            if event.token is not None:
                yield event.token

    async def _events(self, request: SampleRequest, streaming: bool) -> AsyncIterator[Event]:
        loop = asyncio.get_running_loop()
        arrived: asyncio.Queue[Event] = asyncio.Queue()

        def listen(event: Event) -> None:
            loop.call_soon_threadsafe(arrived.put_nowait, event)

        submitted: Future[int] = Future()
        self.calls.put((lambda: self._submit(request, streaming, listen), submitted))
        finished = False
        try:
            await asyncio.shield(asyncio.wrap_future(submitted))
            while not finished:
                event = await arrived.get()
                finished = event.token is None
                if event.error is not None:
                    raise event.error
                yield event
        finally:
            if not finished:
                self.calls.put((lambda: self._withdraw(submitted), Future()))

    async def add_adapter(
        self, run_id: str, version: int, config: LoraConfig, flat: np.ndarray, keep: bool
    ) -> None:
        """Take a version, given as its flat parameters; see `SamplerEngine.add_adapter`."""
        # A copy: what Ray hands over is read-only memory shared with other processes.
        params = torch.tensor(flat)
        await self._in_engine(self.engine.add_adapter, run_id, version, config, params, keep)

    async def add_adapter_files(
        self, run_id: str, version: int, config: LoraConfig, files: Mapping[str, bytes]
    ) -> None:
        """Take a version from its PEFT files."""
        params = await asyncio.to_thread(read_adapter, files, self.engine.backbone.layout(config))
        await self._in_engine(self.engine.add_adapter, run_id, version, config, params, True)

    async def drop_run(self, run_id: str) -> None:
        await self._in_engine(self.engine.drop_run, run_id)

    async def latest_version(self, run_id: str) -> int | None:
        return await self._in_engine(self.engine.adapters.newest, run_id)

    async def stats(self) -> dict[str, int]:
        return await self._in_engine(lambda: asdict(self.engine.stats))
