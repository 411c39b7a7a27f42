"""What an environment's process plays: an `Env` as a game of one agent, a `MultiAgentEnv` as it
is, and either with the agents that scripts play."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import TYPE_CHECKING, Any

from .core import Env, checked_reset, checked_step
from .multi_agent import MultiAgentEnv, Referee, Transition
from .scripted import Script, checked_action

if TYPE_CHECKING:
    from ..primitives.types import Message

AGENT = "agent"
"""The name of the one agent of an `Env`."""

BURST_SECONDS = 1.0
"""How long scripts may go on among themselves before the worker is told."""

Settle = Callable[[Any], Any]
"""Awaits what is awaitable, and gives back anything else."""


class _One:
    """An `Env`, whose agent is called `AGENT`."""

    def __init__(self, env: Env, settle: Settle) -> None:
        self.env, self.settle = env, settle
        self.agents = [AGENT]
        self.acting: list[str] = []

    @property
    def tools(self) -> dict[str, Sequence[dict[str, Any]] | None]:
        return {AGENT: getattr(self.env, "tool_schemas", None)}

    def reset(self, seed: int | None, options: dict[str, Any] | None) -> Transition:
        messages, info = checked_reset(self.settle(self.env.reset(seed=seed, options=options)))
        self.acting = self.agents
        return Transition({AGENT: messages}, infos={AGENT: info})

    def step(self, actions: dict[str, str]) -> Transition:
        result = self.settle(self.env.step(actions[AGENT]))
        messages, reward, terminated, truncated, info = checked_step(result)
        self.acting = [] if terminated or truncated else self.agents
        return Transition(
            {AGENT: messages},
            {AGENT: reward},
            {AGENT: terminated},
            {AGENT: truncated},
            {AGENT: info},
        )

    def forfeit(self, failures: dict[str, str]) -> Transition:
        self.acting = []
        return Transition({}, truncations={AGENT: True})


class _Many:
    """A `MultiAgentEnv`, whose every answer a referee checks."""

    def __init__(self, env: MultiAgentEnv, settle: Settle) -> None:
        self.env, self.settle = env, settle
        self.referee = Referee(env.possible_agents)
        self.agents = self.referee.agents

    @property
    def tools(self) -> dict[str, Sequence[dict[str, Any]] | None]:
        tools = self.env.tool_schemas or {}
        return {agent: tools.get(agent) for agent in self.agents}

    @property
    def acting(self) -> list[str]:
        return self.referee.acting

    def reset(self, seed: int | None, options: dict[str, Any] | None) -> Transition:
        return self.referee.reset(self.settle(self.env.reset(seed=seed, options=options)))

    def step(self, actions: dict[str, str]) -> Transition:
        return self.referee.step(self.settle(self.env.step(actions)))

    def forfeit(self, failures: dict[str, str]) -> Transition:
        result = self.settle(self.env.forfeit(failures))
        return self.referee.forfeit(result, list(failures))


class _ScriptedAgent:
    """A script, and the conversation that it sees."""

    def __init__(self, agent: str, script: Script) -> None:
        self.agent = agent
        self.script = script
        self.messages: list[Message] = []
        self.turns = 0

    def reset(self, seed: int | None) -> None:
        self.rng = Random(f"{seed} {self.agent}")

    def act(self, settle: Settle) -> str:
        try:
            result = settle(self.script([dict(m) for m in self.messages], self.rng))  # type: ignore[misc]
            action = checked_action(self.agent, result)
        except BaseException as error:
            error.add_note(f"(in the script that plays {self.agent!r})")
            raise
        self.messages.append({"role": "assistant", "content": action})
        self.turns += 1
        return action


class Game:
    """One match, up to the next turn of an agent that the worker plays.

    Args:
        env: what is played.
        scripts: by agent, what plays it here.
        max_turns: turns after which a script is not asked again.
        settle: how to await.
    """

    def __init__(
        self,
        env: Env | MultiAgentEnv,
        scripts: Mapping[str, Script],
        max_turns: int | None,
        settle: Settle,
    ) -> None:
        self.table = _Many(env, settle) if isinstance(env, MultiAgentEnv) else _One(env, settle)
        self.scripted = {agent: _ScriptedAgent(agent, script) for agent, script in scripts.items()}
        self.max_turns = max_turns
        self.settle = settle

    @property
    def agents(self) -> list[str]:
        return self.table.agents

    @property
    def tools(self) -> dict[str, Sequence[dict[str, Any]] | None]:
        return self.table.tools

    def reset(self, seed: int | None, options: dict[str, Any] | None) -> list[Transition]:
        for player in self.scripted.values():
            player.reset(seed)
        return self._play_on(self._told(self.table.reset(seed, options)))

    def step(self, actions: dict[str, str]) -> list[Transition]:
        """Every step up to where an agent of the worker's is to act, or the match is over."""
        return self._play_on(self._step(actions))

    def forfeit(self, failures: dict[str, str]) -> list[Transition]:
        return self._play_on(self._told(self.table.forfeit(failures)))

    def _play_on(self, first: Transition) -> list[Transition]:
        transitions, started = [first], time.monotonic()
        while self._scripts_alone() and time.monotonic() - started < BURST_SECONDS:
            transitions.append(self._step({}))
        return transitions

    def _scripts_alone(self) -> bool:
        players = [self.scripted.get(agent) for agent in self.table.acting]
        return bool(players) and all(
            player is not None and (self.max_turns is None or player.turns < self.max_turns)
            for player in players
        )

    def _step(self, actions: dict[str, str]) -> Transition:
        mine = [self.scripted[agent] for agent in self.table.acting if agent in self.scripted]
        scripted = {player.agent: player.act(self.settle) for player in mine}
        both = {**actions, **scripted}
        transition = self.table.step({a: both[a] for a in self.table.acting})
        transition.scripted = scripted
        return self._told(transition)

    def _told(self, transition: Transition) -> Transition:
        for agent, messages in transition.observations.items():
            if agent in self.scripted:
                self.scripted[agent].messages += messages
        return transition
