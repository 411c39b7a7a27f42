"""One of a model's samplers, as the pool sees it."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

from ..primitives.errors import TinsmithError, Unavailable
from ..primitives.op import Op
from .handle import RayHandle
from .placement import Seat


@dataclass(eq=False)
class Change:
    """A call that changes which adapters a sampler holds.

    Attributes:
        refused: a sampler's error; they all give the same.
    """

    method: str
    args: tuple[Any, ...]
    refused: TinsmithError | None = None


@dataclass(eq=False)
class Replica:
    """
    Attributes:
        seat: what it occupies.
        load: samples that it was given and has not finished.
        serving: requests under way by run.
        changes: that it has still to take, in order.
        retiring: it gets no new requests.
    """

    number: int
    handle: RayHandle
    seat: Seat
    changes: deque[Change]
    load: int = 0
    serving: Counter[str] = field(default_factory=Counter)
    retiring: bool = False
    _taking: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def catch_up(self) -> None:
        """Take what has changed since.

        Raises:
            Unavailable: it died.
        """
        async with self._taking:
            while self.changes:
                change = self.changes[0]
                try:
                    await Op(self.handle.call(change.method, *change.args))
                except Unavailable:
                    raise
                except TinsmithError as error:
                    change.refused = error
                self.changes.popleft()
