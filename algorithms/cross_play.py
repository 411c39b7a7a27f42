"""Cross-play: every player meets every other, for a matrix of scores and for ratings."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..primitives.errors import EnvironmentFailure, InvalidInput, Unavailable
from .ratings import Result, score_interval


@dataclass(frozen=True)
class Pairing:
    """One game to play. Game g has the same seed in every pair, so that pairs compare."""

    first: str
    second: str
    seed: int


PlayPairing = Callable[[Pairing], Awaitable[float]]
"""Plays a game; its first player's score, 0 to 1."""


@dataclass(frozen=True, eq=False)
class CrossPlay:
    """Row r against column c, all float64 `[rows, columns]`: the row's mean `score`, 0 to 1, with
    95% bounds `low` and `high` (Wilson's), NaN where no game was played; `games` int64.
    `failures` are games that their environment broke, not counted in these."""

    rows: list[str]
    columns: list[str]
    score: np.ndarray
    low: np.ndarray
    high: np.ndarray
    games: np.ndarray
    failures: list[str]

    def results(self) -> list[Result]:
        """What `bradley_terry` rates: every pair of different players."""
        return [
            Result(first, second, float(self.score[r, c] * self.games[r, c]), int(self.games[r, c]))
            for r, first in enumerate(self.rows)
            for c, second in enumerate(self.columns)
            if self.games[r, c] and first != second
        ]

    def to_json(self) -> dict[str, object]:
        cells = {name: getattr(self, name).tolist() for name in ("score", "low", "high", "games")}
        # NaN is not JSON
        plain = {k: [[None if x != x else x for x in row] for row in v] for k, v in cells.items()}
        return {"rows": self.rows, "columns": self.columns, **plain, "failed": len(self.failures)}


async def cross_play(
    play: PlayPairing,
    rows: Sequence[str],
    columns: Sequence[str] | None = None,
    *,
    games: int,
    seed: int = 0,
    max_concurrent: int = 64,
) -> CrossPlay:
    """Have every row play `games` games as the first player against every column.

    Without `columns` the rows meet one another in both orders, but none meets itself. A game that
    its environment breaks is left out and reported.

    Raises:
        InvalidInput: a score beyond 0 to 1, a name given twice, no game.
    """
    seconds = rows if columns is None else columns
    for names in (rows, seconds):
        if len(set(names)) != len(names) or not names:
            raise InvalidInput(f"players need names of their own, got {list(names)!r}")
    if games < 1:
        raise InvalidInput(f"games must be at least 1, got {games!r}")
    shape = (len(rows), len(seconds))
    total, played = np.zeros(shape), np.zeros(shape, np.int64)
    failures: list[str] = []

    def pairings() -> Iterator[tuple[int, int, Pairing]]:
        for game in range(games):  # all pairs advance together
            for r, first in enumerate(rows):
                for c, second in enumerate(seconds):
                    if columns is not None or r != c:
                        yield r, c, Pairing(first, second, seed + game)

    waiting = pairings()

    async def table() -> None:
        for r, c, pairing in waiting:
            try:
                score = float(await play(pairing))
            except (EnvironmentFailure, Unavailable) as error:
                failures.append(f"{pairing}: {error}")
                continue
            if not 0 <= score <= 1:
                raise InvalidInput(f"{pairing}: a score must be from 0 to 1, got {score!r}")
            total[r, c] += score
            played[r, c] += 1

    try:
        async with asyncio.TaskGroup() as tables:
            for _ in range(max_concurrent):
                tables.create_task(table())
    except ExceptionGroup as group:  # the game that ended the others says why
        raise group.exceptions[0] from None
    low, high = np.full(shape, np.nan), np.full(shape, np.nan)
    for r, c in np.argwhere(played):
        low[r, c], high[r, c] = score_interval(total[r, c], int(played[r, c]))
    score = np.divide(total, played, out=np.full(shape, np.nan), where=played > 0)
    return CrossPlay(list(rows), list(seconds), score, low, high, played, failures)
