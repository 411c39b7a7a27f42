"""Sums that are too large for the head, with a Python tool to do them: the bundled `python`."""

from __future__ import annotations

import hashlib
import math
import random
import re
from typing import Any, Literal

from ..primitives.errors import InvalidInput
from .core import StepResult, message
from .sandbox import PythonSandbox, SandboxLimits
from .tools import ToolEnv

EVAL_SHARE = 0.2
SYSTEM = (
    "You have a tool that runs Python. Call it with\n"
    '<tool_call>{"name": "python", "arguments": {"code": "print(2 + 2)"}}</tool_call>\n'
    "Then answer with the number alone."
)
_INTEGER = re.compile(r"-?\d+")


class PythonMath(ToolEnv):
    """One question about whole numbers. The reward is 1 if the last number of the answer is right.

    Args:
        split: questions to draw from; "train" and "eval" share none.
        max_turns: turns until the episode is truncated.
        wall_seconds: how long each call may run.
        persistent: keep names between the calls of an episode.
        result_role: role of the tool's messages: "user" for chat templates that know no tools.
        allow_unisolated: run the model's code also where it cannot be isolated.

    Raises:
        Unavailable: code cannot be isolated on this machine.
    """

    def __init__(
        self,
        split: Literal["train", "eval"] = "train",
        max_turns: int = 4,
        wall_seconds: float = 5.0,
        persistent: bool = False,
        result_role: Literal["tool", "user"] = "tool",
        allow_unisolated: bool = False,
    ) -> None:
        if split not in ("train", "eval"):
            raise InvalidInput(f'python: split must be "train" or "eval", got {split!r}')
        self.split = split
        self.sandbox = PythonSandbox(
            SandboxLimits(wall_seconds=wall_seconds),
            persistent=persistent,
            allow_unisolated=allow_unisolated,
        )
        super().__init__([self.sandbox.tool()], max_turns=max_turns, result_role=result_role)

    def begin(self, seed: int | None, options: dict[str, Any] | None) -> list[dict[str, Any]]:
        generator = random.Random(seed)
        question, self.expected = draw(generator)
        while split_of(question) != self.split:
            question, self.expected = draw(generator)
        return [message("system", SYSTEM), message("user", question)]

    def score(self, answer: str) -> float:
        numbers = _INTEGER.findall(answer.replace(",", ""))
        # As text: Python refuses to read numbers of thousands of digits.
        return float(bool(numbers) and numbers[-1] == str(self.expected))

    async def step(self, action: str) -> StepResult:
        observation, reward, terminated, truncated, info = await super().step(action)
        info |= {"success": reward > 0, "expected": self.expected}
        return observation, reward, terminated, truncated, info

    async def close(self) -> None:
        self.sandbox.close()
        await super().close()


def draw(generator: random.Random) -> tuple[str, int]:
    """A question and its answer."""
    kind = generator.choice(("product", "power", "digits", "divisors"))
    if kind == "product":
        a, b = generator.randint(10**5, 10**6), generator.randint(10**5, 10**6)
        return f"What is {a} * {b}?", a * b
    if kind == "power":
        a, b, c = (generator.randint(100, 999) for _ in range(3))
        return f"What is the remainder of {a} to the power {b}, divided by {c}?", pow(a, b, c)
    if kind == "digits":
        n = generator.randint(20, 400)
        return f"What is the sum of the digits of {n} factorial?", _digit_sum(math.factorial(n))
    n = generator.randint(10**4, 10**6)
    return f"How many divisors does {n} have, 1 and itself included?", _divisors(n)


def split_of(question: str) -> str:
    digest = hashlib.blake2b(question.encode(), digest_size=8).digest()
    return "eval" if int.from_bytes(digest) < EVAL_SHARE * 2**64 else "train"


def _digit_sum(number: int) -> int:
    return sum(map(int, str(number)))


def _divisors(number: int) -> int:
    root = math.isqrt(number)
    below = sum(2 for d in range(1, root + 1) if number % d == 0)
    return below - (root * root == number)
