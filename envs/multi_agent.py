"""The multi-agent environment interface: PettingZoo's names, with messages and text.

A game is a small class:

    class Matching(MultiAgentEnv):
        possible_agents = ("even", "odd")

        def reset(self, *, seed=None, options=None):
            return {agent: "Say 0 or 1." for agent in self.possible_agents}, {}

        def step(self, actions):
            won = "even" if actions["even"] == actions["odd"] else "odd"
            return {}, {won: 1.0}, dict.fromkeys(self.possible_agents, True), {}, {}

Who acts next are exactly the agents that have an observation and are not done: one for a game of
turns, several where they act at the same time.
"""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from ..primitives.errors import InvalidInput
from .core import (
    Observation,
    as_messages,
    checked_flag,
    checked_info,
    checked_reward,
)

if TYPE_CHECKING:  # environment processes do without numpy
    from ..primitives.types import Message

MultiResetResult: TypeAlias = tuple[Mapping[str, Observation], Mapping[str, dict[str, Any]]]
"""(observations, infos), by agent"""

MultiStepResult: TypeAlias = tuple[
    Mapping[str, Observation],
    Mapping[str, float],
    Mapping[str, bool],
    Mapping[str, bool],
    Mapping[str, dict[str, Any]],
]
"""(observations, rewards, terminations, truncations, infos), by agent"""


class MultiAgentEnv:
    """Base class of games. Methods may be plain or `async`.

    What is missing from a returned mapping is a reward of 0, an agent that goes on, an empty
    info. Like an `Env`, an object lives for one match, in a process of its own.
    """

    possible_agents: Sequence[str] = ()
    """Every agent that may take part."""

    tool_schemas: Mapping[str, Sequence[dict[str, Any]]] | None = None
    """By agent: JSON schemas of the tools it is offered, for chat templates that take `tools`."""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> MultiResetResult | Awaitable[MultiResetResult]:
        """Begin a match. The same seed and options must give the same one."""
        raise NotImplementedError

    def step(self, actions: dict[str, str]) -> MultiStepResult | Awaitable[MultiStepResult]:
        """Answer the turns of all agents that were to act: their texts, without special tokens.

        A done agent's observation is the last message of its transcript. Rewards count for an
        agent's latest turn, whoever's turn it is; a done agent may still get one.
        """
        raise NotImplementedError

    def forfeit(self, failures: dict[str, str]) -> MultiStepResult | Awaitable[MultiStepResult]:
        """Say what happens when agents that are to act cannot, for these reasons: its context is
        full, it has taken all its turns, its policy fails. The failing agents must be done then.

        By default the match ends for everybody, truncated. A game may give the others the win,
        or go on without the agents that failed; who is to act then needs a new observation.
        """
        return {}, {}, {}, dict.fromkeys(self.possible_agents, True), {}

    def close(self) -> Awaitable[None] | None:
        """Free what the match held."""


@dataclass
class Transition:
    """One step of a game, checked. `scripted`: the actions in it that scripts took."""

    observations: dict[str, list[Message]]
    rewards: dict[str, float] = field(default_factory=dict)
    terminations: dict[str, bool] = field(default_factory=dict)
    truncations: dict[str, bool] = field(default_factory=dict)
    infos: dict[str, dict[str, Any]] = field(default_factory=dict)
    scripted: dict[str, str] = field(default_factory=dict)


class Referee:
    """Checks what a game returns, and knows who is done and who is to act.

    Raises:
        InvalidInput: `possible_agents` are not different names.
    """

    def __init__(self, possible_agents: Any) -> None:
        named = isinstance(possible_agents, list | tuple) and all(
            isinstance(agent, str) and agent for agent in possible_agents
        )
        if not named or not possible_agents or len(set(possible_agents)) < len(possible_agents):
            raise InvalidInput(
                "possible_agents must be a list of different names, at least one, "
                f"got {possible_agents!r:.200}"
            )
        self.agents = list(possible_agents)
        self.done: set[str] = set()
        self.acting: list[str] = []

    def reset(self, result: Any) -> Transition:
        """
        Raises:
            InvalidInput: saying what is wrong with what `reset` returned, and for which agent.
        """
        if not isinstance(result, tuple) or len(result) != 2:
            raise InvalidInput(f"reset must return (observations, infos), got {result!r:.200}")
        self.done = set()
        observations, infos = result
        return self._checked("reset", observations, {}, {}, {}, infos)

    def step(self, result: Any) -> Transition:
        """As `reset`, for `step`."""
        return self._checked("step", *self._five("step", result))

    def forfeit(self, result: Any, failed: Sequence[str]) -> Transition:
        """As `reset`, for `forfeit`."""
        transition = self._checked("forfeit", *self._five("forfeit", result))
        if going_on := [agent for agent in failed if agent not in self.done]:
            raise InvalidInput(
                f"forfeit must terminate or truncate the agents that cannot act: {going_on}"
            )
        return transition

    def _five(self, method: str, result: Any) -> tuple[Any, Any, Any, Any, Any]:
        if not isinstance(result, tuple) or len(result) != 5:
            raise InvalidInput(
                f"{method} must return (observations, rewards, terminations, truncations, infos), "
                f"got {result!r:.200}"
            )
        return result

    def _checked(
        self,
        method: str,
        observations: Any,
        rewards: Any,
        terminations: Any,
        truncations: Any,
        infos: Any,
    ) -> Transition:
        def by_agent(name: str, values: Any) -> dict[str, Any]:
            return self._by_agent(f"{method}: {name}", values)

        terminated = {
            agent: checked_flag(f"{method}: terminations[{agent!r}]", flag)
            for agent, flag in by_agent("terminations", terminations).items()
        }
        truncated = {
            agent: checked_flag(f"{method}: truncations[{agent!r}]", flag)
            for agent, flag in by_agent("truncations", truncations).items()
        }
        self.done |= {a for flags in (terminated, truncated) for a, flag in flags.items() if flag}
        messages = {}
        for agent, observation in by_agent("observations", observations).items():
            try:
                messages[agent] = as_messages(observation, last=agent in self.done)
            except InvalidInput as error:
                raise InvalidInput(f"{method}: observations[{agent!r}]: {error}") from None
        transition = Transition(
            messages,
            {
                agent: checked_reward(f"{method}: rewards[{agent!r}]", reward)
                for agent, reward in by_agent("rewards", rewards).items()
            },
            terminated,
            truncated,
            {
                agent: checked_info(f"{method}: infos[{agent!r}]", info)
                for agent, info in by_agent("infos", infos).items()
            },
        )
        self.acting = [a for a in self.agents if a in messages and a not in self.done]
        if not self.acting and len(self.done) < len(self.agents):
            alive = [agent for agent in self.agents if agent not in self.done]
            raise InvalidInput(
                f"{method}: nobody may act, since no agent that goes on has an observation, but "
                f"{alive} are neither terminated nor truncated"
            )
        return transition

    def _by_agent(self, where: str, values: Any) -> dict[str, Any]:
        if not isinstance(values, Mapping):
            raise InvalidInput(f"{where} must be a dict by agent, got {values!r:.200}")
        for agent in values:
            if agent not in self.agents:
                raise InvalidInput(
                    f"{where}: there is no agent {agent!r}; the agents are {self.agents}"
                )
        return dict(values)
