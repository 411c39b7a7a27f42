"""`check_env`: does an environment keep to the interface? In the spirit of gymnasium's."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from typing import Any

from ..primitives.errors import InvalidInput
from ..primitives.sync import run_blocking
from .core import Env, checked_reset, checked_step
from .multi_agent import MultiAgentEnv, Referee, Transition
from .registry import make

_Turn = tuple[Any, ...]


def check_env(
    env: str | Env | MultiAgentEnv,
    *,
    actions: Sequence[str] = ("hello", "1", ""),
    seed: int = 0,
    **kwargs: Any,
) -> None:
    """Play `actions` in an environment, given by name and arguments or as an object, and say
    everything that is wrong with it: signatures, shapes and types of what it returns, info that
    is not plain data, another outcome for the same seed and actions. In a game every agent that
    is to act takes the same action; then its first one forfeits.

    Raises:
        InvalidInput: listing what is wrong.
    """

    def made() -> Env | MultiAgentEnv:
        return make(env, **kwargs) if isinstance(env, str) else env

    tried = made()
    problems = _signature_problems(tried)
    if not problems:
        try:
            first, again = _play(made(), actions, seed), _play(made(), actions, seed)
            if isinstance(tried, MultiAgentEnv):
                _forfeit(tried, seed)
        except InvalidInput as error:
            problems.append(str(error))
        else:
            problems += _differences(first, again)
            problems += _odd_info(first)
    if problems:
        name = env if isinstance(env, str) else type(env).__name__
        raise InvalidInput(f"environment {name!r}:\n- " + "\n- ".join(problems))


def _signature_problems(env: Any) -> list[str]:
    game = isinstance(env, MultiAgentEnv)
    step = "actions" if game else "action"
    wanted: dict[str, tuple[str, list[str], dict[str, Any]]] = {
        "reset": ("reset(*, seed=None, options=None)", [], {"seed": 0, "options": None}),
        "step": (f"step({step})", [step], {}),
        "close": ("close()", [], {}),
    }
    if game:
        wanted["forfeit"] = ("forfeit(failures)", ["failures"], {})
    problems = []
    for method, (form, positional, keywords) in wanted.items():
        function = getattr(env, method, None)
        if function is None:
            problems.append(f"there is no method {method}")
            continue
        try:
            inspect.signature(function).bind(*positional, **keywords)
        except TypeError as error:
            problems.append(f"{method} cannot be called as {form}: {error}")
    return problems


def _play(env: Env | MultiAgentEnv, actions: Sequence[str], seed: int) -> list[_Turn]:
    """Of the reset and every step, what was returned, checked; the info last."""
    if isinstance(env, MultiAgentEnv):
        return _play_game(env, actions, seed)
    turns: list[_Turn] = [checked_reset(_settle(env.reset(seed=seed, options=None)))]
    for action in actions:
        turn = checked_step(_settle(env.step(action)))
        turns.append(turn)
        if turn[2] or turn[3]:
            break
    _settle(env.close())
    return turns


def _play_game(env: MultiAgentEnv, actions: Sequence[str], seed: int) -> list[_Turn]:
    def turn(transition: Transition) -> _Turn:
        of = transition
        return of.observations, of.rewards, of.terminations, of.truncations, of.infos

    referee = Referee(env.possible_agents)
    turns = [turn(referee.reset(_settle(env.reset(seed=seed, options=None))))]
    for action in actions:
        if not referee.acting:
            break
        result = _settle(env.step(dict.fromkeys(referee.acting, action)))
        turns.append(turn(referee.step(result)))
    _settle(env.close())
    return turns


def _forfeit(env: MultiAgentEnv, seed: int) -> None:
    referee = Referee(env.possible_agents)
    referee.reset(_settle(env.reset(seed=seed, options=None)))
    if referee.acting:
        failed = referee.acting[0]
        result = _settle(env.forfeit({failed: "a check of the environment"}))
        referee.forfeit(result, [failed])
    _settle(env.close())


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
