"""PettingZoo environments, AEC and parallel: `make("pettingzoo:classic.tictactoe_v3")`."""

from __future__ import annotations

import importlib
import re
from abc import abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from gymnasium import spaces
from pettingzoo.utils import AECEnv, ParallelEnv

from ..primitives.errors import InvalidInput, NotFound
from .extras import extra
from .multi_agent import MultiAgentEnv, MultiResetResult, MultiStepResult

MAX_NUMBERS = 256
"""Arrays of more are no text that a model could read."""

Describe = Callable[[Any, str], str]
"""`(observation, agent) -> text`."""

Parse = Callable[[str, str], Any]
"""`(action's text, agent) -> action`; `ValueError` where it is none."""


class PettingZooEnv(MultiAgentEnv):
    """A PettingZoo environment in text.

    Observations that are texts, numbers or arrays of up to 256 numbers are shown as they are, and
    of an `action_mask` the legal actions; actions are a number (`Discrete`) or a text. For others:

        from pettingzoo.classic import chess_v6
        register("chess", lambda: AecGame(chess_v6.env(), describe=board, parse=move))

    An illegal action is answered with a message. After `max_illegal` of them in a row, and where
    it cannot act for another reason, the agent forfeits: the match is over, with `illegal_reward`
    for it and 0 for the others, as PettingZoo's own wrapper has it.

    Raises:
        InvalidInput: it does not tell its possible agents.
    """

    def __init__(
        self,
        env: Any,
        *,
        describe: Describe | None = None,
        parse: Parse | None = None,
        max_illegal: int = 3,
        illegal_reward: float = -1.0,
    ) -> None:
        self.env = env
        self.describe, self.parse = describe, parse
        self.max_illegal, self.illegal_reward = max_illegal, illegal_reward
        agents = getattr(env, "possible_agents", None)
        if not agents:
            raise InvalidInput(f"PettingZoo environment {env} does not tell its possible_agents")
        self.possible_agents = list(agents)

    @abstractmethod
    def begin(
        self, seed: int | None, options: dict[str, Any] | None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Reset; (observations of who is to act, infos)."""

    @abstractmethod
    def advance(
        self, actions: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, float], dict[str, bool], dict[str, bool], dict[str, Any]]:
        """Step; what `MultiAgentEnv.step` returns, with PettingZoo's observations."""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> MultiResetResult:
        self.chosen: dict[str, Any] = {}
        self.legal: dict[str, list[int] | None] = {}
        self.illegal = dict.fromkeys(self.possible_agents, 0)
        observations, infos = self.begin(seed, options)
        return self._worded(observations, infos), infos

    def step(self, actions: dict[str, str]) -> MultiStepResult:
        refused = {}
        for agent, text in actions.items():
            try:
                self.chosen[agent] = self._parsed(agent, text)
                self.illegal[agent] = 0
            except ValueError as error:
                self.illegal[agent] += 1
                refused[agent] = f"That is not a legal action: {error}."
        failures = {
            agent: f"{self.illegal[agent]} illegal actions in a row"
            for agent in refused
            if self.illegal[agent] >= self.max_illegal
        }
        if failures:
            return self.forfeit(failures)
        if refused:  # the others' actions are kept until all are legal
            return refused, {}, {}, {}, {agent: {"illegal_action": True} for agent in refused}
        actions, self.chosen = self.chosen, {}
        observations, rewards, terminations, truncations, infos = self.advance(actions)
        over = {a for flags in (terminations, truncations) for a, flag in flags.items() if flag}
        playing = {a: seen for a, seen in observations.items() if a not in over}
        return self._worded(playing, infos), rewards, terminations, truncations, infos

    def forfeit(self, failures: dict[str, str]) -> MultiStepResult:
        told = "; ".join(f"{agent} forfeits: {reason}" for agent, reason in failures.items())
        return (
            dict.fromkeys(self.possible_agents, told),
            dict.fromkeys(failures, self.illegal_reward),
            dict.fromkeys(self.possible_agents, True),
            {},
            {},
        )

    def close(self) -> None:
        self.env.close()

    def _worded(self, observations: Mapping[str, Any], infos: Mapping[str, Any]) -> dict[str, str]:
        return {a: self._words(a, seen, infos.get(a, {})) for a, seen in observations.items()}

    def _words(self, agent: str, observation: Any, info: Mapping[str, Any]) -> str:
        masked = isinstance(observation, Mapping) and "action_mask" in observation
        mask = observation["action_mask"] if masked else info.get("action_mask")
        space = self.env.action_space(agent)
        first = int(getattr(space, "start", 0))
        self.legal[agent] = None if mask is None else (np.flatnonzero(mask) + first).tolist()
        if self.describe is not None:
            return self.describe(observation, agent)
        text = _shown(observation, agent)
        if self.parse is None and isinstance(space, spaces.Discrete):
            text += f"\nAnswer with the number of an action, {self._range(agent, space)}."
        return text

    def _range(self, agent: str, space: spaces.Discrete) -> str:
        legal = self.legal.get(agent)
        if legal is None:
            return f"{int(space.start)} to {int(space.start + space.n - 1)}"
        return f"one of {', '.join(map(str, legal))}"

    def _parsed(self, agent: str, text: str) -> Any:
        space = self.env.action_space(agent)
        if self.parse is not None:
            action = self.parse(text, agent)
        elif isinstance(space, spaces.Discrete):
            number = re.search(r"-?\d{1,18}", text)
            if number is None:
                raise ValueError(f"answer with a number, {self._range(agent, space)}")
            action = int(number[0])
        elif isinstance(space, spaces.Text):
            action = text
        else:
            raise InvalidInput(
                f"PettingZoo environment {self.env}: actions of {agent!r} are of {space}, give "
                "parse(text, agent) to make them from text"
            )
        legal = self.legal.get(agent)
        if legal is not None and action not in legal:
            raise ValueError(f"{text!r:.100} is not one of the legal ones")
        if not space.contains(action):
            wanted = self._range(agent, space) if isinstance(space, spaces.Discrete) else str(space)
            raise ValueError(f"{text!r:.100} is not in {wanted}")
        return action


class AecGame(PettingZooEnv):
    """A PettingZoo environment whose agents act one after another."""

    def begin(
        self, seed: int | None, options: dict[str, Any] | None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        self.env.reset(seed=seed, options=options)
        return self._next(), self._infos()

    def advance(
        self, actions: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, float], dict[str, bool], dict[str, bool], dict[str, Any]]:
        env = self.env
        rewards: dict[str, float] = dict.fromkeys(self.possible_agents, 0.0)
        over: dict[str, dict[str, bool]] = {"terminations": {}, "truncations": {}}

        def note() -> None:
            for agent, reward in env.rewards.items():
                rewards[agent] += float(reward)
            for name, flags in over.items():
                flags |= {a: True for a, flag in getattr(env, name).items() if flag}

        env.step(actions[env.agent_selection])
        note()
        infos = self._infos()
        while env.agents and env.agent_selection in (over["terminations"] | over["truncations"]):
            env.step(None)  # so that PettingZoo takes a done agent off
            note()
        if not env.agents:  # over for all, also for any that never came in
            over["terminations"] |= {
                a: True for a in self.possible_agents if a not in over["truncations"]
            }
        return self._next(), rewards, over["terminations"], over["truncations"], infos

    def _next(self) -> dict[str, Any]:
        env = self.env
        return {env.agent_selection: env.observe(env.agent_selection)} if env.agents else {}

    def _infos(self) -> dict[str, Any]:
        return {agent: dict(info) for agent, info in self.env.infos.items()}


class ParallelGame(PettingZooEnv):
    """A PettingZoo environment whose agents act at the same time."""

    def begin(
        self, seed: int | None, options: dict[str, Any] | None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        observations, infos = self.env.reset(seed=seed, options=options)
        return dict(observations), {agent: dict(info) for agent, info in infos.items()}

    def advance(
        self, actions: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, float], dict[str, bool], dict[str, bool], dict[str, Any]]:
        observations, rewards, terminations, truncations, infos = self.env.step(actions)
        terminations = {agent: bool(flag) for agent, flag in terminations.items()}
        if not self.env.agents:
            terminations |= {a: True for a in self.possible_agents if not truncations.get(a)}
        return (
            dict(observations),
            {agent: float(reward) for agent, reward in rewards.items()},
            terminations,
            {agent: bool(flag) for agent, flag in truncations.items()},
            {agent: dict(info) for agent, info in infos.items()},
        )


def _shown(observation: Any, agent: str) -> str:
    if isinstance(observation, str):
        return observation
    if isinstance(observation, Mapping):
        parts = {name: part for name, part in observation.items() if name != "action_mask"}
        if len(parts) == 1:
            return _shown(next(iter(parts.values())), agent)
        return "\n".join(f"{name}: {_shown(part, agent)}" for name, part in parts.items())
    array = np.asarray(observation)
    if array.dtype.kind not in "biuf" or array.size > MAX_NUMBERS:
        raise InvalidInput(
            f"the observation of {agent!r} is no text, but of type {type(observation).__name__} "
            f"and shape {array.shape}: give describe(observation, agent) to put it in words"
        )
    return np.array2string(array.astype(int) if array.dtype.kind == "b" else array, separator=", ")


def find_pettingzoo(name: str) -> Callable[..., PettingZooEnv]:
    """A factory of `pettingzoo.<name>`, or else of the module `name`: of its `parallel_env` if it
    has one, else of its `env`."""
    extra("pettingzoo", f"environment 'pettingzoo:{name}'")
    module: Any = None
    for path in (f"pettingzoo.{name}", name):
        try:
            module = importlib.import_module(path)
            break
        except ModuleNotFoundError as error:
            if error.name is None or not f"{path}.".startswith(f"{error.name}."):
                raise NotFound(
                    f"environment 'pettingzoo:{name}' needs the module {error.name!r}, which is "
                    "not installed"
                ) from None
    if module is None:
        raise NotFound(f"environment 'pettingzoo:{name}': PettingZoo has no module {name!r}")
    return partial(_made, module)


def _made(
    module: Any,
    *,
    describe: Describe | None = None,
    parse: Parse | None = None,
    max_illegal: int = 3,
    illegal_reward: float = -1.0,
    **kwargs: Any,
) -> PettingZooEnv:
    maker = getattr(module, "parallel_env", None) or getattr(module, "env", None)
    if maker is None:
        raise NotFound(f"module {module.__name__!r} has neither `env` nor `parallel_env`")
    try:
        env = maker(**kwargs)
    except TypeError as error:
        raise InvalidInput(
            f"environment {module.__name__!r} cannot be made with {kwargs!r}: {error}"
        ) from error
    kind = ParallelGame if isinstance(env, ParallelEnv) else AecGame
    if not isinstance(env, ParallelEnv | AECEnv):
        raise InvalidInput(f"module {module.__name__!r} made a {type(env).__name__}, no PettingZoo")
    return kind(
        env,
        describe=describe,
        parse=parse,
        max_illegal=max_illegal,
        illegal_reward=illegal_reward,
    )
