"""Faults, done from outside: nothing in the service knows of them."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Awaitable, Callable

import psutil

from . import processes
from .disk import Disk
from .proxy import Proxy
from .schedule import Fault


class NotThere(Exception):
    """No process of that name is there just now: it has ended, or not come back yet."""


class Faults:
    """Does them, each with the method of its action."""

    def __init__(self, proxy: Proxy, disk: Disk) -> None:
        self.proxy, self.disk = proxy, disk
        self._lasting: set[asyncio.Task[None]] = set()
        self._full = 0
        self._still: dict[int, int] = {}  # stopped processes, and by how many faults

    async def do(self, fault: Fault) -> None:
        """Returns once it has begun.

        Raises:
            NotThere: there is nothing to do it to.
        """
        await getattr(self, "_" + fault.action.replace(" ", "_"))(fault)

    async def over(self) -> None:
        """Wait until nothing is stopped, full or turned away any more."""
        while self._lasting:
            await asyncio.wait(self._lasting)

    def _later(self, seconds: float, undo: Callable[[], Awaitable[None]]) -> None:
        async def wait() -> None:
            try:
                await asyncio.sleep(seconds)
            finally:
                await undo()

        task = asyncio.create_task(wait())
        self._lasting.add(task)
        task.add_done_callback(self._lasting.discard)

    async def _chosen(self, fault: Fault) -> psutil.Process:
        found = await asyncio.to_thread(processes.find, fault.target)
        if not found:
            raise NotThere
        return found[int(fault.pick * len(found))]

    # ---- processes ----

    async def _kill(self, fault: Fault) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            (await self._chosen(fault)).kill()

    async def _stop(self, fault: Fault) -> None:
        process = await self._chosen(fault)

        async def go_on() -> None:
            self._still[process.pid] -= 1
            if not self._still[process.pid]:
                _signal(process, signal.SIGCONT)

        self._still[process.pid] = self._still.get(process.pid, 0) + 1
        _signal(process, signal.SIGSTOP)
        self._later(fault.seconds, go_on)

    # ---- disks ----

    async def _refuse_growth(self, fault: Fault) -> None:
        """The process's files may not grow: EFBIG."""
        process = await self._chosen(fault)

        async def allow() -> None:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.rlimit(psutil.RLIMIT_FSIZE, (psutil.RLIM_INFINITY, psutil.RLIM_INFINITY))

        with contextlib.suppress(psutil.NoSuchProcess):
            process.rlimit(psutil.RLIMIT_FSIZE, (1, psutil.RLIM_INFINITY))
        self._later(fault.seconds, allow)

    async def _fill(self, fault: Fault) -> None:
        """The whole home is full, for all processes: ENOSPC."""
        self._full += 1
        await asyncio.to_thread(self.disk.fill)

        async def empty() -> None:
            self._full -= 1
            if not self._full:
                await asyncio.to_thread(self.disk.empty)

        self._later(fault.seconds, empty)

    # ---- connections ----

    async def _cut(self, fault: Fault) -> None:
        self.proxy.cut()

    async def _cut_answers(self, fault: Fault) -> None:
        self.proxy.cut_answers()

    async def _turn_away(self, fault: Fault) -> None:
        self.proxy.turn_away(fault.seconds)


def _signal(process: psutil.Process, number: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)
