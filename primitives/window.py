"""How much of a run's operations is on its way to the learner at once."""

from __future__ import annotations

import heapq
import threading
from collections.abc import Callable

WINDOW_BYTES = 64 << 20


class Window:
    """Lets through what fits, the lowest numbers first; what does not fit waits here, in the client.

    A number below all that are under way is let through whatever it weighs: they may wait for it.
    """

    def __init__(self, size: int = WINDOW_BYTES) -> None:
        self.size = size
        self._lock = threading.Lock()
        self._waiting: list[tuple[int, int, Callable[[], None]]] = []
        self._under_way: dict[int, int] = {}
        self._bytes = 0

    def enter(self, number: int, size: int, send: Callable[[], None]) -> None:
        """Call `send()`, now or when there is room; `leave(number)` gives the room back."""
        with self._lock:
            heapq.heappush(self._waiting, (number, size, send))
        self._send_on()

    def leave(self, number: int) -> None:
        with self._lock:
            self._bytes -= self._under_way.pop(number)
        self._send_on()

    def _send_on(self) -> None:
        while (send := self._take()) is not None:
            send()

    def _take(self) -> Callable[[], None] | None:
        with self._lock:
            if not self._waiting:
                return None
            number, size, send = self._waiting[0]
            lowest = min(self._under_way, default=number)
            if self._bytes + size > self.size and number > lowest:
                return None
            heapq.heappop(self._waiting)
            self._under_way[number] = size
            self._bytes += size
            return send
