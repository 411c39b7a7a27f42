"""Environments of gymnasium, in words: `make("gymnasium:<id>")`."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import gymnasium
from gymnasium import spaces

from ..primitives.errors import InvalidInput, NotFound
from .core import Env, ResetResult, StepResult, message

Describe: TypeAlias = Callable[[Any], str]


class GymnasiumEnv(Env):
    """A gymnasium environment played in words.

    Observations are told as text: a Text space as it is; with `render_mode="ansi"` what the
    environment renders (a highlighted character stands in brackets); numbers of Discrete,
    MultiDiscrete and MultiBinary spaces, Tuples and Dicts of them, as they are; anything else
    through `describe`. Actions are texts or integers; one outside its space is answered with a
    message that says so, without a step.

    Args:
        env: the environment.
        describe: from an observation to its text, a function or its `module:name`.
        actions: names of a Discrete space's actions, which then may be answered by name.
        instructions: the system message. By default it says what an answer looks like, unless
            the observations are texts by themselves.

    Raises:
        InvalidInput: spaces of other kinds, or names that do not fit.
    """

    def __init__(
        self,
        env: gymnasium.Env[Any, Any],
        *,
        describe: Describe | str | None = None,
        actions: Sequence[str] = (),
        instructions: str | None = None,
    ) -> None:
        if not isinstance(env.action_space, spaces.Text | spaces.Discrete):
            raise InvalidInput(
                f"gymnasium environment {env}: actions must be of a Text or Discrete space, they "
                f"are of {env.action_space}; wrap it in a gymnasium.ActionWrapper"
            )
        if actions and not (
            isinstance(env.action_space, spaces.Discrete) and len(actions) == env.action_space.n
        ):
            raise InvalidInput(
                f"gymnasium environment {env}: {len(actions)} names for {env.action_space}"
            )
        self.env = env
        self.action_space = env.action_space
        self.actions = [name.lower() for name in actions]
        self._told = _teller(env, describe)
        if instructions is None and self._told is not _as_it_is:
            instructions = f"Each turn, {self._wanted()}."
        self.instructions = instructions

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> ResetResult:
        observation, info = self.env.reset(seed=seed, options=options)
        told = self._told(observation)
        if not self.instructions:
            return told, info
        return [message("system", self.instructions), message("user", told)], info

    def step(self, action: str) -> StepResult:
        chosen = self._chosen(action)
        if chosen is None:
            return f"ERROR: {self._wanted()}", 0.0, False, False, {"invalid_action": action}
        observation, reward, terminated, truncated, info = self.env.step(chosen)
        return self._told(observation), float(reward), terminated, truncated, info

    def close(self) -> None:
        self.env.close()

    def _chosen(self, action: str) -> int | str | None:
        space = self.action_space
        if isinstance(space, spaces.Text):
            return next((text for text in (action, action.strip()) if space.contains(text)), None)
        first, last = int(space.start), int(space.start + space.n - 1)
        number = re.search(r"-?\d{1,18}", action)
        if number:
            return int(number[0]) if first <= int(number[0]) <= last else None
        words = re.findall(r"\w+", action.lower())
        named = [self.actions.index(word) for word in words if word in self.actions]
        return first + named[-1] if named else None

    def _wanted(self) -> str:
        space = self.action_space
        if isinstance(space, spaces.Text):
            characters = repr("".join(sorted(space.character_set)))
            return (
                f"answer with {space.min_length} to {space.max_length} characters out of "
                f"{characters}"
            )
        first, last = int(space.start), int(space.start + space.n - 1)
        named = f", or by name: {', '.join(self.actions)}" if self.actions else ""
        return f"answer with a number, {first} to {last}{named}"


def _teller(env: gymnasium.Env[Any, Any], describe: Describe | str | None) -> Describe:
    """What turns this environment's observations into text."""
    if isinstance(describe, str):
        module, _, name = describe.partition(":")
        try:
            described = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise InvalidInput(f"describe must be 'module:function': {error}") from error
        return described
    if describe is not None:
        return describe
    if isinstance(env.observation_space, spaces.Text):
        return _as_it_is
    if env.render_mode == "ansi":
        return lambda _: _without_colours(str(env.render()))
    if _countable(env.observation_space):
        return lambda observation: f"Observation: {_stated(observation)}"
    raise InvalidInput(
        f"gymnasium environment {env}: observations of {env.observation_space} are no text and no "
        'few whole numbers; make it with render_mode="ansi" where it has that, or give '
        "describe, a function from an observation to a text"
    )


def _as_it_is(observation: str) -> str:
    return observation


def _countable(space: spaces.Space[Any]) -> bool:
    if isinstance(space, spaces.Tuple):
        return all(map(_countable, space.spaces))
    if isinstance(space, spaces.Dict):
        return all(map(_countable, space.spaces.values()))
    return isinstance(
        space, spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary | spaces.Text
    )


def _stated(observation: Any) -> str:
    if isinstance(observation, tuple):
        return f"({', '.join(map(_stated, observation))})"
    if isinstance(observation, dict):
        return ", ".join(f"{name}: {_stated(value)}" for name, value in observation.items())
    plain = observation.tolist() if hasattr(observation, "tolist") else observation
    return str(plain)


_COLOURED = re.compile(r"\x1b\[([\d;]*)m(.*?)\x1b\[0m")
_COLOURS = ("gray", "red", "green", "yellow", "blue", "magenta", "cyan", "white")


def _without_colours(rendered: str) -> str:
    """In toy-text environments a background colour alone says where the agent stands, and a letter's
    colour what it is: brackets and a line below the picture say it here."""
    coloured: list[str] = []

    def plain(match: re.Match[str]) -> str:
        codes = [int(code) for code in match[1].split(";") if code]
        if any(40 <= code < 48 for code in codes):
            return f"[{match[2]}]"
        coloured.extend(f"{match[2]} is {_COLOURS[code - 30]}" for code in codes if 30 <= code < 38)
        return match[2]

    picture = _COLOURED.sub(plain, rendered).strip("\n")
    return f"{picture}\n{', '.join(coloured)}" if coloured else picture


def find_gymnasium(env_id: str) -> Callable[..., GymnasiumEnv]:
    """A factory of the registered environment; `module:Id-v0` imports the module first."""

    def factory(
        *,
        describe: Describe | str | None = None,
        actions: Sequence[str] = (),
        instructions: str | None = None,
        **kwargs: Any,
    ) -> GymnasiumEnv:
        try:
            env = gymnasium.make(env_id, disable_env_checker=True, **kwargs)
        except (gymnasium.error.UnregisteredEnv, ModuleNotFoundError) as error:
            raise NotFound(f"environment 'gymnasium:{env_id}': {error}") from None
        except TypeError as error:
            raise InvalidInput(
                f"environment 'gymnasium:{env_id}' cannot be made with {kwargs!r}: {error}"
            ) from error
        return GymnasiumEnv(env, describe=describe, actions=actions, instructions=instructions)

    return factory
