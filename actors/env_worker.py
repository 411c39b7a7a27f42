"""The EnvWorker actor: plays episodes and matches, many at once, every environment in its own
process."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from ..envs.episode import EpisodeSpec, play_episode
from ..envs.isolation import EnvPool
from ..envs.match import MatchSpec, play_match
from ..envs.renderer import ChatRenderer
from ..primitives.client import SamplingClient
from ..primitives.errors import OpCancelled
from ..primitives.types import Match, Trajectory
from .episode_watch import EpisodeWatch
from .observed import Observed

T = TypeVar("T")


class EnvWorker(Observed):
    """Plays up to `max_concurrent` episodes at once; more wait. `model_path` is the model of
    policies that do not know their own."""

    def __init__(self, model_path: str, *, max_concurrent: int = 64) -> None:
        self.observe("environment worker")
        self.watch = EpisodeWatch(self.meters)
        self.model_path = model_path
        self.pool = EnvPool(max_concurrent)
        self.renderers: dict[str, asyncio.Future[ChatRenderer]] = {}
        self.playing: dict[str, asyncio.Task[Any]] = {}

    async def run_episode(self, name: str, spec: EpisodeSpec) -> Trajectory:
        """Play one episode to its end; `withdraw(name)` ends it before.

        Raises:
            EnvironmentFailure: the environment raised, hung, died or used too much memory.
            NotFound, InvalidInput: no such environment, or not with these arguments.
            OpCancelled: it was withdrawn.
        """

        async def play() -> Trajectory:
            return await play_episode(self.pool, await self._renderer(spec.policy), spec)

        return await self._until_withdrawn(name, spec.env, play())

    async def play_match(self, name: str, spec: MatchSpec) -> Match:
        """As `run_episode`, for a match."""

        async def play() -> Match:
            renderers = {a: await self._renderer(policy) for a, policy in spec.samplers.items()}
            return await play_match(self.pool, renderers.__getitem__, spec)

        return await self._until_withdrawn(name, spec.env, play())

    async def _until_withdrawn(self, name: str, env: str, work: Coroutine[Any, Any, T]) -> T:
        task = self.playing[name] = asyncio.create_task(work)
        with self.watch.episode(env):
            try:
                return await task
            except asyncio.CancelledError:
                raise OpCancelled(f"an episode of {env!r} was withdrawn") from None
            finally:
                del self.playing[name]

    async def _renderer(self, policy: SamplingClient) -> ChatRenderer:
        path = policy.model_path if isinstance(policy, SamplingClient) else self.model_path
        if path not in self.renderers:
            load = asyncio.to_thread(ChatRenderer.from_model, path)
            self.renderers[path] = asyncio.ensure_future(load)
        return await asyncio.shield(self.renderers[path])

    async def withdraw(self, name: str) -> bool:
        """End an episode and its environment's process; whether it was under way."""
        task = self.playing.get(name)
        return task is not None and task.cancel()
