"""Evaluation: a fixed set of held-out episodes, and how sure one can be of the rate.

`evaluate` plays every episode once; `evaluate_tasks` plays n samples of every task, for pass@k and
maj@k. Any environment will do.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Hashable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from ..envs.episode import EpisodeSpec
from ..primitives.errors import EnvironmentFailure, InvalidInput, RolloutFailure, Unavailable
from ..primitives.types import Trajectory
from .estimates import Estimate, maj_at_k, mean_interval, pass_at_k, rate_interval


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

    def reward_interval(self) -> Estimate:
        """The mean reward of the episodes that were played to their end, with its interval."""
        return mean_interval([t.reward for t in self.trajectories])


class Player(Protocol):
    """What plays episodes: an `EnvClient`, for one."""

    def run_episode(self, spec: EpisodeSpec) -> Awaitable[Trajectory]: ...


async def evaluate(
    env_client: Player,
    specs: Sequence[EpisodeSpec],
    on_episode: Callable[[Trajectory], None] | None = None,
    *,
    max_concurrent: int | None = None,
) -> EvalResult:
    """Play every episode once, all at the same time or `max_concurrent` of them. One that the
    environment breaks counts as no success.

    Raises:
        RolloutFailure: every episode failed.
    """
    outcomes = await _play_all(env_client, specs, on_episode, max_concurrent)
    trajectories = [o for o in outcomes if isinstance(o, Trajectory)]
    successes = sum(map(is_success, trajectories))
    rate = rate_interval(successes, len(specs))
    return EvalResult(
        successes,
        len(specs),
        rate.value,
        rate.low,
        rate.high,
        sum(t.reward for t in trajectories) / len(trajectories),
        trajectories,
        [o for o in outcomes if isinstance(o, str)],
    )


@dataclass(frozen=True, eq=False)
class TaskResults:
    """n samples of each of P tasks: `outcomes[p][i]` is a trajectory, or why the environment could
    not play it, which counts as no success. Intervals are over tasks (bootstrap, 95%): samples of
    one task are not independent of one another."""

    samples: int
    outcomes: list[list[Trajectory | str]]

    @property
    def successes(self) -> np.ndarray:
        """Of each task's samples, int64 `[P]`."""
        return np.array([sum(map(_succeeded, task)) for task in self.outcomes], np.int64)

    def pass_at(self, k: int) -> Estimate:
        """pass@k: the chance that one of k samples succeeds, mean over tasks.

        Raises:
            InvalidInput: k is not from 1 to the number of samples.
        """
        return mean_interval([pass_at_k(int(c), self.samples, k) for c in self.successes])

    def majority_at(
        self, k: int, answer: Callable[[Trajectory], Hashable] | None = None
    ) -> Estimate:
        """maj@k: the chance that the answer most frequent among k samples succeeds, mean over
        tasks. `answer` says what a trajectory answered (default: its last message, stripped); equal
        answers of one task must succeed alike. An episode that failed is an answer of its own.

        Raises:
            InvalidInput: k is not from 1 to the number of samples, or equal answers that succeed
                once and once not.
        """
        return mean_interval([_majority(task, k, answer or last_words) for task in self.outcomes])

    def to_json(self) -> dict[str, Any]:
        ks = [k for k in (1, 2, 4, 8, 16, 32, 64, 128) if k <= self.samples]
        estimates = {f"pass@{k}": self.pass_at(k) for k in ks}
        return {
            "tasks": len(self.outcomes),
            "samples": self.samples,
            "failed": sum(isinstance(o, str) for task in self.outcomes for o in task),
            **{name: [e.value, e.low, e.high] for name, e in estimates.items()},
        }


async def evaluate_tasks(
    env_client: Player,
    specs: Sequence[EpisodeSpec],
    samples: int,
    on_episode: Callable[[Trajectory], None] | None = None,
    *,
    max_concurrent: int | None = None,
) -> TaskResults:
    """Play `samples` episodes of every task (`repeated`).

    Raises:
        InvalidInput: fewer than one sample, or no task.
        RolloutFailure: every episode failed.
    """
    if samples < 1 or not specs:
        raise InvalidInput("evaluate_tasks needs at least one task and one sample of each")
    every = [episode for spec in specs for episode in repeated(spec, samples)]
    outcomes = await _play_all(env_client, every, on_episode, max_concurrent)
    return TaskResults(
        samples, [outcomes[i : i + samples] for i in range(0, len(outcomes), samples)]
    )


def repeated(spec: EpisodeSpec, samples: int) -> list[EpisodeSpec]:
    """The same task, sampled with `samples` different seeds, derived from the spec's own; the first
    of them do not depend on how many there are."""
    params = spec.sampling_params
    seed = spec.seed if params.seed is None else params.seed
    seeds = np.random.SeedSequence(seed).generate_state(samples)
    return [replace(spec, sampling_params=replace(params, seed=int(s))) for s in seeds]


def last_words(trajectory: Trajectory) -> str:
    """What the policy said last."""
    said = [m["content"] for m in trajectory.messages if m["role"] == "assistant"]
    return str(said[-1]).strip() if said else ""


def _succeeded(outcome: Trajectory | str) -> bool:
    return isinstance(outcome, Trajectory) and is_success(outcome)


def _majority(
    task: list[Trajectory | str], k: int, answer: Callable[[Trajectory], Hashable]
) -> float:
    counts: Counter[Hashable] = Counter()
    correct: dict[Hashable, bool] = {}
    for index, outcome in enumerate(task):
        # A failed episode agrees with no other.
        said = (True, answer(outcome)) if isinstance(outcome, Trajectory) else (False, index)
        counts[said] += 1
        if correct.setdefault(said, _succeeded(outcome)) != _succeeded(outcome):
            raise InvalidInput(f"maj@k: the answer {said[1]!r} both succeeds and does not")
    return maj_at_k(list(counts.values()), [correct[said] for said in counts], k)


async def _play_all(
    env_client: Player,
    specs: Sequence[EpisodeSpec],
    on_episode: Callable[[Trajectory], None] | None,
    max_concurrent: int | None,
) -> list[Trajectory | str]:
    """Per episode its trajectory, or why there is none."""
    turn: AbstractAsyncContextManager[Any] = (
        nullcontext() if max_concurrent is None else asyncio.Semaphore(max_concurrent)
    )

    async def play(spec: EpisodeSpec) -> Trajectory | str:
        try:
            async with turn:
                trajectory = await env_client.run_episode(spec)
        except (EnvironmentFailure, Unavailable) as error:
            return str(error)
        if on_episode is not None:
            on_episode(trajectory)
        return trajectory

    outcomes = await asyncio.gather(*(play(spec) for spec in specs))
    failures = [o for o in outcomes if isinstance(o, str)]
    if failures and len(failures) == len(specs):
        raise RolloutFailure(f"all {len(specs)} evaluation episodes failed; one:\n{failures[0]}")
    return outcomes
