"""The EnvWorker actor: plays episodes, many at once, every environment in its own process."""

from __future__ import annotations

import asyncio

from ..envs.episode import EpisodeSpec, play_episode
from ..envs.isolation import EnvPool
from ..envs.renderer import ChatRenderer
from ..primitives.types import Trajectory


class EnvWorker:
    """Plays episodes for one model, up to `max_concurrent` at once; more wait."""

    def __init__(self, model_path: str, *, max_concurrent: int = 64) -> None:
        self.model_path = model_path
        self.pool = EnvPool(max_concurrent)
        self.renderer: asyncio.Future[ChatRenderer] | None = None

    async def run_episode(self, spec: EpisodeSpec) -> Trajectory:
        """Play one episode to its end.

        Raises:
            EnvironmentFailure: the environment raised, hung, died or used too much memory.
            NotFound, InvalidInput: no such environment, or not with these arguments.
        """
        if self.renderer is None:
            load = asyncio.to_thread(ChatRenderer.from_model, self.model_path)
            self.renderer = asyncio.ensure_future(load)
        return await play_episode(self.pool, await asyncio.shield(self.renderer), spec)

    async def close(self) -> None:
        """Kill every environment."""
        await self.pool.close()
