"""The environment: a molecule's systematic name is given, its molecular formula is asked for.

    user       3-methylbutan-2-ol
    assistant  C5H12O

Names and formulas come from files that `dataset.py` writes, checked by OPSIN and RDKit.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from tinsmith import InvalidInput
from tinsmith.envs import Env

SYSTEM = "You give the molecular formula of a compound."
SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789", "$_{}*`")
ELEMENTS = ("Br", "Cl", "Si", "B", "C", "F", "H", "I", "N", "O", "P", "S")
ATOMS = re.compile(rf"({'|'.join(ELEMENTS)})([1-9]\d{{0,2}})?")
FORMULA = re.compile(rf"(?:{ATOMS.pattern})+")


class NameToFormula(Env):
    """One question, one answer. The reward is 1 for the right formula, else `shaping` times the
    share of elements whose number is right, so that a group in which nobody is right still ranks
    its members. `info["success"]` is the exact match alone.

    Args:
        data: folder that `dataset.build` wrote.
        split: "train" and "eval" share no formula, and so no molecule and no isomer of one.
        levels: of the names; an episode draws a level, then a name of it.
        examples: worked examples in the prompt, the same in every episode; they belong to neither
            split.
        shaping: largest reward of a wrong answer is below this.
        thinking: let the model write before its answer, which is then the last formula it names.
    """

    def __init__(
        self,
        data: str,
        split: Literal["train", "eval"] = "train",
        levels: Sequence[int] = (1, 2),
        examples: int = 8,
        shaping: float = 0.5,
        thinking: bool = False,
    ) -> None:
        folder = Path(data)
        try:
            self.levels = [
                (folder / f"{split}-{level}.jsonl").read_text().splitlines() for level in levels
            ]
        except FileNotFoundError as error:
            raise InvalidInput(f"no names of this split and level: {error}") from None
        shown = (folder / "examples.jsonl").read_text().splitlines()[:examples]
        self.examples = [json.loads(row) for row in shown]
        self.shaping = shaping
        self.thinking = thinking

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[list[dict[str, str]], dict[str, Any]]:
        """`options["row"]` gives the row (`name`, `level`, `formula`) instead of drawing one."""
        generator = random.Random(seed)
        drawn = json.loads(generator.choice(generator.choice(self.levels)))
        self.row = (options or {}).get("row") or drawn
        messages = [{"role": "system", "content": SYSTEM}]
        for example in self.examples:
            messages.append({"role": "user", "content": example["name"]})
            messages.append({"role": "assistant", "content": example["formula"]})
        messages.append({"role": "user", "content": self.row["name"]})
        return messages, {"name": self.row["name"], "level": self.row["level"]}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        given = find_formula(action, last=self.thinking)
        expected = parse_formula(self.row["formula"])
        share = share_right(given, expected)
        success = given == expected
        info = {**self.row, "answer": action, "share": share, "success": success}
        return "", 1.0 if success else self.shaping * share, True, False, info


def parse_formula(formula: str) -> Counter[str]:
    """How many atoms there are of each element.

    Raises:
        ValueError: not a molecular formula of the elements that occur here.
    """
    if not FORMULA.fullmatch(formula):
        raise ValueError(f"not a molecular formula: {formula!r}")
    counts: Counter[str] = Counter()
    for element, number in ATOMS.findall(formula):
        counts[element] += int(number or 1)
    return counts


def find_formula(text: str, last: bool = False) -> Counter[str] | None:
    """The first (or `last`) formula with carbon in a text, whatever its spacing, subscripts, or
    order of elements; None where there is none."""
    text = text.translate(SUBSCRIPTS)
    words = re.split(r"[\s.,:;=()\[\]\"']+", text)
    for word in ["".join(text.split()), *(reversed(words) if last else words)]:
        if FORMULA.fullmatch(word):
            counts = parse_formula(word)
            if counts["C"]:
                return counts
    return None


def share_right(given: Counter[str] | None, expected: Counter[str]) -> float:
    """The share of elements whose number is right, among those in either formula."""
    if given is None:
        return 0.0
    elements = given.keys() | expected.keys()
    return sum(given[e] == expected[e] for e in elements) / len(elements)
