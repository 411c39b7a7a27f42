"""Tenants that train and sample whatever happens, and check what they are told."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np

from ..envs.episode import EpisodeSpec
from ..primitives.client import EnvClient, SamplingClient
from ..primitives.errors import EnvironmentFailure, Unavailable
from ..primitives.types import SamplingParams
from .ledger import Ledger, Mismatch, Result
from .runs import Refused, Run, folder, insist, manifest
from .script import sampling_seed, steps

PAUSE_SECONDS = 0.1
EPISODE_SECONDS = 300.0  # in which one has to come to its end, however often its processes die


class Tenant:
    """Number `number` of a campaign, with a run of its own.

    When an operation of a round is refused for want of a disk, or lost with the server, others behind
    it may have been done, so that it goes back to the state saved last and does the round again, as
    a user would.

    Args:
        episodes: where it plays them; None: it plays none.

    Attributes:
        refused: operations that were, and rounds or samples done again for it.
        lost_episodes: those that died with a process.
        version: of the run, by what was acknowledged.
    """

    def __init__(
        self,
        number: int,
        seed: int,
        rounds: int,
        run: Run,
        home: str,
        ledger: Ledger,
        episodes: EnvClient | None,
    ) -> None:
        self.number, self.seed, self.rounds = number, seed, rounds
        self.run, self.home, self.ledger = run, home, ledger
        self.episodes = episodes
        self.saved = ""
        self.version = 0
        self.refused = 0
        self.lost_episodes = 0

    async def begin(self) -> None:
        self.saved = await self.run.save("begin")

    async def work(self, ready: Callable[[], Awaitable[None]]) -> None:
        """All rounds; before each it waits until `ready()`.

        Raises:
            Mismatch: something acknowledged was not what it has to be.
        """
        for number in range(self.rounds):
            await ready()
            attempt = 0
            while not await self._train(number, attempt):
                attempt += 1
                await asyncio.sleep(PAUSE_SECONDS)
                await self._go_back()
            await self._sample(number)

    async def _train(self, number: int, attempt: int) -> bool:
        """All of a round under way at once; whether all of it was done."""
        script = steps(self.seed, self.number, number)
        under_way = [asyncio.ensure_future(self.run.submit(step)) for step in script]
        saving = asyncio.ensure_future(self.run.save(f"round-{number}-{attempt}"))
        whole = True
        for index, (step, task) in enumerate(zip(script, under_way, strict=True)):
            try:
                result = await task
            except Refused:
                self.refused, whole = self.refused + 1, False
                continue
            self.version += step.kind == "optim_step"
            if whole:  # what comes after something refused rests on something else
                await self.ledger.acknowledge((self.number, number, f"{index} {step.kind}"), result)
        try:
            path = await saving
        except Refused:
            self.refused += 1
            return False
        self._check_version(number, path)
        if whole:
            self.saved = path
            await self.ledger.acknowledge((self.number, number, "save"), self._state(path))
        return whole

    async def _go_back(self) -> None:
        """To the state saved last."""
        _, refused = await insist(self.run.load, self.saved)
        self.version += 1
        self.refused += refused

    def _check_version(self, number: int, path: str) -> None:
        """Every step and every load counts once."""
        version = manifest(self.home, path)["version"]
        if version != self.version:
            raise Mismatch(
                f"tenant {self.number}, round {number}: {self.version} steps and loads were "
                f"acknowledged, {version} were done"
            )

    def _state(self, path: str) -> Result:
        """Adapter and optimizer, to the byte."""
        files = {file.name: file for file in Path(folder(self.home, path)).iterdir()}
        files.pop("manifest.json")  # it has the version and the time
        return {
            name: np.frombuffer(file.read_bytes(), np.uint8) for name, file in sorted(files.items())
        }

    async def _sample(self, number: int) -> None:
        sampler, refused = await insist(self.run.publish)
        seed = sampling_seed(self.seed, self.number, number)
        result, again = await insist(self.run.sample, sampler, seed)
        self.refused += refused + again
        await self.ledger.acknowledge((self.number, number, "sample"), result)
        if self.episodes is not None:
            await self._play(number, sampler, seed)

    async def _play(self, number: int, policy: SamplingClient, seed: int) -> None:
        assert self.episodes is not None
        spec = EpisodeSpec(
            "calculator",
            policy,
            SamplingParams(max_tokens=8, seed=seed),
            seed,
            {"terms": 2, "examples": 0},
        )
        async with asyncio.timeout(EPISODE_SECONDS):
            while True:
                try:
                    trajectory = await self.episodes.run_episode(spec)
                    break
                except (EnvironmentFailure, Unavailable):
                    self.lost_episodes += 1
                    await asyncio.sleep(PAUSE_SECONDS)
        played = {f"turn {i}": np.asarray(t.tokens) for i, t in enumerate(trajectory.segments)}
        await self.ledger.acknowledge((self.number, number, "episode"), played)
