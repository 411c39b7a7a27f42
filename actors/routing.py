"""Which of a model's samplers a request goes to: the one that holds its prefix, else the least
loaded."""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Sequence
from typing import Protocol, TypeVar

import numpy as np

CHUNK = 32  # tokens
# A prefix computed anew costs less than waiting behind that many more samples than elsewhere.
SLACK = 16


class Loaded(Protocol):
    number: int
    load: int
    serving: Counter[str]


R = TypeVar("R", bound=Loaded)


def prefixes(tokens: np.ndarray, adapter: object) -> list[bytes]:
    """Names of the prefixes of int64 `tokens` [T] in whole chunks, the shortest first, as they are
    under `adapter`."""
    hashed = hashlib.blake2b(repr(adapter).encode(), digest_size=16)
    names = []
    for end in range(CHUNK, len(tokens) + 1, CHUNK):
        hashed.update(tokens[end - CHUNK : end].tobytes())
        names.append(hashed.digest())
    return names


class PrefixTable:
    """Which sampler, by its number, was last given a prefix."""

    def __init__(self, size: int = 1 << 16) -> None:
        self.size = size
        self._holders: OrderedDict[bytes, int] = OrderedDict()

    def note(self, names: Sequence[bytes], number: int) -> None:
        for name in names:
            self._holders[name] = number
            self._holders.move_to_end(name)
        while len(self._holders) > self.size:
            self._holders.popitem(last=False)

    def holder(self, names: Sequence[bytes]) -> int | None:
        """Of the longest prefix that is known."""
        return next(
            (self._holders[name] for name in reversed(names) if name in self._holders), None
        )

    def forget(self, number: int) -> None:
        for name in [name for name, holder in self._holders.items() if holder == number]:
            del self._holders[name]


def choose(replicas: Sequence[R], holder: int | None, run_id: str) -> R:
    """One of `replicas`: the holder unless it is much busier than the least loaded; of equally
    loaded ones, one that serves that run's adapter already."""
    least = min(replicas, key=lambda r: (r.load, not r.serving[run_id], r.number))
    held = next((r for r in replicas if r.number == holder), None)
    return held if held is not None and held.load <= least.load + SLACK else least
