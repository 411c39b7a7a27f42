"""Rows of data from wherever they are, and what became of each: used, bad, or too long."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from ..primitives.errors import InvalidInput, NotFound, Unavailable

E = TypeVar("E")
Source: TypeAlias = str | Path | Iterable[Any]
"""A JSONL file (a path or URL that fsspec opens, compressed or not), `hf:NAME[:SPLIT]` (a data set
of Hugging Face's `datasets`, which must be installed; split `train`), or any iterable of rows (a
`datasets.Dataset`, for one)."""

SHOWN = 5


class TooLong(InvalidInput):
    """A row that does not fit in the model's context."""


@dataclass
class DataReport:
    """What became of the rows of `source`. Rows are numbered from 1; of a file, by its lines.

    Attributes:
        rows: read in all (blank lines are none).
        used: rows that are trained or evaluated on.
        datums: what they make.
        tokens: of these.
        trained_tokens: the targets among them.
        bad: rows left out, with what is wrong.
        too_long: rows left out for their length.
        truncated: rows cut to the length.
        rewritten: conversations whose past the chat template rewrites, which therefore make
            several datums.
    """

    source: str
    rows: int = 0
    used: int = 0
    datums: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    bad: list[tuple[int, str]] = field(default_factory=list)
    too_long: list[int] = field(default_factory=list)
    truncated: list[int] = field(default_factory=list)
    rewritten: list[int] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """For people: what is used, and what is not and why."""
        text = [
            f"{self.source}: {self.used} of {self.rows} rows used, {self.datums} datums, "
            f"{self.tokens} tokens, {self.trained_tokens} of them trained on"
        ]
        if self.bad:
            text.append(f"{len(self.bad)} bad rows left out:")
            text += [f"  line {number}: {reason}" for number, reason in self.bad[:SHOWN]]
            if len(self.bad) > SHOWN:
                text.append(f"  and lines {_numbers([n for n, _ in self.bad[SHOWN:]])}")
        for numbers, what in (
            (self.too_long, "rows too long, left out"),
            (self.truncated, "rows truncated"),
            (self.rewritten, "conversations whose past the chat template rewrites, split"),
        ):
            if numbers:
                text.append(f"{len(numbers)} {what}: lines {_numbers(numbers)}")
        return text


def _numbers(numbers: list[int], most: int = 20) -> str:
    more = f", and {len(numbers) - most} more" if len(numbers) > most else ""
    return ", ".join(map(str, numbers[:most])) + more


def source_name(source: Source) -> str:
    return str(source) if isinstance(source, str | Path) else f"a {type(source).__name__}"


def given_or_named(rows: Source | None, named: str, setting: str) -> Source:
    """The rows given in code, else what the config's `setting` names.

    Raises:
        InvalidInput: neither.
    """
    source = named if rows is None else rows
    if isinstance(source, str) and not source:
        raise InvalidInput(f"there is no data: name a file as {setting}, or give rows")
    return source


def read_rows(source: Source) -> Iterator[tuple[int, Any]]:
    """The rows of `source` with their numbers. A line that cannot be read comes as the
    `InvalidInput` that says why.

    Raises:
        NotFound: there is no such file or data set.
        Unavailable: it needs `datasets`, which is not installed.
    """
    if isinstance(source, str) and source.startswith("hf:"):
        source = _hugging_face(source.removeprefix("hf:"))
    if not isinstance(source, str | Path):
        yield from enumerate(source, 1)
        return
    import fsspec

    try:
        with fsspec.open(str(source), "rb", compression="infer") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _parse(line)
    except (FileNotFoundError, IsADirectoryError):
        raise NotFound(f"there is no file {source}") from None


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        return InvalidInput(f"not JSON: {error.msg} at character {error.pos + 1}")
    except UnicodeDecodeError as error:
        return InvalidInput(f"not UTF-8: {error.reason} at byte {error.start + 1}")
    except RecursionError:
        return InvalidInput("not usable JSON: nested too deeply")


def _hugging_face(name: str) -> Iterable[Any]:
    try:
        import datasets
    except ImportError:
        raise Unavailable(
            f"hf:{name} needs Hugging Face's datasets: pip install datasets"
        ) from None
    name, _, split = name.partition(":")
    try:
        return datasets.load_dataset(name, split=split or "train")
    except (FileNotFoundError, ValueError, ConnectionError) as error:
        raise NotFound(f"no data set {name!r} with a split {split or 'train'!r}: {error}") from None


def collect(
    source: Source, make: Callable[[int, Any], E], *, strict: bool = False
) -> tuple[list[E], DataReport]:
    """`make(number, row)` of every row. Rows for which it raises `InvalidInput` are left out and
    reported, or, with `strict`, refused.

    Raises:
        InvalidInput: `strict` and a row that cannot be used; or no row that can.
        NotFound, Unavailable: as `read_rows`.
    """
    report = DataReport(source_name(source))
    made = []
    for number, row in read_rows(source):
        report.rows += 1
        try:
            if isinstance(row, InvalidInput):
                raise row
            made.append(make(number, row))
        except InvalidInput as error:
            if strict:
                raise InvalidInput(f"{report.source}, line {number}: {error}") from None
            if isinstance(error, TooLong):
                report.too_long.append(number)
            else:
                report.bad.append((number, str(error)))
    report.used = len(made)
    if not made:
        raise InvalidInput("no row can be used. " + "\n".join(report.lines()))
    return made, report
