"""JSONL read row by row: bad rows are skipped and told with their lines, or refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..primitives.errors import InvalidInput, NotFound

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Skipped:
    """A row that was left out: its line (from 1) or file, and why."""

    where: str
    why: str


def read_jsonl(
    path: str | Path,
    parse: Callable[[int, dict[str, Any]], T],
    *,
    strict: bool = False,
    key: Callable[[T], Any] | None = None,
) -> tuple[list[T], list[Skipped]]:
    """What `parse(line number, row)` makes of each line, and the lines for which it raised
    ValueError or that are no JSON object, or whose `key` another has. Empty lines are no rows.

    Raises:
        NotFound: no such file.
        InvalidInput: the first bad line, if `strict`.
    """
    rows: list[T] = []
    skipped: list[Skipped] = []
    seen = set()
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise NotFound(f"{path} cannot be read: {error.strerror}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("it is not a JSON object")
            value = parse(number, row)
            if key is not None:
                if key(value) in seen:
                    raise ValueError(f"{key(value)!r} was there before")
                seen.add(key(value))
        except ValueError as error:
            skip(skipped, f"line {number}", str(error), strict, f"{path}, ")
        else:
            rows.append(value)
    tell_skipped(path, skipped, len(rows) + len(skipped))
    return rows, skipped


def skip(skipped: list[Skipped], where: str, why: str, strict: bool, file: str = "") -> None:
    if strict:
        raise InvalidInput(f"{file}{where}: {why}")
    skipped.append(Skipped(where, why))


def tell_skipped(path: str | Path, skipped: list[Skipped], rows: int) -> None:
    if skipped:
        shown = "; ".join(f"{bad.where}: {bad.why}" for bad in skipped[:5])
        more = "; …" if len(skipped) > 5 else ""
        log.warning("%s: skipped %d of %d: %s%s", path, len(skipped), rows, shown, more)
