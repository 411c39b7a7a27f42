"""One episode: a policy and an environment taking turns, recorded as a trajectory."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..primitives.client import SamplingClient
from ..primitives.errors import EnvironmentFailure, InvalidInput
from ..primitives.sync import SyncClient
from ..primitives.types import SamplingParams, Trajectory
from .fork_server import EnvSource
from .isolation import EnvPool, EnvProcess
from .registry import pickled_factory
from .renderer import ChatRenderer, Conversation


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
    """Play one episode to its end.

    The trajectory's `info` is the environment's last one with `turns` added.

    Raises:
        EnvironmentFailure: the environment raised, hung, died or used too much memory, or the
            episode took too long.
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
                step_seconds=limits.step_seconds,
                memory_bytes=limits.memory_bytes,
            ) as env,
        ):
            return await _play(env, renderer, spec, progress)
    except TimeoutError:
        raise EnvironmentFailure(
            f"environment {spec.env!r}: the episode was not over within "
            f"{limits.episode_seconds:g} s; it was {progress.doing}"
        ) from None


@dataclass
class _Progress:
    doing: str = "waiting for its environment's process"


async def _play(
    env: EnvProcess, renderer: ChatRenderer, spec: EpisodeSpec, progress: _Progress
) -> Trajectory:
    started = time.monotonic()
    options = None if spec.options is None else dict(spec.options)
    messages, info = await env.reset(spec.seed, options)
    conversation = renderer.start(messages, env.tool_schemas)
    rewards: list[float] = []
    terminated = truncated = False
    max_context = spec.limits.max_context or renderer.max_context
    while not (terminated or truncated):
        if not _fits(conversation, spec.sampling_params, max_context):
            truncated = True
            break
        turn = len(rewards)
        progress.doing = f"waiting for the policy in turn {turn + 1}"
        response = await spec.policy.sample(conversation.prompt, 1, _turn_params(spec, turn))
        action = conversation.add_turn(response.sequences[0])
        progress.doing = f"waiting for the environment in turn {turn + 1}"
        step = await env.step(action)
        rewards.append(step.reward)
        info, terminated = step.info, step.terminated
        truncated = step.truncated or (not terminated and len(rewards) == spec.limits.max_turns)
        conversation.add_messages(step.messages, last=terminated or truncated)
    return Trajectory(
        segments=conversation.segments(),
        rewards=rewards,
        terminated=terminated,
        truncated=truncated,
        messages=conversation.messages,
        info={**info, "turns": len(rewards)},
        seed=spec.seed,
        seconds=time.monotonic() - started,
    )


def _fits(conversation: Conversation, params: SamplingParams, max_context: int | None) -> bool:
    return max_context is None or len(conversation) + (params.max_tokens or 1) <= max_context


def _turn_params(spec: EpisodeSpec, turn: int) -> SamplingParams:
    seed = spec.seed if spec.sampling_params.seed is None else spec.sampling_params.seed
    digest = hashlib.blake2b(f"{seed} {turn}".encode(), digest_size=6).digest()
    # 48 bits: exact as a JSON number, and taken by every generator.
    return dataclasses.replace(spec.sampling_params, seed=int.from_bytes(digest))
