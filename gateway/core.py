"""The gateway behind its routes: sessions and what belongs to them, and the way to the cluster.

A session is one client process. Its runs and samplers live until it finishes or its heartbeat
lapses; checkpoints and results outlive it. Everything belongs to an owner, and for everybody else
does not exist.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from filelock import FileLock, Timeout

from ..primitives import logs, tracing
from ..primitives.arguments import check_text
from ..primitives.client import ServiceClient
from ..primitives.errors import (
    Busy,
    InvalidInput,
    NotFound,
    OutOfCapacity,
    TinsmithError,
    Unavailable,
)
from ..primitives.learner_link import Answered, LearnerLink, RunGrant
from ..primitives.op import Op
from ..primitives.paths import CheckpointPath
from ..primitives.sampler_link import SamplerLink
from ..primitives.types import (
    Checkpoint,
    LoraConfig,
    PolicyRef,
    SampleRequest,
    SampleResponse,
    TrainingRun,
)
from . import answers
from .access import Access
from .completions import Completions
from .futures import Answer, Futures
from .quotas import Quota, TokenRates
from .requests import MAX_SEQ_ID
from .served_models import ServedModels
from .settings import Settings
from .store import Result, RunRow, SamplerRow, SessionRow, Store

log = logging.getLogger("tinsmith.gateway")

SEQUENCES_KEPT_S = 86400.0


@dataclass(eq=False)
class Session:
    """A client process. `last_seen` is `time.monotonic()` of its last sign of life."""

    session_id: str
    owner: str
    active: bool
    last_seen: float
    runs: dict[str, Run] = field(default_factory=dict)
    samplers: dict[str, Sampler] = field(default_factory=dict)
    samples: set[str] = field(default_factory=set)

    def seen(self) -> None:
        self.last_seen = time.monotonic()


@dataclass(eq=False)
class Run:
    """A training run: `grant` is None where it is not in a learner's memory any more.
    `pending` holds the bytes of the operations under way, by number; all up to `arrived` have come,
    and those in `early` before their turn; those in `failed` have failed."""

    row: RunRow
    grant: asyncio.Future[RunGrant] | None
    pending: dict[int, int] = field(default_factory=dict)
    arrived: int = 0
    early: set[int] = field(default_factory=set)
    failed: set[int] = field(default_factory=set)

    def arrive(self, seq_id: int) -> None:
        if seq_id > self.arrived:
            self.early.add(seq_id)
        while self.arrived + 1 in self.early:
            self.arrived += 1
            self.early.discard(self.arrived)

    @property
    def answered(self) -> Answered:
        """Which answers are there."""
        before = min([self.arrived + 1, *self.pending])
        self.failed = {seq_id for seq_id in self.failed if seq_id >= before}
        return Answered(before, sorted(self.failed))

    @property
    def moving(self) -> bool:
        """Whether something under way will be done without more to come."""
        return any(seq_id <= self.arrived for seq_id in self.pending)


@dataclass(eq=False)
class Sampler:
    row: SamplerRow
    link: asyncio.Future[SamplerLink] | None = None


class Gateway:
    def __init__(
        self, service: ServiceClient, settings: Settings, access: Access, store: Store
    ) -> None:
        self.service, self.settings, self.access, self.store = service, settings, access, store
        self.controller = service.controller
        self.models = ServedModels(service, settings, only_listed=access.closed)
        self.completions = Completions(settings.batch_polls)
        self.futures = Futures(store, self._settled)
        self.rates = TokenRates(access.quota)
        self.draining = False
        self._sessions: dict[str, Session] = {}
        self._used: dict[str, float] = {}
        self._in_use: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._pending_bytes = 0
        self._opening: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    # ---- sessions ----

    async def create_session(
        self, owner: str, display_name: str | None, user_metadata: dict[str, Any]
    ) -> str:
        """
        Raises:
            Busy: the owner has too many sessions.
        """
        self._refuse_while_draining()
        active = sum(s.active for s in self._sessions.values() if s.owner == owner)
        if active >= self.settings.max_sessions:
            raise Busy(
                f"{active} sessions are active: finish some, or wait until those without "
                "heartbeats lapse",
                self.settings.session_timeout_s / 4,
            )
        row = SessionRow(
            str(uuid.uuid4()),
            owner,
            time.time(),
            display_name=display_name,
            user_metadata=user_metadata,
        )
        await self.store.add_session(row)
        self._sessions[row.session_id] = Session(row.session_id, owner, True, time.monotonic())
        return row.session_id

    async def session(self, owner: str, session_id: str) -> Session:
        """
        Raises:
            NotFound: the owner has no such session.
        """
        session = self._sessions.get(session_id)
        if session is None:
            row = await self.store.session(session_id)
            if row is None:
                raise NotFound(f"no session {session_id!r}")
            session = Session(session_id, row.owner, row.status == "active", time.monotonic())
            if session.active:  # of before a restart: its client is back
                session = self._sessions.setdefault(session_id, session)
        if session.owner != owner:
            raise NotFound(f"no session {session_id!r}")
        return session

    async def active_session(self, owner: str, session_id: str) -> Session:
        """
        Raises:
            InvalidInput: it finished, or its heartbeat lapsed.
        """
        session = await self.session(owner, session_id)
        if not session.active:
            raise InvalidInput(
                f"session {session_id} is over: it finished, or sent no heartbeat for "
                f"{self.settings.session_timeout_s:g} s; make a new ServiceClient"
            )
        session.seen()
        return session

    async def end_session(self, session: Session, status: str, detail: str | None = None) -> None:
        """Let go what the session holds, after what it asked for is done (if it finished) or at
        once (if its client is gone)."""
        if not session.active:
            return
        session.active = False
        await self.store.end_session(session.session_id, status, detail)
        if status == "expired":
            for request_id in list(session.samples):
                self.futures.cancel(request_id, session.owner)
        self._spawn(self._release(session))

    async def _release(self, session: Session) -> None:
        waiting = [self.futures.settled(name) for name in session.samples]
        waiting += [
            self.futures.settled(operation_id(run.row.run_id, seq_id))
            for run in session.runs.values()
            for seq_id in run.pending
        ]
        if waiting:
            await asyncio.wait(waiting, timeout=self.settings.session_timeout_s)
        for run in session.runs.values():
            run.grant = None
        for row in await self.store.runs(session.owner, session.session_id):
            with contextlib.suppress(TinsmithError):
                await Op(self.controller.call("close_run", row.run_id))
        paths = {s.row.model_path: s for s in session.samplers.values() if s.row.model_path}
        for path, sampler in paths.items():
            shared = any(
                other.row.model_path == path
                for rest in self._sessions.values()
                if rest.active
                for other in rest.samplers.values()
            )
            if sampler.link is not None and not shared:
                with contextlib.suppress(TinsmithError):
                    await Op((await sampler.link).grant.sampler.call("drop_run", path))
        for sampler_id in session.samplers:
            self.completions.forget(sampler_id)
        self._sessions.pop(session.session_id, None)

    # ---- runs ----

    async def create_run(
        self,
        session: Session,
        model_seq_id: int,
        base_model: str | None,
        lora: LoraConfig | None,
        path: str | None,
        optimizer: bool,
        user_metadata: dict[str, Any],
    ) -> str:
        """Begin a run, new or from the checkpoint `path`; returns the request's id."""
        self._refuse_while_draining()
        run_id = f"{session.session_id}:train:{model_seq_id}"
        request_id = f"{run_id}:create"

        async def create() -> Answer:
            nonlocal base_model, lora
            if path is not None:
                checkpoint = await self.checkpoint(session.owner, path)
                base_model = base_model or await self.base_model(checkpoint.run_id)
            assert base_model is not None
            row = RunRow(run_id, session.session_id, session.owner, base_model)
            known_as = await self.models.resolve(base_model)
            run = Run(row, None)
            with self._using(known_as):
                async with self._within_quota(session.owner, run_id):
                    call = self.controller.call(
                        "create_run",
                        run_id,
                        known_as,
                        lora,
                        path,
                        optimizer,
                        user_metadata,
                        uuid.uuid4().hex,
                    )
                    run.grant = asyncio.wrap_future(call)
                    await asyncio.shield(run.grant)
            await self.store.add_run(row)
            if not session.active:  # ended meanwhile, and does not know of it
                await Op(self.controller.call("close_run", run_id))
                raise NotFound(f"session {session.session_id} ended before its run was there")
            session.runs[run_id] = run
            answer = {"model_id": run_id}
            if path is None:
                return Answer.json({"type": "create_model", **answer})
            return Answer.json({"type": "load_weights", "path": path, **answer})

        await self.futures.begin(request_id, session.owner, create)
        return request_id

    @contextlib.asynccontextmanager
    async def _within_quota(self, owner: str, run_id: str) -> AsyncIterator[None]:
        """Around the opening of a run, which is deleted again if it is larger than the owner's quota
        allows: its size is known when it is there.

        Raises:
            OutOfCapacity: there can be no such run beside the others.
        """
        quota = self.access.quota(owner)
        if quota.runs is None and quota.resident_bytes is None:
            yield
            return
        async with self._opening[owner]:
            quota.check_runs(len(await self._held_bytes(owner)))
            yield
            held = await self._held_bytes(owner, run_id)
            new = held.pop(run_id, 0)
            try:
                quota.check_bytes(new, sum(held.values()))
            except OutOfCapacity:
                await Op(self.controller.call("delete_run", run_id))
                raise

    async def _held_bytes(self, owner: str, new: str | None = None) -> dict[str, int]:
        """Of the owner's open runs, and of a new one that is not written down yet."""
        own = {row.run_id for row in await self.store.runs(owner)} | {new}
        held = await Op(self.controller.call("held_bytes"))
        return {run_id: size for run_id, size in held.items() if run_id in own}

    async def usage(self, owner: str) -> tuple[Quota, dict[str, float | None]]:
        """What the owner may use, and uses: runs and bytes, and the tokens that may still be used
        now."""
        held = await self._held_bytes(owner)
        used: dict[str, float | None] = {
            "runs": len(held),
            "resident_bytes": sum(held.values()),
            "tokens_left": self.rates.left(owner),
        }
        return self.access.quota(owner), used

    async def run(self, owner: str, run_id: str) -> Run:
        """
        Raises:
            NotFound: the owner has no such run.
        """
        session = self._sessions.get(run_id.partition(":")[0])
        if session is not None and session.owner == owner and run_id in session.runs:
            session.seen()
            return session.runs[run_id]
        row = await self.store.run(run_id)
        if row is None or row.owner != owner:
            raise NotFound(f"no training run {run_id!r}")
        session = await self.session(owner, row.session_id)
        return session.runs.setdefault(run_id, Run(row, None))

    async def training_run(self, run_id: str) -> TrainingRun:
        """
        Raises:
            NotFound: no such run.
        """
        return await self.service.get_training_run(run_id)

    async def base_model(self, run_id: str) -> str:
        """A run's base model as its client called it."""
        row = await self.store.run(run_id)
        return (await self.training_run(run_id) if row is None else row).base_model

    async def owned_runs(self, owner: str) -> list[TrainingRun]:
        """Newest first."""
        rows = await self.store.all_runs()
        return [
            run
            for run in await Op(self.controller.call("list_runs"))
            if self._owns(owner, rows.get(run.run_id))
        ]

    async def operate(
        self,
        run: Run,
        seq_id: int,
        kind: str,
        args: Callable[[], Awaitable[dict[str, Any]]],
        answer: Callable[[Any], Awaitable[Answer]] | None = None,
        size: int = 0,
        tokens: int = 0,
    ) -> dict[str, str]:
        """Append operation `seq_id` to a run's log; returns what names the request.

        `args` prepares the operation's and may fail: the operation then takes its place in the
        log and nothing happens. The same number again is the same request. `answer` makes the answer
        of a result (default: that of the kind).

        Raises:
            Busy: too many bytes wait already, or the owner's `tokens` are used up for now.
            InvalidInput: `seq_id` is below 1.
        """
        if not run.pending or seq_id > max(run.pending):
            self._refuse_while_draining()  # but let in what others wait for
        run_id = run.row.run_id
        if seq_id < 1:
            raise InvalidInput(f"seq_id must be at least 1, got {seq_id}")
        request_id = operation_id(run_id, seq_id)
        # Clients send the first part of a batch when all others are in: while a run waits for a
        # number, refusing the next would be for good.
        if run.moving and self._pending_bytes + size > self.settings.max_pending_bytes:
            raise Busy("too much training data is waiting: try again in a moment")
        owner = run.row.owner
        if tokens:
            await self._let_in(request_id, lambda: self.rates.check(owner))
        span = tracing.start(f"gateway.{kind}", run=run_id, op=seq_id)

        async def apply() -> Answer:
            grant = await self._run_grant(run)
            link = LearnerLink(grant, self.controller, lambda: run.answered, keep=True)
            try:
                prepared = await args()
            except BaseException:
                link.submit(seq_id, "skip", {})
                raise
            try:
                result = await Op(link.submit(seq_id, kind, prepared, span.traceparent))
            except TinsmithError:
                run.failed.add(seq_id)
                raise
            finally:
                if run.grant is not None:  # a learner that died has been replaced
                    run.grant = asyncio.get_running_loop().create_future()
                    run.grant.set_result(link.grant)
            return answers.answer(kind, run_id, result) if answer is None else await answer(result)

        async def work() -> Answer:
            with span, logs.about(run=run_id, op=seq_id, kind=kind):
                return await apply()

        begun = await self.futures.begin(request_id, owner, work)
        run.arrive(seq_id)
        if begun:
            self.rates.take(owner, tokens)
            run.pending[seq_id] = size
            self._pending_bytes += size
            waiting = self.futures.settled(request_id)
            waiting.add_done_callback(lambda _: self._operation_done(run, seq_id))
        return {"request_id": request_id, "model_id": run_id}

    def _operation_done(self, run: Run, seq_id: int) -> None:
        self._pending_bytes -= run.pending.pop(seq_id, 0)

    async def recover(self, owner: str, request_id: str) -> None:
        """Have the answer of an operation that was under way when the server before this one stopped:
        if it had come to the run's log, it is done, and answered as if nothing had happened.
        """
        run_id, _, number = request_id.partition(":op:")

        async def work() -> Answer:
            if not number.isdigit():
                raise NotFound(f"request {request_id} was lost when the server stopped: ask again")
            run, seq_id = await self.run(owner, run_id), int(number)
            link = LearnerLink(await self._run_grant(run), self.controller, lambda: run.answered)
            try:
                kind, result = await Op(link.outcome(seq_id))
            except NotFound as error:
                await self.skip(owner, run_id, seq_id)  # nothing may wait for it
                raise NotFound(
                    f"request {request_id} was under way when the server stopped, and had not come to "
                    f"the run's log, or its result is not kept any more ({error}). The run goes on "
                    "without it"
                ) from None
            if kind == "publish":
                raise NotFound(
                    f"the server stopped while it answered request {request_id}: version "
                    f"{result.version} is published; ask for its sampler again"
                )
            return answers.answer(kind, run_id, result)

        await self.futures.begin(request_id, owner, work)

    async def _run_grant(self, run: Run) -> RunGrant:
        """
        Raises:
            NotFound: the run is not in memory any more.
        """
        session = await self.session(run.row.owner, run.row.session_id)
        if run.grant is None and session.active:
            # Of before a restart: the cluster may have it still, or its log.
            run.grant = asyncio.wrap_future(self.controller.call("reopen_run", run.row.run_id))
        grant = run.grant
        try:
            if grant is not None:
                granted = await asyncio.shield(grant)
                run.arrived = max(run.arrived, granted.next_seq_id - 1)
                return granted
        except NotFound:
            run.grant = None
        except Exception:
            if run.grant is grant:
                run.grant = None  # asked again next time
            raise
        raise NotFound(
            f"run {run.row.run_id} is no longer in memory: its session ended; "
            "create_training_client_from_state_with_optimizer(path) goes on from a saved state"
        )

    async def skip(self, owner: str, run_id: Any, seq_id: Any) -> None:
        """Count an operation that was refused as done: its client has moved on."""
        if not isinstance(seq_id, int) or not 1 <= seq_id < MAX_SEQ_ID:
            return
        with contextlib.suppress(TinsmithError):
            check_text("model_id", run_id)  # nothing has looked at it yet
            run = await self.run(owner, run_id)
            grant = await self._run_grant(run)
            run.arrive(seq_id)
            grant.learner.call("submit", run_id, seq_id, "skip", {})

    # ---- samplers ----

    async def create_sampler(
        self,
        session: Session,
        sampler_seq_id: int,
        base_model: str | None = None,
        model_path: str | None = None,
        policy: PolicyRef | None = None,
    ) -> str:
        """A sampling session on a base model, a checkpoint, or what a run published (`policy`).

        Raises:
            NotFound: no such model or checkpoint, for this owner.
            InvalidInput: neither or both are given.
        """
        sampler_id = f"{session.session_id}:sample:{sampler_seq_id}"
        if sampler_id in session.samplers:
            return sampler_id
        if model_path is not None:
            checkpoint = await self.checkpoint(session.owner, model_path)
            base_model = await self.base_model(checkpoint.run_id)
        elif base_model is None:
            raise InvalidInput("give a base_model or a model_path to sample from")
        if policy is None:
            await self.models.resolve(base_model)
        row = SamplerRow(
            sampler_id,
            session.session_id,
            session.owner,
            base_model,
            model_path,
            None if policy is None else policy.run_id,
            None if policy is None else policy.version,
        )
        await self.store.add_sampler(row)
        session.samplers[sampler_id] = sampler = Sampler(row)
        # Load what it needs before the first request does.
        self._spawn(self._ready(sampler))
        return sampler_id

    async def sampler(self, owner: str, sampler_id: str) -> tuple[Session, Sampler]:
        """
        Raises:
            NotFound: the owner has no such sampling session.
            InvalidInput: its session is over.
        """
        session = self._sessions.get(sampler_id.partition(":")[0])
        if session is not None and session.owner == owner and session.active:
            sampler = session.samplers.get(sampler_id)
            if sampler is not None:
                session.seen()
                return session, sampler
        row = await self.sampler_row(owner, sampler_id)
        session = await self.active_session(owner, row.session_id)
        return session, session.samplers.setdefault(sampler_id, Sampler(row))

    async def sampler_row(self, owner: str, sampler_id: str) -> SamplerRow:
        """
        Raises:
            NotFound: the owner has no such sampling session.
        """
        row = await self.store.sampler(sampler_id)
        if row is None or row.owner != owner:
            raise NotFound(f"no sampling session {sampler_id!r}")
        return row

    async def _ready(self, sampler: Sampler) -> None:
        with (
            contextlib.suppress(TinsmithError),  # whoever samples is told
            self._using(await self.models.resolve(sampler.row.base_model)),
        ):
            await self._sampler_link(sampler)

    async def _sampler_link(self, sampler: Sampler) -> SamplerLink:
        row = sampler.row
        if sampler.link is None:
            if row.model_path is not None:
                call = self.controller.call("grant_checkpoint_sampler", row.model_path)
            else:
                known_as = await self.models.resolve(row.base_model)
                policy = PolicyRef(row.run_id, row.version)
                call = self.controller.call("grant_sampler", known_as, policy)
            sampler.link = asyncio.wrap_future(Op(call).then(SamplerLink).future)
        link = sampler.link
        try:
            return await asyncio.shield(link)
        except Exception:
            if sampler.link is link:
                sampler.link = None  # asked again next time
            raise

    async def sample(self, sampler: Sampler, name: str, request: SampleRequest) -> SampleResponse:
        """Sample; being cancelled withdraws the request. A sampler that died is replaced."""
        span = tracing.start("gateway.sample", request=name, samples=request.num_samples)
        named = replace(request, request_id=name, traceparent=span.traceparent)
        with (
            span,
            logs.about(request=name),
            self._using(await self.models.resolve(sampler.row.base_model)),
        ):
            return await self._sample(sampler, name, named)

    async def _sample(self, sampler: Sampler, name: str, request: SampleRequest) -> SampleResponse:
        link = await self._sampler_link(sampler)
        try:
            return await Op(link.sample(request, name))
        except asyncio.CancelledError:
            link.withdraw(name)
            raise

    async def let_sample(self, owner: str, request_id: str) -> None:
        """
        Raises:
            Busy: too many of the owner's samples are under way, or its tokens are used up for now.
        """

        def check() -> None:
            pending = sum(len(s.samples) for s in self._sessions.values() if s.owner == owner)
            if pending >= self.settings.max_pending_samples:
                raise Busy("too many sampling requests are under way: try again in a moment")
            self.rates.check(owner)

        await self._let_in(request_id, check)

    async def _let_in(self, request_id: str, check: Callable[[], None]) -> None:
        """A request that came before is let in whatever `check` says."""
        try:
            check()
        except Busy:
            if not await self.futures.known(request_id):
                raise

    def used(self, model: str) -> None:
        """Keep a base model loaded for a while."""
        self._used[model] = time.monotonic()

    # ---- checkpoints ----

    async def checkpoint(self, owner: str, path: str, *, own: bool = False) -> Checkpoint:
        """A checkpoint that the owner may read (`own`: may change).

        Raises:
            InvalidInput: that is no path.
            NotFound: there is none, or it is somebody else's and not public.
        """
        run_id = CheckpointPath.parse(path).run_id
        found = None
        with contextlib.suppress(NotFound):
            checkpoint = await Op(self.controller.call("get_checkpoint", path))
            if (checkpoint.public and not own) or await self.owns_run(owner, run_id):
                found = checkpoint
        if found is None:
            raise NotFound(f"no checkpoint {path!r}")
        return found

    async def owns_run(self, owner: str, run_id: str) -> bool:
        return self._owns(owner, await self.store.run(run_id))

    def _owns(self, owner: str, row: RunRow | None) -> bool:
        """Runs made without the gateway belong to everybody where there are no keys."""
        return not self.access.closed if row is None else row.owner == owner

    # ---- what is told of it ----

    def pending_bytes(self) -> float:
        return self._pending_bytes

    def active_sessions(self) -> float:
        return sum(session.active for session in self._sessions.values())

    # ---- upkeep ----

    @contextlib.contextmanager
    def _using(self, model: str) -> Iterator[None]:
        """Keep a model, which may take long to load, from being unloaded meanwhile."""
        self._in_use[model] += 1
        try:
            yield
        finally:
            self._in_use[model] -= 1
            self._used[model] = time.monotonic()

    async def lost_operation(self, owner: str, request_id: str) -> bool:
        """Whether this could be an operation (or the creation) of a run of this owner's that was
        under way when the server stopped."""
        run_id, _, _ = request_id.removesuffix(":create").partition(":op:")
        session = await self.store.session(run_id.partition(":")[0])
        return session is not None and session.owner == owner and ":train:" in run_id

    def _settled(self, request_id: str, result: Result) -> None:
        sampler_id, _, seq_id = request_id.rpartition(":")
        session = self._sessions.get(request_id.partition(":")[0])
        if session is not None and request_id in session.samples:
            session.samples.discard(request_id)
            self.completions.add(sampler_id, int(seq_id), request_id, result)

    def _refuse_while_draining(self) -> None:
        if self.draining:
            raise Unavailable("the server is shutting down")

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._spawned_done)

    def _spawned_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.warning("background work failed", exc_info=task.exception())

    async def keep_house(self) -> None:
        """Until cancelled: end lapsed sessions, unload idle models, forget what is too old."""
        pause = min(self.settings.session_timeout_s / 4, self.settings.idle_unload_s / 4, 30.0)
        # Sessions of before a restart: some may be back. Where another gateway serves the same
        # home, they may be its own, and it looks after the rest.
        alone = FileLock(f"{self.service.home}/gateway.lock")
        with contextlib.suppress(Timeout):
            alone.acquire(blocking=False)
            for row in await self.store.active_sessions():
                session = Session(row.session_id, row.owner, True, time.monotonic())
                self._sessions.setdefault(row.session_id, session)
        try:
            while True:
                await asyncio.sleep(pause)
                try:
                    await self._tidy()
                except Exception:
                    log.exception("housekeeping failed; it goes on")
        finally:
            alone.release()

    async def _tidy(self) -> None:
        now = time.monotonic()
        for session in list(self._sessions.values()):
            if session.active and now - session.last_seen > self.settings.session_timeout_s:
                log.info("session %s sent no heartbeat: letting it go", session.session_id)
                await self.end_session(session, "expired")
        for model, used in list(self._used.items()):
            if now - used < self.settings.idle_unload_s or self._in_use[model]:
                continue
            if await Op(self.controller.call("unload", model)):
                log.info("base model %s unloaded after %.0f s idle", model, now - used)
                self._used.pop(model, None)
        oldest = time.time() - self.settings.keep_results_s
        await self.store.forget_results(oldest, self.settings.keep_results_bytes)
        await self.store.forget_sequences(time.time() - SEQUENCES_KEPT_S)

    async def drain(self) -> None:
        """Take nothing new, finish what is under way, and write down the runs, so that their
        clients can go on when the server is started again."""
        self.draining = True
        await self.futures.drain()
        if self.service.owns_cluster:
            await Op(self.controller.call("park_runs"))


def operation_id(run_id: str, seq_id: int) -> str:
    return f"{run_id}:op:{seq_id}"


def sample_id(sampler_id: str, seq_id: int) -> str:
    return f"{sampler_id}:{seq_id}"
