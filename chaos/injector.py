"""Brings the faults of a schedule, each in its place, and notes what came after it."""

from __future__ import annotations

import asyncio
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass

from .faults import Faults, NotThere
from .ledger import Ledger
from .schedule import Fault

# Operations acknowledged between two kills of one kind of process. Learners that die without one in
# between look like an operation that kills them, and that operation would be refused.
APART = 12
AHEAD = 40  # operations that tenants may be ahead of a fault that is due
STALLED_SECONDS = 300.0


class Stalled(Exception):
    """Nothing was acknowledged for too long."""


@dataclass
class Done:
    """A fault that was brought, and the seconds until the next acknowledgement."""

    fault: Fault
    at: float
    waited: float | None = None


class Injector:
    """
    Args:
        say: is told of each fault.
    """

    def __init__(
        self, schedule: list[Fault], faults: Faults, ledger: Ledger, say: Callable[[Done], None]
    ) -> None:
        self.schedule = deque(schedule)
        self.total = len(ledger.wanted or ())
        self.awaited = 0  # the acknowledgements that the next fault waits for
        self.faults, self.ledger, self.say = faults, ledger, say
        self.done: list[Done] = []
        self._brought = asyncio.Condition()
        self._killed: defaultdict[str, int] = defaultdict(lambda: -APART)

    async def bring(self) -> None:
        """All of them, but for those that find nothing any more that they could be done to."""
        before = 0
        while self.schedule:
            fault = self.schedule.popleft()
            apart = self._killed[fault.target] + APART if fault.action == "kill" else 0
            async with self._brought:
                # Something goes on between two faults, as long as anything does.
                self.awaited = min(max(fault.after, apart, before + 1), self.total)
                self._brought.notify_all()
            await self.ledger.reach(self.awaited)
            before = len(self.ledger.results)
            if fault.action == "kill":
                self._killed[fault.target] = before
            if await self._do(fault):
                self.done.append(Done(fault, time.monotonic()))
                self.say(self.done[-1])
        await self._let_go()

    async def _do(self, fault: Fault) -> bool:
        """Whether there was something to do it to, before the tenants came to their end."""
        while True:
            try:
                await self.faults.do(fault)
                return True
            except NotThere:
                if len(self.ledger.results) >= self.total:
                    return False
                await self._let_go()  # what they need next is started
                await asyncio.sleep(0.1)

    async def _let_go(self) -> None:
        async with self._brought:
            self.awaited = sys.maxsize
            self._brought.notify_all()

    async def caught_up(self) -> None:
        """Wait until no fault is due that should have come long before."""
        async with self._brought:
            await self._brought.wait_for(lambda: len(self.ledger.results) <= self.awaited + AHEAD)

    async def measure(self) -> None:
        """Until cancelled: how long tenants waited after each fault.

        Raises:
            Stalled: too long.
        """
        while True:
            try:
                async with asyncio.timeout(STALLED_SECONDS):
                    await self.ledger.next()
            except TimeoutError:
                raise Stalled(f"nothing was acknowledged for {STALLED_SECONDS:.0f} s") from None
            for done in reversed(self.done):
                if done.waited is not None:
                    break
                done.waited = time.monotonic() - done.at
