"""Which sampling requests are done, told many at a time to clients that ask for it."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from .store import Result

CLONE = 1_000_000_000  # copies of a sampling client number their requests from multiples of this


@dataclass(eq=False)
class _Channel:
    """Completions since the last one that the client has confirmed, and their last number."""

    cursor: int = 0
    events: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)


class Completions:
    """One list a sampling session and copy of its client; nothing is kept unless `enabled`."""

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self._channels: dict[tuple[str, int], _Channel] = defaultdict(_Channel)

    def add(self, sampler_id: str, seq_id: int, request_id: str, result: Result) -> None:
        if not self._enabled:
            return
        channel = self._channels[sampler_id, seq_id // CLONE]
        channel.cursor += 1
        event: dict[str, Any] = {"state": "failed", "request_id": request_id}
        if result.kind != "error":
            event["state"] = "finished"
            event["response_payload_uncompressed_size"] = len(result.body)
        channel.events.append((channel.cursor, event))
        channel.arrived.set()

    async def wait(
        self, sampler_id: str, clone: int, after: int, seconds: float
    ) -> tuple[list[dict[str, Any]], int]:
        """What was completed after number `after` (waiting for one if need be), and the number
        of the last of them."""
        channel = self._channels[sampler_id, clone]
        channel.events = [event for event in channel.events if event[0] > after]
        if not channel.events and seconds > 0:
            channel.arrived.clear()
            try:
                await asyncio.wait_for(channel.arrived.wait(), seconds)
            except TimeoutError:
                return [], after
        events = list(channel.events)
        return [event for _, event in events], events[-1][0] if events else after

    def forget(self, sampler_id: str) -> None:
        for key in [key for key in self._channels if key[0] == sampler_id]:
            del self._channels[key]
