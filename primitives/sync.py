"""The same clients, blocking: `client.sync.method(...)` returns what `await client.method(...)`
would. Works in plain scripts and in notebooks, whose own event loop is left alone."""

from __future__ import annotations

import asyncio
import functools
import inspect
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator
from typing import Any

from .op import Op


@functools.cache
def _background_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="tinsmith-sync", daemon=True).start()
    return loop


def run_blocking(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine to its end on the background event loop."""
    return asyncio.run_coroutine_threadsafe(coroutine, _background_loop()).result()


def later(seconds: float, call: Callable[[], None]) -> None:
    """Make a call, that does not block, on the background event loop."""
    loop = _background_loop()
    loop.call_soon_threadsafe(loop.call_later, seconds, call)


def _drain(iterator: AsyncIterator[Any]) -> Iterator[Any]:
    async def advance() -> Any:
        return await anext(iterator)

    try:
        while True:
            try:
                yield run_blocking(advance())
            except StopAsyncIteration:
                return
    finally:
        if isinstance(iterator, AsyncGenerator):
            run_blocking(iterator.aclose())


def _settle(value: Any) -> Any:
    if isinstance(value, Op):
        value = value.result()
    elif inspect.iscoroutine(value):
        value = run_blocking(value)
    elif hasattr(value, "__anext__"):
        return _drain(value)
    return value.sync if isinstance(value, HasSync) else value


def _unwrap(value: Any) -> Any:
    return value.client if isinstance(value, SyncClient) else value


class HasSync:
    """A client whose methods are also there blocking, under `.sync`."""

    @property
    def sync(self) -> SyncClient:
        return SyncClient(self)


class SyncClient:
    """Blocking view of an asyncio client. Clients that it returns are blocking views too."""

    def __init__(self, client: HasSync) -> None:
        self.client = client

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # pickle and copy look for these before `client` is there
            raise AttributeError(name)
        attribute = getattr(self.client, name)
        if not callable(attribute):
            return attribute

        @functools.wraps(attribute)
        def blocking(*args: Any, **kwargs: Any) -> Any:
            named = {name: _unwrap(value) for name, value in kwargs.items()}
            return _settle(attribute(*map(_unwrap, args), **named))

        return blocking

    def __dir__(self) -> list[str]:
        return dir(self.client)

    def __enter__(self) -> SyncClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{self.client!r}.sync"
