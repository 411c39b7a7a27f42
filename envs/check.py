"""`check_env`: does an environment keep to the interface? In the spirit of gymnasium's."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from typing import Any

from ..primitives.errors import InvalidInput
from ..primitives.sync import run_blocking
from .core import Env, checked_reset, checked_step
from .registry import make

_Turn = tuple[Any, ...]


def check_env(
    env: str | Env,
    *,
    actions: Sequence[str] = ("hello", "1", ""),
    seed: int = 0,
    **kwargs: Any,
) -> None:
    """Play `actions` in an environment, given by name and arguments or as an object, and say
    everything that is wrong with it: signatures, shapes and types of what it returns, info that
    is not plain data, another outcome for the same seed and actions.

    Raises:
        InvalidInput: listing what is wrong.
    """
    problems = _signature_problems(env if isinstance(env, Env) else make(env, **kwargs))
    if not problems:
        try:
            first = _play(env if isinstance(env, Env) else make(env, **kwargs), actions, seed)
            again = _play(env if isinstance(env, Env) else make(env, **kwargs), actions, seed)
        except InvalidInput as error:
            problems.append(str(error))
        else:
            problems += _differences(first, again)
            problems += _odd_info(first)
    if problems:
        name = env if isinstance(env, str) else type(env).__name__
        raise InvalidInput(f"environment {name!r}:\n- " + "\n- ".join(problems))


def _signature_problems(env: Any) -> list[str]:
    problems = []
    for method, example in (("reset", {"seed": 0, "options": None}), ("step", {}), ("close", {})):
        function = getattr(env, method, None)
        if function is None:
            problems.append(f"there is no method {method}")
            continue
        positional = ["action"] if method == "step" else []
        try:
            inspect.signature(function).bind(*positional, **example)
        except TypeError as error:
            wanted = {
                "reset": "reset(*, seed=None, options=None)",
                "step": "step(action)",
                "close": "close()",
            }[method]
            problems.append(f"{method} cannot be called as {wanted}: {error}")
    return problems


def _play(env: Env, actions: Sequence[str], seed: int) -> list[_Turn]:
    """(messages, info) of the reset, then (messages, reward, terminated, truncated, info)s."""
    turns: list[_Turn] = [checked_reset(_settle(env.reset(seed=seed, options=None)))]
    for action in actions:
        turn = checked_step(_settle(env.step(action)))
        turns.append(turn)
        if turn[2] or turn[3]:
            break
    _settle(env.close())
    return turns


def _settle(value: Any) -> Any:
    if not inspect.isawaitable(value):
        return value

    async def settle() -> Any:
        return await value

    return run_blocking(settle())


def _differences(first: list[_Turn], again: list[_Turn]) -> list[str]:
    for index, (one, other) in enumerate(zip(first, again, strict=False)):
        if one[:-1] != other[:-1]:
            when = "reset" if index == 0 else f"step {index}"
            return [
                f"{when} gave another outcome for the same seed and actions: "
                f"{one[:-1]!r:.200} and then {other[:-1]!r:.200}; draw everything random from "
                "random.Random(seed), made in reset"
            ]
    return []


def _odd_info(turns: list[_Turn]) -> list[str]:
    for index, turn in enumerate(turns):
        try:
            json.dumps(turn[-1], default=lambda value: value.tolist())
        except (TypeError, ValueError, AttributeError) as error:
            when = "reset" if index == 0 else f"step {index}"
            return [f"info of {when} holds what is not plain data ({error}); it arrives as text"]
    return []
