"""The single-agent environment interface: gymnasium's semantics, with messages and text.

An environment is a small class:

    class Guess(Env):
        def reset(self, *, seed=None, options=None):
            self.secret = random.Random(seed).randint(1, 9)
            return "I think of a digit. Which one?", {}

        def step(self, action):
            right = str(self.secret) in action
            return "Yes!" if right else "No.", float(right), right, False, {}
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from ..primitives.errors import InvalidInput

if TYPE_CHECKING:  # environment processes do without numpy
    from ..primitives.types import Message

Observation: TypeAlias = "str | Sequence[Message]"
"""What the policy sees next: a text (one user message) or messages to append."""

ResetResult: TypeAlias = tuple[Observation, dict[str, Any]]
"""(observation, info)"""

StepResult: TypeAlias = tuple[Observation, float, bool, bool, dict[str, Any]]
"""(observation, reward, terminated, truncated, info)"""


class Env:
    """Base class of environments. Methods may be plain or `async`.

    An object lives for one episode, in a process of its own: it may block, and what it leaks goes
    with it.
    """

    tool_schemas: Sequence[dict[str, Any]] | None = None
    """JSON schemas of the tools offered, for chat templates that take `tools`."""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> ResetResult | Awaitable[ResetResult]:
        """Begin an episode. The same seed and options must give the same one."""
        raise NotImplementedError

    def step(self, action: str) -> StepResult | Awaitable[StepResult]:
        """Answer the policy's turn: its text, without special tokens.

        `terminated`: the task reached its end; `truncated`: cut off before that.
        """
        raise NotImplementedError

    def close(self) -> Awaitable[None] | None:
        """Free what the episode held."""


def as_messages(observation: Observation, *, last: bool = False) -> list[Message]:
    """The messages that an observation appends; none for an empty one where `last`.

    Raises:
        InvalidInput: neither a text nor a list of messages with `role` and `content`.
    """
    if isinstance(observation, str):
        return [] if last and not observation else [message("user", observation)]
    if not isinstance(observation, list | tuple):
        raise InvalidInput(
            "an observation must be a str or a list of messages, "
            f"got a {type(observation).__name__}: {observation!r:.200}"
        )
    if not observation and not last:
        raise InvalidInput("an observation that the policy must answer holds no message")
    messages = []
    for index, given in enumerate(observation):
        if not isinstance(given, dict) or not isinstance(given.get("role"), str):
            raise InvalidInput(
                f"message {index} of an observation must be a dict with a str `role` and "
                f"`content`, got {given!r:.200}"
            )
        if not isinstance(given.get("content"), str):
            raise InvalidInput(
                f"message {index} of an observation: `content` must be a str, "
                f"got a {type(given.get('content')).__name__}"
            )
        messages.append({**given, "content": _encodable(given["content"])})
    return messages


def message(role: str, content: str) -> Message:
    return {"role": role, "content": _encodable(content)}


def _encodable(text: str) -> str:
    # Lone surrogates, as in badly decoded files, cannot be tokenized.
    return text.encode("utf-8", "replace").decode()


def checked_reset(result: Any) -> tuple[list[Message], dict[str, Any]]:
    """The (messages, info) of what `reset` returned.

    Raises:
        InvalidInput: saying what is wrong with its shape or types.
    """
    if not isinstance(result, tuple) or len(result) != 2:
        raise InvalidInput(f"reset must return (observation, info), got {result!r:.200}")
    observation, info = result
    return as_messages(observation), checked_info("reset: info", info)


def checked_step(result: Any) -> tuple[list[Message], float, bool, bool, dict[str, Any]]:
    """The (messages, reward, terminated, truncated, info) of what `step` returned.

    Raises:
        InvalidInput: saying what is wrong with its shape or types.
    """
    if not isinstance(result, tuple) or len(result) != 5:
        raise InvalidInput(
            "step must return (observation, reward, terminated, truncated, info), "
            f"got {result!r:.200}"
        )
    observation, reward, terminated, truncated, info = result
    flags = [
        checked_flag("step: terminated", terminated),
        checked_flag("step: truncated", truncated),
    ]
    value = checked_reward("step: reward", reward)
    messages = as_messages(observation, last=any(flags))
    return messages, value, flags[0], flags[1], checked_info("step: info", info)


def checked_flag(where: str, flag: Any) -> bool:
    # numpy's bool is as good as Python's, and is not a subclass of it
    if type(flag).__name__ not in ("bool", "bool_"):
        raise InvalidInput(f"{where} must be a bool, got {flag!r:.200}")
    return bool(flag)


def checked_reward(where: str, reward: Any) -> float:
    try:
        value = float(reward)
    except (TypeError, ValueError):
        raise InvalidInput(f"{where} must be a number, got {reward!r:.200}") from None
    if not math.isfinite(value):
        raise InvalidInput(f"{where} must be finite, got {value}")
    return value


def checked_info(where: str, info: Any) -> dict[str, Any]:
    if not isinstance(info, dict):
        raise InvalidInput(f"{where} must be a dict, got a {type(info).__name__}")
    return info
