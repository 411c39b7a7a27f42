"""Evaluation: a fixed set of held-out episodes, and how sure one can be of the rate."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from scipy.stats import binomtest

from ..envs.episode import EpisodeSpec
from ..primitives.errors import EnvironmentFailure, RolloutFailure, Unavailable
from ..primitives.types import Trajectory


def is_success(trajectory: Trajectory) -> bool:
    """`info["success"]` where the environment says so, else a positive return."""
    return bool(trajectory.info.get("success", trajectory.reward > 0))


@dataclass(frozen=True, eq=False)
class EvalResult:
    """`low` and `high` bound the success rate with 95% confidence (Wilson's score interval)."""

    successes: int
    episodes: int
    rate: float
    low: float
    high: float
    mean_reward: float
    trajectories: Sequence[Trajectory]
    failures: Sequence[str]

    def to_json(self) -> dict[str, float]:
        names = ("successes", "episodes", "rate", "low", "high", "mean_reward")
        return {name: getattr(self, name) for name in names} | {"failed": len(self.failures)}


class Player(Protocol):
    """What plays episodes: an `EnvClient`, for one."""

    def run_episode(self, spec: EpisodeSpec) -> Awaitable[Trajectory]: ...


async def evaluate(
    env_client: Player,
    specs: Sequence[EpisodeSpec],
    on_episode: Callable[[Trajectory], None] | None = None,
) -> EvalResult:
    """Play every episode once. One that the environment breaks counts as no success.

    Raises:
        RolloutFailure: every episode failed.
    """

    async def play(spec: EpisodeSpec) -> Trajectory | str:
        try:
            trajectory = await env_client.run_episode(spec)
        except (EnvironmentFailure, Unavailable) as error:
            return str(error)
        if on_episode is not None:
            on_episode(trajectory)
        return trajectory

    outcomes = await asyncio.gather(*(play(spec) for spec in specs))
    trajectories = [o for o in outcomes if isinstance(o, Trajectory)]
    failures = [o for o in outcomes if isinstance(o, str)]
    if not trajectories:
        raise RolloutFailure(f"all {len(specs)} evaluation episodes failed; one:\n{failures[0]}")
    successes = sum(map(is_success, trajectories))
    interval = binomtest(successes, len(specs)).proportion_ci(method="wilson")
    return EvalResult(
        successes,
        len(specs),
        successes / len(specs),
        float(interval.low),
        float(interval.high),
        sum(t.reward for t in trajectories) / len(trajectories),
        trajectories,
        failures,
    )
