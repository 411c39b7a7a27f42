"""A campaign: the tenants' scripts once undisturbed, and once among faults, in one service."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..actors.cluster import connect
from .disk import Disk
from .faults import Faults
from .gateway_process import GatewayProcess
from .injector import Done, Injector
from .ledger import Ledger
from .proxy import Proxy
from .runs import OwnRun, Run, TinkerRun
from .schedule import KINDS, draw
from .script import ROUND
from .tenants import Tenant

TENANTS = 4  # of which the latter half comes over HTTP
OPS_PER_FAULT = 4  # those that come when the tenants have ended find nothing
MIN_ROUNDS = 4
SAMPLERS = 2


class Broken(Exception):
    """The campaign failed; the message says of what, and what had come before."""


@dataclass
class Life:
    """The tenants' scripts, done once."""

    ledger: Ledger
    tenants: list[Tenant]
    seconds: float


@dataclass
class Outcome:
    """What a campaign came to. `left_out`: kinds of faults that cannot be brought here."""

    undisturbed: Life
    disturbed: Life
    faults: list[Done]
    dropped: int
    left_out: list[str]


class Campaign:
    """
    Args:
        model: folder of a base model; a tiny one is best.
        home: a folder for the service, of its own.
        say: is told what happens.
        verbose: show what the service's processes say.
    """

    def __init__(
        self,
        model: str,
        home: Path,
        seed: int,
        faults: int,
        say: Callable[[str], None],
        verbose: bool = False,
    ) -> None:
        self.model, self.home, self.seed, self.faults, self.say = model, home, seed, faults, say
        self.verbose = verbose
        ops = faults * OPS_PER_FAULT // TENANTS // (len(ROUND) + 2)  # and a save, and a sample
        self.rounds = max(MIN_ROUNDS, ops)

    async def run(self) -> Outcome:
        """
        Raises:
            Broken: something acknowledged was lost, done twice or came out otherwise, or nothing went
                on any more.
        """
        with Disk(self.home) as disk:
            async with (
                connect(
                    home=self.home,
                    num_cpus=2,
                    learner_threads=1,
                    sampler_threads=1,
                    kv_bytes=1 << 24,
                    samplers=SAMPLERS,
                    verbose=self.verbose,
                ) as service,
                GatewayProcess(service.home, self.verbose) as gateway,
                Proxy(gateway.port) as proxy,
            ):
                self.service, self.proxy = service, proxy
                self.episodes = await service.create_env_client(self.model)
                self.say(f"{TENANTS} tenants, {self.rounds} rounds each: first undisturbed")
                undisturbed = await self._live(None, None)
                self.say(
                    f"{len(undisturbed.ledger.results)} operations in {undisturbed.seconds:.0f} s; "
                    f"now with {self.faults} faults"
                )
                kinds = tuple(k for k in KINDS if disk.there or k.action != "fill")
                count = len(undisturbed.ledger.results)
                schedule = draw(self.seed, self.faults, count // 20, count * 4 // 5, kinds)
                ledger = Ledger(undisturbed.ledger.results)
                faults = Faults(proxy, disk)
                injector = Injector(schedule, faults, ledger, self._brought)
                disturbed = await self._live(ledger, injector)
                await faults.over()
                left_out = [f"{k.action} {k.target}" for k in KINDS if k not in kinds]
                return Outcome(undisturbed, disturbed, injector.done, proxy.dropped, left_out)

    def _brought(self, done: Done) -> None:
        if done.fault.number % 10 == 0 or self.faults < 50:
            self.say(str(done.fault))

    async def _live(self, ledger: Ledger | None, injector: Injector | None) -> Life:
        ledger = ledger or Ledger(None)
        tenants = await asyncio.gather(*(self._tenant(n, ledger) for n in range(TENANTS)))
        await asyncio.gather(*(tenant.begin() for tenant in tenants))
        began = time.monotonic()
        ready = _at_once if injector is None else injector.caught_up
        work = [asyncio.create_task(tenant.work(ready)) for tenant in tenants]
        watch = []
        if injector is not None:
            work.append(asyncio.create_task(injector.bring()))
            watch.append(asyncio.create_task(injector.measure()))
        try:
            await self._all(work, watch)
        except Exception as error:
            raise Broken(self._told(error, injector)) from error
        finally:
            for task in (*work, *watch):
                task.cancel()
            await asyncio.gather(*work, *watch, return_exceptions=True)
            if injector is not None:
                await injector.faults.over()
        seconds = time.monotonic() - began
        await asyncio.gather(*(tenant.run.close(self.service) for tenant in tenants))
        return Life(ledger, list(tenants), seconds)

    async def _all(self, work: list[asyncio.Task[None]], watch: list[asyncio.Task[None]]) -> None:
        """Until all `work` is done, or anything fails."""
        left = set(work)
        while left:
            done, _ = await asyncio.wait({*left, *watch}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                await task
            left -= done

    async def _tenant(self, number: int, ledger: Ledger) -> Tenant:
        rank = 2 << number
        run: Run
        if number < TENANTS // 2:
            run = await OwnRun.open(self.service, self.model, rank, live=number % 2 == 1)
        else:
            run = await TinkerRun.open(f"http://127.0.0.1:{self.proxy.port}", self.model, rank)
        return Tenant(
            number,
            self.seed,
            self.rounds,
            run,
            str(self.home),
            ledger,
            self.episodes if number == 0 else None,
        )

    def _told(self, error: Exception, injector: Injector | None) -> str:
        told = f"seed {self.seed}: {type(error).__name__}: {error}"
        if injector is None:
            return f"{told}, undisturbed"
        before = [str(done.fault) for done in injector.done[-5:]]
        return "; ".join([told, "the last faults before: " + (", ".join(before) or "none")])


async def _at_once() -> None:
    pass
