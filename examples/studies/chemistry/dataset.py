"""Names with their formulas, split so that what is held out is new: no formula is in both splits.

A split by names alone would be easy to pass by heart: hexan-2-ol and 2-methylpentan-1-ol have the
same answer. Here the hash of the formula decides, so that the held-out set's every answer must be
composed from parts.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tinsmith

from . import grammar
from .checkers import Structure, structures
from .name_to_formula import FORMULA

EVAL_SHARE = 0.2
EXAMPLES = (
    "hexane",
    "propan-1-ol",
    "2-chloropentane",
    "but-1-ene",
    "octanoic acid",
    "butan-2-amine",
    "heptan-3-one",
    "3-bromo-2-methylpentane",
    "nonanenitrile",
    "ethyl 3-hydroxybutanoate",
    "4-nitrophenol",
    "cyclohexanethiol",
)
"""Shown in prompts, as many as the environment is told to. Their formulas are in neither split."""


@dataclass
class Counts:
    """What became of the names. `refused` are the line numbers (from 1) of a names file, or the
    positions among the generated names, that OPSIN or RDKit could not read or that are not
    neutral molecules of the elements in use."""

    names: int = 0
    refused: list[int] = field(default_factory=list)
    same_molecule: int = 0
    as_examples: int = 0
    train: int = 0
    eval: int = 0
    train_formulas: int = 0
    eval_formulas: int = 0

    def __str__(self) -> str:
        return (
            f"{self.names} names: {len(self.refused)} refused by OPSIN or RDKit, "
            f"{self.same_molecule} of a molecule named before, {self.as_examples} with an "
            f"example's formula; {self.train} to train on ({self.train_formulas} formulas), "
            f"{self.eval} held out ({self.eval_formulas} formulas)"
        )


def generated(per_level: Mapping[int, int], seed: int = 0) -> list[tuple[str, int]]:
    """(name, level), up to so many of each level."""
    return [
        (name, level)
        for level, count in per_level.items()
        for name in grammar.names(level, count, seed)
    ]


def read_names(path: str | Path) -> list[tuple[str, int]]:
    """(name, 0) for every line of a file; empty ones count as lines that OPSIN refuses.

    Raises:
        NotFound, InvalidInput: no such file, or not a text in UTF-8.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise tinsmith.NotFound(f"there is no file of names {path}") from None
    except UnicodeDecodeError as error:
        raise tinsmith.InvalidInput(f"{path}: names must be UTF-8 text: {error}") from None
    return [(line.strip(), 0) for line in lines]


def build(
    names: Sequence[tuple[str, int]], cache: str | Path, *, strict: bool = False
) -> tuple[Path, Counts]:
    """Check the names and write `train-<level>.jsonl`, `eval-<level>.jsonl` and
    `examples.jsonl`: a row has `name`, `level`, `smiles` and `formula`.

    The folder, in `cache`, is named after the names' digest, and a second call finds the
    checkers' answers there.

    Raises:
        InvalidInput: `strict`, and some name is refused; or a level's split is empty.
        Unavailable: a checker is not installed.
    """
    digest = hashlib.blake2b(json.dumps([EXAMPLES, names]).encode(), digest_size=8).hexdigest()
    folder = Path(cache) / digest
    checked = _checked([*EXAMPLES, *(name for name, _ in names)], folder / "checked.json")
    counts = Counts(names=len(names))
    splits: dict[str, list[dict[str, object]]] = {"train": [], "eval": []}
    examples: list[dict[str, object]] = []
    for name, structure in zip(EXAMPLES, checked, strict=False):
        if structure is None:
            raise tinsmith.Unavailable(f"OPSIN refuses {name!r}, which it should know")
        examples.append({"name": name, "level": 0, **structure._asdict()})
    shown = {row["formula"] for row in examples}
    seen: set[str] = set()
    checked_names = zip(names, checked[len(EXAMPLES) :], strict=True)
    for number, ((name, level), structure) in enumerate(checked_names, 1):
        if structure is None or not FORMULA.fullmatch(structure.formula):
            counts.refused.append(number)
        elif structure.smiles in seen:
            counts.same_molecule += 1
        elif structure.formula in shown:
            counts.as_examples += 1
        else:
            seen.add(structure.smiles)
            row = {"name": name, "level": level, **structure._asdict()}
            splits[split_of(structure.formula)].append(row)
    if strict and counts.refused:
        raise tinsmith.InvalidInput(
            f"{len(counts.refused)} of {len(names)} names are refused by OPSIN or RDKit: "
            f"{shortened(counts.refused)}"
        )
    for split, kept in splits.items():
        setattr(counts, split, len(kept))
        setattr(counts, f"{split}_formulas", len({row["formula"] for row in kept}))
    for level in sorted({level for _, level in names}):
        for split, kept in splits.items():
            rows = [row for row in kept if row["level"] == level]
            if not rows:
                raise tinsmith.InvalidInput(
                    f"too few names of level {level} to hold some out and train on others: {counts}"
                )
            _write(folder / f"{split}-{level}.jsonl", rows)
    _write(folder / "examples.jsonl", examples)
    return folder, counts


def split_of(formula: str) -> str:
    """The split of every molecule with this formula."""
    digest = hashlib.blake2b(formula.encode(), digest_size=8).digest()
    return "eval" if int.from_bytes(digest) < EVAL_SHARE * 2**64 else "train"


def shortened(numbers: Sequence[int], most: int = 20) -> str:
    """`lines 3, 7, 12 and 5 more`"""
    text = ", ".join(map(str, numbers[:most]))
    more = f" and {len(numbers) - most} more" if len(numbers) > most else ""
    return f"line{'s' if len(numbers) > 1 else ''} {text}{more}"


def _checked(names: Sequence[str], cache: Path) -> list[Structure | None]:
    if cache.exists():
        return [row and Structure(*row) for row in json.loads(cache.read_text())]
    found = structures(names)
    _replace(cache, json.dumps(found))
    return found


def _write(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    _replace(path, "".join(json.dumps(row) + "\n" for row in rows))


def _replace(path: Path, text: str) -> None:
    """All of it or nothing, whoever else writes the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)
