"""Ending a loop early, in order: by a signal, and without leaving work behind."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")


async def unless(stop: asyncio.Event, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`, or None where `stop` is set first; `work` is cancelled then."""
    stopping, working = asyncio.create_task(stop.wait()), asyncio.create_task(work)
    try:
        await asyncio.wait((stopping, working), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        stopping.cancel()
        working.cancel()
        await asyncio.gather(stopping, working, return_exceptions=True)


@contextmanager
def stop_on_signals() -> Iterator[asyncio.Event]:
    """An event that the first Ctrl-C or SIGTERM sets; the second acts as ever."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    handled: list[tuple[signal.Signals, Any]] = []

    def restore() -> None:
        while handled:
            number, previous = handled.pop()
            loop.remove_signal_handler(number)
            signal.signal(number, previous)

    def request_stop() -> None:
        stop.set()
        restore()

    for number in (signal.SIGINT, signal.SIGTERM):
        previous = signal.getsignal(number)
        try:
            loop.add_signal_handler(number, request_stop)
        except (ValueError, RuntimeError, NotImplementedError):
            continue  # not in the main thread (a notebook's .sync, for instance)
        handled.append((number, previous))
    try:
        yield stop
    finally:
        restore()


class Meanwhile:
    """Work beside a loop, one piece at a time. An async context manager; leaving it cancels what is
    still under way."""

    def __init__(self) -> None:
        self._task: asyncio.Task[Any] | None = None

    async def __aenter__(self) -> Meanwhile:
        return self

    async def start(self, work: Coroutine[Any, Any, Any]) -> None:
        """Begin `work`; the piece before it is waited for, and its error raised here."""
        try:
            await self.finish()
        except BaseException:
            work.close()
            raise
        self._task = asyncio.create_task(work)

    async def finish(self) -> None:
        """Wait for the piece under way, if any, and raise its error."""
        if self._task is not None:
            await self._task
            self._task = None

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
