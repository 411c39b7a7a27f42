"""The demo task: sums of several numbers with a calculator that takes two at a time.

The policy calls the tool with `CALC(a+b)`, sees `RESULT: c`, chains the next call on it, and ends
with `ANSWER: n`. Worked examples in the prompt, the same in every episode, show the form.
"""

from __future__ import annotations

import hashlib
import random
import re
from typing import Any, Literal

from ..primitives.errors import InvalidInput
from .core import Env, ResetResult, StepResult, message

CALL = re.compile(r"CALC\(\s*(-?\d{1,9})\s*([-+*])\s*(-?\d{1,9})\s*\)")
ANSWER = re.compile(r"ANSWER:\s*(-?\d{1,9})\b")
SYSTEM = "You use a calculator."
HELP = "ERROR: write CALC(a+b) or ANSWER: n"
EVAL_SHARE = 0.2


class Calculator(Env):
    """Add `terms` numbers from 2 to `max_number`, two at a time.

    The reward is 1 for an `ANSWER` that is right, that the tool gave, and that comes after at
    least `terms - 1` calls: guesses and sums done in the head count nothing. With `shaping` above
    0, each valid call up to the number needed earns that much on top, so that a group in which no
    episode succeeds still ranks its members.

    Args:
        terms: numbers to add, at least 2.
        max_number: the largest of them.
        examples: worked examples in the prompt.
        split: problems to draw from. "train" and "eval" share none, in any order of the terms;
            neither holds an example.
        max_turns: turns until the episode is truncated; None: one per call needed, and the answer.
        shaping: reward of a valid call.
    """

    def __init__(
        self,
        terms: int = 3,
        max_number: int = 20,
        examples: int = 2,
        split: Literal["train", "eval"] = "train",
        max_turns: int | None = None,
        shaping: float = 0.0,
    ) -> None:
        if terms < 2 or max_number < 9 or examples < 0:
            raise InvalidInput(
                "calculator: needs terms >= 2, max_number >= 9 and examples >= 0, "
                f"got {terms}, {max_number} and {examples}"
            )
        if split not in ("train", "eval"):
            raise InvalidInput(f'calculator: split must be "train" or "eval", got {split!r}')
        self.terms = terms
        self.max_number = max_number
        self.split = split
        self.calls_needed = terms - 1
        self.max_turns = max_turns or terms
        self.shaping = shaping
        shown = random.Random(0)
        self.examples = [self._draw(shown) for _ in range(examples)]
        self._kept_out = {tuple(sorted(example)) for example in self.examples}

    def _draw(self, generator: random.Random) -> list[int]:
        return [generator.randint(2, self.max_number) for _ in range(self.terms)]

    def _problem(self, generator: random.Random) -> list[int]:
        while True:
            numbers = self._draw(generator)
            key = tuple(sorted(numbers))
            if key not in self._kept_out and split_of(key) == self.split:
                return numbers

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> ResetResult:
        """`options["numbers"]` sets the problem instead of drawing it."""
        numbers = (options or {}).get("numbers") or self._problem(random.Random(seed))
        self.total = sum(numbers)
        self.results: list[int] = []
        self.turn = 0
        messages = [message("system", SYSTEM)]
        for example in self.examples:
            messages += _worked(example)
        return [*messages, message("user", question(numbers))], {"numbers": numbers}

    def step(self, action: str) -> StepResult:
        self.turn += 1
        truncated = self.turn >= self.max_turns
        call, answer = CALL.search(action), ANSWER.search(action)
        if call:
            a, operation, b = int(call[1]), call[2], int(call[3])
            result = a + b if operation == "+" else a - b if operation == "-" else a * b
            self.results.append(result)
            reward = self.shaping if len(self.results) <= self.calls_needed else 0.0
            return f"RESULT: {result}", reward, False, truncated, self._info(None)
        if answer:
            given = int(answer[1])
            enough = len(self.results) >= self.calls_needed
            success = given == self.total and enough and given in self.results
            return "", float(success), True, False, self._info(given, success)
        return HELP, 0.0, False, truncated, self._info(None)

    def _info(self, answer: int | None, success: bool = False) -> dict[str, Any]:
        return {
            "success": success,
            "calls": len(self.results),
            "answer": answer,
            "expected": self.total,
        }


def split_of(numbers: tuple[int, ...]) -> str:
    """The split of a problem, given as its sorted numbers."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return "eval" if int.from_bytes(digest) < EVAL_SHARE * 2**64 else "train"


def question(numbers: list[int]) -> str:
    first, second, *others = numbers
    return f"First {first} + {second}." + "".join(f" Then + {number}." for number in others)


def _worked(numbers: list[int]) -> list[dict[str, Any]]:
    messages = [message("user", question(numbers))]
    total = numbers[0]
    for number in numbers[1:]:
        messages.append(message("assistant", f"CALC({total}+{number})"))
        total += number
        messages.append(message("user", f"RESULT: {total}"))
    return [*messages, message("assistant", f"ANSWER: {total}")]
