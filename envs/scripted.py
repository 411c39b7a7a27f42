"""Scripted agents: a function in place of a policy."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any, TypeAlias

from ..primitives.errors import InvalidInput

if TYPE_CHECKING:
    from ..primitives.types import Message

Script: TypeAlias = "Callable[[list[Message], Random], str | Awaitable[str]]"
"""`(messages, rng) -> action`: the agent's conversation so far, its own answers included, and a
generator seeded by the match's seed and the agent's name."""


@dataclass(frozen=True, init=False)
class Scripted:
    """An agent played by a function, plain or `async`: `Scripted(lambda messages, rng: "rock")`.

    The function travels with the match, by value where it must, and plays in the environment's
    own process: it may block, and when it raises or hangs it costs its match alone. What it
    imports is imported once, not per match. A callable object may keep state: every match has a
    fresh copy.

    Raises:
        InvalidInput: not callable, or it holds something that cannot be sent to another process.
    """

    name: str
    pickled: bytes

    def __init__(self, script: Script) -> None:
        import cloudpickle

        if not callable(script):
            raise InvalidInput(f"a script must be a function of (messages, rng), got {script!r}")
        name = getattr(script, "__name__", type(script).__name__)
        try:
            pickled = cloudpickle.dumps(script)
        except Exception as error:
            raise InvalidInput(
                f"script {name!r} cannot be sent to its match: {error}; keep locks, "
                "connections and files out of it"
            ) from error
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "pickled", pickled)

    def __repr__(self) -> str:
        return f"Scripted({self.name})"


def checked_action(agent: str, action: Any) -> str:
    """
    Raises:
        InvalidInput: the script of `agent` returned something else than a text.
    """
    if not isinstance(action, str):
        raise InvalidInput(f"the script of {agent!r} must return a str, got {action!r:.200}")
    return action
