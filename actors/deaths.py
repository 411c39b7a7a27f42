"""Actors that die are missed at once, and what they were doing is told.

A call that never returns waits at every actor that is watched; Ray ends it when the process ends.
What was ended on purpose (`ray.kill`) is no crash.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import Awaitable, Callable

from ..primitives.errors import TinsmithError, Unavailable
from ..primitives.op import Op
from ..primitives.types import Crash, Interrupted
from .handle import RayHandle
from .notes import Doing, read_notes

Report = Callable[[Crash], Awaitable[None]]
_ON_PURPOSE = "killed by `ray.kill`"
_EXIT = re.compile(
    r"Worker exit type: (\S+) Worker exit detail: (.*?)(?: Some common causes|$)", re.S
)
TOLD = 16  # operations of a crash, at most

logger = logging.getLogger(__name__)


class Deaths:
    """Of the actors that one process has started.

    Args:
        report: is told of each crash.
    """

    def __init__(self, report: Report) -> None:
        self._report = report
        self._waiting: set[asyncio.Task[None]] = set()

    def watch(self, handle: RayHandle) -> None:
        task = asyncio.create_task(self._wait(handle))
        self._waiting.add(task)
        task.add_done_callback(self._waiting.discard)

    async def _wait(self, handle: RayHandle) -> None:
        try:
            await Op(handle.call("until_it_ends"))
        except Unavailable as error:
            crash = self._crash(handle, str(error))
            if crash is not None:
                with contextlib.suppress(TinsmithError):
                    await self._report(crash)

    def _crash(self, handle: RayHandle, error: str) -> Crash | None:
        noted = read_notes(handle.notes)
        if handle.notes is not None:
            # Clients whose calls fail just now read it too.
            asyncio.get_running_loop().call_later(60, handle.notes.unlink, True)
        if _ON_PURPOSE in error or noted is None:
            return None
        owner, under_way = noted
        now = time.time()
        at = told(under_way, now)
        return Crash(now, owner.process, owner.pid, owner.host, reason(error), at)


def told(under_way: list[Doing], now: float) -> list[Interrupted]:
    return [
        Interrupted(d.run, d.op, d.kind, d.tokens, max(now - d.began, 0.0), d.computing)
        for d in under_way[:TOLD]
    ]


def reason(error: str) -> str:
    """Of Ray's words, those that say something."""
    found = _EXIT.search(error)
    if found is None:
        return error.strip().splitlines()[-1]
    kind, detail = found.groups()
    if "connection error code 2" in detail:
        return "killed by a signal, as for want of memory, or exited by itself"
    return f"{kind}: {detail.strip()}"


def log_crash(crash: Crash) -> None:
    died = f"{crash.process} (pid {crash.pid}) died: {crash.reason}"
    if not crash.under_way:
        logger.error("%s; it was idle", died)
    for at in crash.under_way:
        logger.error(
            "%s; it was at %s", died, at, extra={"run": at.run, "op": at.op, "kind": at.kind}
        )
