"""The EnvWorker actor: plays episodes, many at once, every environment in its own process."""

from __future__ import annotations

import asyncio

from ..envs.episode import EpisodeSpec, play_episode
from ..envs.isolation import EnvPool
from ..envs.renderer import ChatRenderer
from ..primitives.errors import OpCancelled
from ..primitives.types import Trajectory


class EnvWorker:
    """Plays episodes for one model, up to `max_concurrent` at once; more wait."""

    def __init__(self, model_path: str, *, max_concurrent: int = 64) -> None:
        self.model_path = model_path
        self.pool = EnvPool(max_concurrent)
        self.renderer: asyncio.Future[ChatRenderer] | None = None
        self.playing: dict[str, asyncio.Task[Trajectory]] = {}

    async def run_episode(self, name: str, spec: EpisodeSpec) -> Trajectory:
        """Play one episode to its end; `withdraw(name)` ends it before.

        Raises:
            EnvironmentFailure: the environment raised, hung, died or used too much memory.
            NotFound, InvalidInput: no such environment, or not with these arguments.
            OpCancelled: it was withdrawn.
        """
        task = self.playing[name] = asyncio.create_task(self._play(spec))
        try:
            return await task
        except asyncio.CancelledError:
            raise OpCancelled(f"an episode of {spec.env!r} was withdrawn") from None
        finally:
            del self.playing[name]

    async def _play(self, spec: EpisodeSpec) -> Trajectory:
        if self.renderer is None:
            load = asyncio.to_thread(ChatRenderer.from_model, self.model_path)
            self.renderer = asyncio.ensure_future(load)
        return await play_episode(self.pool, await asyncio.shield(self.renderer), spec)

    async def withdraw(self, name: str) -> bool:
        """End an episode and its environment's process; whether it was under way."""
        task = self.playing.get(name)
        return task is not None and task.cancel()
