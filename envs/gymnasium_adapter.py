"""Text environments of gymnasium: `make("gymnasium:<id>")`."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import gymnasium
from gymnasium import spaces

from ..primitives.errors import InvalidInput, NotFound
from .core import Env, ResetResult, StepResult


class GymnasiumEnv(Env):
    """A gymnasium environment whose observations are texts, and whose actions are texts or
    integers.

    An action outside its space is answered with a message that says so, without a step.

    Raises:
        InvalidInput: spaces of other kinds.
    """

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        if not isinstance(env.observation_space, spaces.Text):
            raise InvalidInput(
                f"gymnasium environment {env}: observations must be of a Text space, they are of "
                f"{env.observation_space}; wrap it in a gymnasium.ObservationWrapper that "
                "describes them in words"
            )
        if not isinstance(env.action_space, spaces.Text | spaces.Discrete):
            raise InvalidInput(
                f"gymnasium environment {env}: actions must be of a Text or Discrete space, they "
                f"are of {env.action_space}; wrap it in a gymnasium.ActionWrapper"
            )
        self.env = env
        self.action_space = env.action_space

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> ResetResult:
        return self.env.reset(seed=seed, options=options)

    def step(self, action: str) -> StepResult:
        chosen: int | str | None
        if isinstance(self.action_space, spaces.Discrete):
            chosen, wanted = _discrete(self.action_space, action)
        else:
            chosen, wanted = _text(self.action_space, action)
        if chosen is None:
            return f"ERROR: {wanted}", 0.0, False, False, {"invalid_action": action}
        observation, reward, terminated, truncated, info = self.env.step(chosen)
        return observation, float(reward), terminated, truncated, info

    def close(self) -> None:
        self.env.close()


def _discrete(space: spaces.Discrete, action: str) -> tuple[int | None, str]:
    first, last = int(space.start), int(space.start + space.n - 1)
    number = re.search(r"-?\d{1,18}", action)
    inside = number is not None and first <= int(number[0]) <= last
    return int(number[0]) if number and inside else None, f"answer with a number, {first} to {last}"


def _text(space: spaces.Text, action: str) -> tuple[str | None, str]:
    wanted = f"answer with {space.min_length} to {space.max_length} characters out of "
    wanted += repr("".join(sorted(space.character_set)))
    for candidate in (action, action.strip()):
        if space.contains(candidate):
            return candidate, wanted
    return None, wanted


def find_gymnasium(env_id: str) -> Callable[..., GymnasiumEnv]:
    """A factory of the registered environment; `module:Id-v0` imports the module first."""

    def factory(**kwargs: Any) -> GymnasiumEnv:
        try:
            env = gymnasium.make(env_id, disable_env_checker=True, **kwargs)
        except (gymnasium.error.UnregisteredEnv, ModuleNotFoundError) as error:
            raise NotFound(f"environment 'gymnasium:{env_id}': {error}") from None
        except TypeError as error:
            raise InvalidInput(
                f"environment 'gymnasium:{env_id}' cannot be made with {kwargs!r}: {error}"
            ) from error
        return GymnasiumEnv(env)

    return factory
