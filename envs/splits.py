"""Rows for training and rows held out."""

from __future__ import annotations

import random

from ..primitives.errors import InvalidInput

EVAL_SHARE = 0.2


class Rows:
    """The rows of a split, and the one that an episode's seed picks: consecutive seeds pick
    different ones, until all have been.

    Args:
        size: rows there are.
        split: "eval": the last fifth of them, at least one; "train": the others; None: all.
        where: named in errors.

    Raises:
        InvalidInput: another split, or no row in it.
    """

    def __init__(self, size: int, split: str | None, where: str) -> None:
        first_eval = min(size - 1, round(size * (1 - EVAL_SHARE)))
        parts = {"train": range(first_eval), "eval": range(first_eval, size), None: range(size)}
        if split not in parts:
            raise InvalidInput(f'{where}: split must be "train", "eval" or None, got {split!r}')
        self.indices = parts[split]
        if size < 1 or not self.indices:
            raise InvalidInput(f"{where}: no rows in split {split!r} of {size}")

    def pick(self, seed: int | None) -> int:
        drawn = random.randrange(len(self.indices)) if seed is None else seed
        return self.indices[drawn % len(self.indices)]
