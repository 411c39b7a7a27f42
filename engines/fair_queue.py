"""Whose turn it is, when several runs want the learner.

Start-time fair queueing (Goyal, Vin & Cheng, 1996), a form of deficit round-robin that needs no
quantum: of the runs that wait, the one goes next that has had the least so far for its weight.
One that comes back after a pause starts level with those that went on, so it is neither owed what
it did not ask for nor made to pay for what nobody else wanted.
"""

from __future__ import annotations

from collections.abc import Iterable


class FairQueue:
    """Costs are in rows; a run of weight 2 gets twice the rows of one of weight 1."""

    def __init__(self) -> None:
        self.weights: dict[str, float] = {}
        self._had: dict[str, float] = {}  # per weight
        self._level = 0.0  # what those that were served last have had

    def arrive(self, run: str) -> None:
        """A run that had nothing to do has something again."""
        self._had[run] = max(self._had.get(run, 0.0), self._level)

    def next(self, waiting: Iterable[str]) -> str:
        """Of those that wait; of equals, the first given."""
        return min(waiting, key=lambda run: self._had.get(run, 0.0))

    def charge(self, run: str, rows: int) -> None:
        had = self._had.get(run, 0.0)
        self._level = max(self._level, had)
        self._had[run] = had + rows / self.weights.get(run, 1.0)

    def forget(self, run: str) -> None:
        self._had.pop(run, None)
        self.weights.pop(run, None)
