"""What was acknowledged: compared, as it comes, with what it was when nothing disturbed the service."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import numpy as np

Result = Mapping[str, np.ndarray]
Place = tuple[int, int, str]
"""Tenant, round, and which of its operations."""


class Mismatch(Exception):
    """Something acknowledged is not what it has to be."""


class Ledger:
    """
    Args:
        wanted: results of the undisturbed life; None: this is it.

    Attributes:
        results: by place in the script.
        repeated: operations that a tenant did again, from a saved state on.
    """

    def __init__(self, wanted: Mapping[Place, Result] | None) -> None:
        self.wanted = wanted
        self.results: dict[Place, Result] = {}
        self.repeated = 0
        self._came = asyncio.Condition()

    async def acknowledge(self, place: Place, result: Result) -> None:
        """
        Raises:
            Mismatch: it differs from before, or from the undisturbed life's.
        """
        before = self.results.get(place)
        for other in (before, None if self.wanted is None else self.wanted[place]):
            if other is not None:
                _compare(place, result, other)
        self.repeated += before is not None
        self.results[place] = result
        async with self._came:
            self._came.notify_all()

    async def reach(self, count: int) -> None:
        """Wait until so many places of the script have their results."""
        async with self._came:
            await self._came.wait_for(lambda: len(self.results) >= count)

    async def next(self) -> None:
        """Wait for one more acknowledgement, of whatever."""
        async with self._came:
            await self._came.wait()


def _compare(place: Place, result: Result, other: Result) -> None:
    tenant, number, what = place
    if result.keys() != other.keys():
        raise Mismatch(
            f"tenant {tenant}, round {number}, {what}: {list(result)}, not {list(other)}"
        )
    for name, array in result.items():
        if not np.array_equal(array, other[name], equal_nan=array.dtype.kind == "f"):
            raise Mismatch(
                f"tenant {tenant}, round {number}, {what}: {name} is {_short(array)}, "
                f"undisturbed {_short(other[name])}"
            )


def _short(array: np.ndarray) -> str:
    return np.array2string(array.reshape(-1)[:8], precision=9)
