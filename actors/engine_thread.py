"""The torch engine as asyncio sees it: one thread steps it while there is work; callers wait.

Calls reach the engine between two steps, through a queue, so nothing else ever touches it.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

import numpy as np
import torch

from ..engines.lora import AdapterLayout
from ..engines.sampler import Event, SamplerEngine, SamplerStats
from ..primitives.errors import TinsmithError, Unavailable
from ..primitives.types import LoraConfig, SampledToken, SampleRequest, SampleResponse

Listener = Callable[[Event], None]

logger = logging.getLogger(__name__)


class EngineThread:
    """Has the methods of `VllmEngine`; they raise what the engine's raise."""

    def __init__(self, engine: SamplerEngine) -> None:
        self.engine = engine
        self.stats: SamplerStats = engine.stats
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        self._listeners: dict[int, Listener] = {}
        threading.Thread(target=self._run, name="engine", daemon=True).start()

    async def check(self) -> None:
        """Its thread outlives what goes wrong in a step: nothing to find out."""

    def layout(self, config: LoraConfig) -> AdapterLayout:
        return self.engine.backbone.layout(config)

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
                listener = self._listeners.get(event.request)
                if event.token is None:
                    self._listeners.pop(event.request, None)
                if listener is not None:
                    listener(event)

    def _take_calls(self, block: bool) -> None:
        """Run the calls that have come in; with `block`, wait for one."""
        while True:
            try:
                function, future = self._calls.get(block=block)
            except queue.Empty:
                return
            block = False
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

    async def _in_engine(self, function: Callable[..., Any], *args: Any) -> Any:
        # Shielded: what has been handed to the engine is done there.
        return await asyncio.shield(asyncio.wrap_future(self._later(function, *args)))

    def _later(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        """Before any call that comes after this one."""
        future: Future[Any] = Future()
        self._calls.put((lambda: function(*args), future))
        return future

    def _submit(self, request: SampleRequest, streaming: bool, listener: Listener) -> int:
        number = self.engine.submit(request, streaming)
        self._listeners[number] = listener
        return number

    def _withdraw(self, submitted: Future[int]) -> None:
        """Queued behind the submission, which is therefore done."""
        if submitted.exception() is None:
            self._listeners.pop(submitted.result(), None)
            self.engine.cancel(submitted.result())

    # ---- calls ----

    async def sample(self, request: SampleRequest) -> SampleResponse:
        async for event in self._events(request, streaming=False):
            if event.response is not None:
                return event.response
        raise Unavailable("the request ended without a response")

    async def stream(self, request: SampleRequest) -> AsyncIterator[SampledToken]:
        async for event in self._events(request, streaming=True):
            if event.token is not None:
                yield event.token

    async def _events(self, request: SampleRequest, streaming: bool) -> AsyncIterator[Event]:
        loop = asyncio.get_running_loop()
        arrived: asyncio.Queue[Event] = asyncio.Queue()

        def listen(event: Event) -> None:
            loop.call_soon_threadsafe(arrived.put_nowait, event)

        submitted: Future[int] = self._later(self._submit, request, streaming, listen)
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
                self._later(self._withdraw, submitted)

    async def add_adapter(
        self, run_id: str, version: int, config: LoraConfig, flat: np.ndarray, keep: bool = True
    ) -> None:
        """Returns without waiting for the step under way, which goes on under the weights that it has:
        every call that comes later finds the version there."""
        # A copy: what Ray hands over is read-only memory shared with other processes.
        adapter = self.engine.adapter_of(run_id, config, torch.tensor(flat))
        added = self._later(self.engine.hold, run_id, version, adapter, keep)
        added.add_done_callback(partial(_report, f"version {version} of run {run_id}"))

    async def drop_run(self, run_id: str) -> None:
        await self._in_engine(self.engine.drop_run, run_id)

    async def newest(self, run_id: str) -> int | None:
        return await self._in_engine(self.engine.adapters.newest, run_id)


def _report(what: str, added: Future[Any]) -> None:
    if added.exception() is not None:
        logger.error("%s is not there: %s", what, added.exception())
