"""One episode: a policy and an environment taking turns, recorded as a trajectory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..primitives.client import SamplingClient
from ..primitives.errors import InvalidInput
from ..primitives.sync import SyncClient
from ..primitives.types import SamplingParams, Trajectory
from .fork_server import EnvSource
from .isolation import EnvPool
from .playing import Seat, play
from .registry import pickled_factory
from .renderer import ChatRenderer


@dataclass(frozen=True)
class EpisodeLimits:
    """What an episode may take. Tokens per turn are the sampling parameters' `max_tokens`.

    After `max_turns` turns, or before a turn that would go beyond `max_context` tokens (None: the
    model's own), the episode is truncated. Beyond `step_seconds` for making the environment, a
    reset or a step, `episode_seconds` for all of it, or `memory_bytes` for the environment's
    process (None: unlimited) it fails.
    """

    max_turns: int = 16
    step_seconds: float = 30.0
    episode_seconds: float = 300.0
    memory_bytes: int | None = 2 << 30
    max_context: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_turns", "step_seconds", "episode_seconds", "memory_bytes", "max_context"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InvalidInput(f"EpisodeLimits.{name} must be above 0, got {value!r}")


@dataclass(frozen=True)
class EpisodeSpec:
    """All that a worker needs to play one episode.

    `seed` and `options` go to the environment's `reset`. Turn t samples with a seed derived from
    `sampling_params.seed` (or else `seed`) and t, so that an episode is repeatable: the members
    of a group share `seed` and differ in `sampling_params.seed`.
    """

    env: str
    policy: SamplingClient
    sampling_params: SamplingParams = field(default_factory=SamplingParams)
    seed: int = 0
    env_kwargs: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] | None = None
    limits: EpisodeLimits = field(default_factory=EpisodeLimits)
    source: EnvSource = field(init=False)

    def __post_init__(self) -> None:
        if isinstance(self.policy, SyncClient):
            object.__setattr__(self, "policy", self.policy.client)
        # The factory of an environment registered in this process goes along, so that workers
        # need not know it.
        object.__setattr__(self, "source", EnvSource(self.env, pickled_factory(self.env)))


async def play_episode(pool: EnvPool, renderer: ChatRenderer, spec: EpisodeSpec) -> Trajectory:
    """Play one episode of an environment with one agent to its end.

    The trajectory's `info` is the environment's last one with `turns` added.

    Raises:
        EnvironmentFailure: the environment raised, hung, died or used too much memory, or the
            episode took too long.
        NotFound, InvalidInput: no such environment, or not with these arguments, or it has
            several agents.
    """

    def seats(agents: Sequence[str]) -> dict[str, Seat]:
        if len(agents) > 1:
            raise InvalidInput(
                f"environment {spec.env!r} is a game of the agents {', '.join(agents)}: play it "
                "with a MatchSpec, and bind each of them to a policy"
            )
        params = spec.sampling_params
        seed = str(spec.seed if params.seed is None else params.seed)
        return {agents[0]: Seat(spec.policy, renderer, params, seed)}

    match = await play(pool, spec, seats)
    (trajectory,) = match.trajectories.values()
    return trajectory
