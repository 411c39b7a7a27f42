"""The loop of every episode: policies and an environment taking turns, each agent recorded by
itself. An episode of one agent is a match with one seat."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from ..primitives.client import SamplingClient
from ..primitives.errors import EnvironmentFailure, OutOfCapacity, Unavailable
from ..primitives.types import Match, Message, SampledSequence, SamplingParams, Trajectory
from .isolation import EnvPool, EnvProcess
from .multi_agent import Transition
from .renderer import ChatRenderer, Conversation

if TYPE_CHECKING:
    from .episode import EpisodeLimits
    from .fork_server import EnvSource

T = TypeVar("T")


class Spec(Protocol):
    """What the specs of episodes and matches have in common."""

    @property
    def env(self) -> str: ...
    @property
    def source(self) -> EnvSource: ...
    @property
    def env_kwargs(self) -> Mapping[str, Any]: ...
    @property
    def seed(self) -> int: ...
    @property
    def options(self) -> Mapping[str, Any] | None: ...
    @property
    def limits(self) -> EpisodeLimits: ...


@dataclass(frozen=True)
class Seat:
    """What plays an agent: turn t samples with a seed derived from `seed` and t."""

    policy: SamplingClient
    renderer: ChatRenderer
    params: SamplingParams
    seed: str


Seats = Callable[[Sequence[str]], Mapping[str, Seat]]
"""The seats of a game's agents, without those that scripts play; raises where they do not fit."""


async def play(pool: EnvPool, spec: Spec, seats: Seats) -> Match:
    """Play one match to its end; every trajectory's `info` is its agent's last one with `turns`
    added.

    Raises:
        EnvironmentFailure: the environment or a script raised, hung, died or used too much
            memory, or the match took too long.
        NotFound, InvalidInput: no such environment, or not with these arguments.
    """
    limits = spec.limits
    progress = _Progress()
    try:
        async with (
            asyncio.timeout(limits.episode_seconds),
            pool.open(
                spec.source,
                spec.env_kwargs,
                max_turns=limits.max_turns,
                step_seconds=limits.step_seconds,
                memory_bytes=limits.memory_bytes,
            ) as process,
        ):
            return await _Table(process, seats(process.agents), spec, progress).play()
    except TimeoutError:
        raise EnvironmentFailure(
            f"environment {spec.env!r}: the episode was not over within "
            f"{limits.episode_seconds:g} s; it was {progress.doing}"
        ) from None


@dataclass
class _Progress:
    doing: str = "waiting for its environment's process"


class _Table:
    """One match under way."""

    def __init__(
        self, process: EnvProcess, seats: Mapping[str, Seat], spec: Spec, progress: _Progress
    ) -> None:
        self.process, self.spec, self.progress = process, spec, progress
        self.seats = seats
        self.players: dict[str, _Player] = {}
        self.acting: list[_Player] = []

    async def play(self) -> Match:
        started, spec = time.monotonic(), self.spec
        options = None if spec.options is None else dict(spec.options)
        opening = await self.process.begin(spec.seed, options)
        # Not before, for the tools of a server are known only once it runs.
        self.players = {
            agent: _Player(agent, self.seats.get(agent), self.process.tools[agent], spec.limits)
            for agent in self.process.agents
        }
        self._take(opening)
        forfeits: dict[str, str] = {}
        turn = 0
        while self.acting:
            turn += 1
            failures = {p.agent: why for p in self.acting if (why := p.cannot_act())}
            sampled: dict[str, SampledSequence] = {}
            if not failures:
                self.progress.doing = f"waiting for the policy in turn {turn}"
                sampled, failures = await self._sample()
            self.progress.doing = f"waiting for the environment in turn {turn}"
            if failures:
                forfeits |= failures
                self._take(await self.process.forfeit(failures))
            else:
                actions = {a: self.players[a].says(tokens) for a, tokens in sampled.items()}
                self._take(await self.process.act(actions))
        seconds = time.monotonic() - started
        return Match(
            {a: player.trajectory(spec.seed, seconds) for a, player in self.players.items()},
            [agent for agent, player in self.players.items() if player.is_live],
            forfeits,
            spec.seed,
            seconds,
        )

    def _take(self, transitions: Sequence[Transition]) -> None:
        for transition in transitions:
            for agent, action in transition.scripted.items():
                self.players[agent].said(action)
            for player in self.players.values():
                player.take(transition)
            self.acting = [
                player
                for agent, player in self.players.items()
                if agent in transition.observations and not player.done
            ]

    async def _sample(self) -> tuple[dict[str, SampledSequence], dict[str, str]]:
        """The turns of the agents that are to act and have a seat, sampled at the same time, and
        why those whose policy failed have none."""
        players = [player for player in self.acting if player.seat is not None]
        turns = await _together([player.sample() for player in players])
        sampled, failures = {}, {}
        for player, turn in zip(players, turns, strict=True):
            if isinstance(turn, SampledSequence):
                sampled[player.agent] = turn
            elif len(self.players) == 1:
                raise turn  # there is nobody else for whom the episode could go on
            else:
                failures[player.agent] = f"its policy failed: {turn}"
        return sampled, failures


class _Player:
    """One agent's part of a match. Its conversation begins when it is first asked to act; what it
    is told is rendered only when it must answer."""

    def __init__(
        self,
        agent: str,
        seat: Seat | None,
        tools: Sequence[dict[str, Any]] | None,
        limits: EpisodeLimits,
    ) -> None:
        self.agent, self.seat, self.tools, self.limits = agent, seat, tools, limits
        self.conversation: Conversation | None = None
        self.told: list[Message] = []  # and not yet in the conversation
        self.rewards: list[float] = []
        self.early_reward = 0.0  # before its first turn
        self.terminated = self.truncated = False
        self.info: dict[str, Any] = {}

    @property
    def done(self) -> bool:
        return self.terminated or self.truncated

    @property
    def is_live(self) -> bool:
        if self.seat is None or not isinstance(self.seat.policy, SamplingClient):
            return False
        weights = self.seat.policy.policy
        return weights.run_id is not None and weights.version is None

    def take(self, transition: Transition) -> None:
        self.told += transition.observations.get(self.agent, [])
        reward = transition.rewards.get(self.agent, 0.0)
        if self.rewards:
            self.rewards[-1] += reward
        else:
            self.early_reward += reward
        if not self.done:
            self.terminated = transition.terminations.get(self.agent, False)
            self.truncated = transition.truncations.get(self.agent, False)
        self.info = transition.infos.get(self.agent, self.info)

    def cannot_act(self) -> str | None:
        """Why the agent cannot take the turn that it is to take, if so."""
        limits = self.limits
        if len(self.rewards) >= limits.max_turns:
            return f"it has taken all its {limits.max_turns} turns"
        if self.seat is None:
            return None
        if self.conversation is None:
            self.conversation = self.seat.renderer.start(self.told, self.tools)
        elif self.told:
            self.conversation.add_messages(self.told)
        self.told = []
        max_context = limits.max_context or self.seat.renderer.max_context
        wanted = len(self.conversation) + (self.seat.params.max_tokens or 1)
        if max_context is not None and wanted > max_context:
            return f"its context is full: {wanted} tokens with this turn, of {max_context}"
        return None

    async def sample(self) -> SampledSequence | Unavailable | OutOfCapacity:
        """The next turn, or why the policy cannot give one."""
        assert self.seat is not None
        assert self.conversation is not None
        params = _turn_params(self.seat, len(self.rewards))
        try:
            response = await self.seat.policy.sample(self.conversation.prompt, 1, params)
        except (Unavailable, OutOfCapacity) as error:
            return error
        return response.sequences[0]

    def says(self, sequence: SampledSequence) -> str:
        assert self.conversation is not None
        self._turn()
        return self.conversation.add_turn(sequence)

    def said(self, action: str) -> None:
        """A script's turn."""
        self._turn()
        self.told.append({"role": "assistant", "content": action})

    def _turn(self) -> None:
        self.rewards.append(self.early_reward)
        self.early_reward = 0.0

    def trajectory(self, seed: int, seconds: float) -> Trajectory:
        if self.conversation is not None:
            self.conversation.add_messages(self.told, last=True)
        turns = len(self.rewards)
        if self.early_reward:
            self.rewards.append(self.early_reward)
        return Trajectory(
            segments=[] if self.conversation is None else self.conversation.segments(),
            rewards=self.rewards,
            terminated=self.terminated,
            truncated=self.truncated,
            messages=self.told if self.conversation is None else self.conversation.messages,
            info={**self.info, "turns": turns},
            seed=seed,
            seconds=seconds,
        )


def _turn_params(seat: Seat, turn: int) -> SamplingParams:
    digest = hashlib.blake2b(f"{seat.seed} {turn}".encode(), digest_size=6).digest()
    # 48 bits: exact as a JSON number, and taken by every generator.
    return dataclasses.replace(seat.params, seed=int.from_bytes(digest))


async def _together(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All results, in order; the first that fails cancels the others."""
    if len(work) == 1:
        return [await work[0]]
    tasks = [asyncio.create_task(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
