"""A run's operations in a learner: those that wait for their turn, by number, the one under way, and
the results of those applied. They are written to the run's journal when they come; results are given
once they are on disk.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from ..primitives.errors import (
    CorruptLog,
    InvalidInput,
    NotFound,
    OpCancelled,
    OperationCrashed,
    StorageFailure,
    Unavailable,
)
from ..primitives.op import Handle
from . import records
from .journal import Journal
from .records import Record

RESULTS_KEPT = 4096
BATCHES = ("forward", "forward_backward")  # what takes passes of the engine
# What changes a run's state, and so is done again when its log is replayed.
EFFECTS = ("forward_backward", "optim_step", "load_state", "set_share", "publish")
# After so many learners in a row that died while they recovered a run, its operations are done alone;
# what so many then died of is refused.
CRASHES_BEFORE_ALONE = 3
CRASHES_ALONE = 3


@dataclass
class Entry:
    """`position`: in the run's log. `settled`: its result has been written down, in this life or
    in one before. `alone`: nothing else is done meanwhile."""

    kind: str
    args: dict[str, Any]
    future: asyncio.Future[Any]
    arrived: float = field(default_factory=time.perf_counter)
    seq_id: int = 0
    position: int = 0
    settled: bool = False
    alone: bool = False


@dataclass
class RunLog:
    """
    Attributes:
        run_key: names this opening of the run in the checkpoints that it saves.
        wake: called when there may be something to do.
        on_failure: called once when the disk fails the log, or another learner has taken it: nothing
            more comes of it here, and what the disk has kept goes on when the run is opened again.
        publish_steps, published: whether every operation that changes the weights publishes them,
            and whether any has.
        replayed: operations up to this number had come to a learner before this one.
        suspect_until: operations up to this number are done alone: learners have died of one of them,
            or of what another run did at the time.
        given_before: the operation being applied had its result from a learner before this one.
        results, kinds: of the last operations, by number.
        holder: the samplers that hold what it has published.
        unanswered: operations that have come, without a result given, by number.
        snapshot: the one under way.
        demanded: a snapshot that is to be taken whatever it costs.
        resting: what comes next rests on a checkpoint, and waits for the snapshot under way: then the
            checkpoint may be deleted.
        reached: done when that number is the next.
        failed: nothing more comes of it; `over` is done then.
    """

    run_id: str
    journal: Journal
    run_key: str
    wake: Callable[[], None]
    on_failure: Callable[[RunLog], None]
    next_seq_id: int = 1
    publish_steps: bool = False
    published: bool = False
    replayed: int = 0
    suspect_until: int = 0
    holder: Handle | None = None
    given_before: bool = False
    closed: bool = False
    failed: bool = False
    resting: bool = False
    over: asyncio.Future[None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )
    publishing: asyncio.Lock = field(default_factory=asyncio.Lock)
    waiting: dict[int, Entry] = field(default_factory=dict)
    under_way: Entry | None = None
    unanswered: dict[int, Entry] = field(default_factory=dict)
    results: OrderedDict[int, asyncio.Future[Any]] = field(default_factory=OrderedDict)
    kinds: dict[int, str] = field(default_factory=dict)
    snapshot: asyncio.Future[Any] | None = None
    demanded: asyncio.Future[Any] | None = None
    reached: tuple[int, asyncio.Future[Any]] | None = None

    @property
    def taken(self) -> bool:
        """Whether another learner has taken the run."""
        return isinstance(self.journal.log.failure, Unavailable)

    def check_claim(self) -> None:
        """
        Raises:
            Unavailable: another learner has taken the run.
        """
        if not self.closed:  # else this learner has deleted the log
            self.journal.log.claim.check()

    async def on_disk(self) -> None:
        """Wait until all that has come is on disk.

        Raises:
            NotFound: the run was closed.
            StorageFailure: the disk failed.
            Unavailable: another learner has taken the run.
        """
        try:
            await asyncio.wrap_future(self.journal.on_disk())
        except StorageFailure as error:
            if self.closed:  # and its log with it, which is what the error says
                raise NotFound(f"run {self.run_id} was closed") from error
            raise

    # ---- what comes ----

    def append(self, seq_id: int, kind: str, args: dict[str, Any]) -> Entry:
        """Write an operation down and let it wait for its turn. One that cannot be written fails,
        and its number is passed over."""
        try:
            position = self.journal.write(records.operation(seq_id, kind, args))
        except (InvalidInput, StorageFailure) as error:
            return self.pass_over(seq_id, error)
        return self._wait(seq_id, kind, args, position)

    def pass_over(self, seq_id: int, error: BaseException) -> Entry:
        """Let a number be used up, by an operation that failed with this error."""
        entry = self._wait(seq_id, "skip", {}, self.journal.log.end)
        self.journal.write_later(records.operation(seq_id, "skip", {}))
        self.settle(entry, None, error, False)
        return entry

    def pass_over_missing(self, numbers: Iterable[int], error: BaseException) -> None:
        """Those of these numbers that have not come."""
        for seq_id in numbers:
            if seq_id >= self.next_seq_id and seq_id not in self.waiting:
                self.pass_over(seq_id, error)

    def refused(self) -> dict[int, BaseException]:
        """The errors of operations that failed, as far as they are kept, by number."""
        done = {n: f for n, f in self.results.items() if f.done() and not f.cancelled()}
        return {n: error for n, f in done.items() if (error := f.exception()) is not None}

    def forget_results(self, start: int, end: int) -> None:
        """Of the operations from `start` to before `end`: the client that sent them has them."""
        for seq_id in [n for n, f in self.results.items() if start <= n < end and f.done()]:
            del self.results[seq_id], self.kinds[seq_id]
            self.journal.forget_result(seq_id)

    def _wait(self, seq_id: int, kind: str, args: dict[str, Any], position: int) -> Entry:
        # A result that no caller waits for any more is not an unhandled error.
        future = unhandled_is_fine(asyncio.get_running_loop().create_future())
        entry = Entry(kind, args, future, seq_id=seq_id, position=position)
        self.waiting[seq_id] = self.unanswered[seq_id] = entry
        self.results[seq_id], self.kinds[seq_id] = future, kind
        while len(self.results) > RESULTS_KEPT and next(iter(self.results.values())).done():
            oldest, _ = self.results.popitem(last=False)
            del self.kinds[oldest]
        self.wake()
        return entry

    # ---- what becomes of it ----

    def settle(self, entry: Entry, value: Any, error: BaseException | None, applied: bool) -> None:
        """Write down what became of an operation, and give it once that is on disk."""
        if applied:
            self.journal.took(_seconds(value))
        if entry.alone:
            self.journal.write_later(records.mark("alone", entry.seq_id, entry.kind, over=True))
        if entry.settled and error is not None and not applied:
            self._cannot_replay(entry, error)
        if entry.settled or self.failed:
            return
        entry.settled = True
        self.journal.write_result(records.result(entry.seq_id, entry.kind, value, error, applied))

        def give(written: asyncio.Future[None]) -> None:
            failure = None if self.closed or written.cancelled() else written.exception()
            if failure is not None:
                self._fail()
                return
            self.unanswered.pop(entry.seq_id, None)
            if not entry.future.done():
                finish(entry.future, value, error)

        asyncio.wrap_future(self.journal.on_disk()).add_done_callback(give)

    def _fail(self) -> None:
        """The disk failed: what it has not kept is refused, what it has kept is done again. Or another
        learner has taken the run: it is asked for all that was not answered."""
        if self.failed:
            return
        self.failed = True
        self.over.set_result(None)
        failure = self.journal.log.failure
        assert failure is not None
        for entry in self.unanswered.values():
            lost = self.taken or entry.position >= self.journal.log.synced_end
            if lost and not entry.future.done():
                entry.future.set_exception(failure)
        for waiting in (self.demanded, self.reached and self.reached[1]):
            if waiting is not None and not waiting.done():
                waiting.set_exception(failure)
        self.demanded = self.reached = None
        self.on_failure(self)

    def _cannot_replay(self, entry: Entry, error: BaseException) -> None:
        """It had been done, and what came after it rests on it."""
        self.failed = True
        place = self.journal.log.place(entry.position)
        refused = CorruptLog(
            f"{place}: operation {entry.seq_id} ({entry.kind}) of run {self.run_id}, done before, "
            f"cannot be done again: {error}. Resume the run from a checkpoint (path=...)"
        )
        if self.reached is not None:
            self.reached[1].set_exception(refused)
            self.reached = None

    def rest(self) -> None:
        """Do nothing more before a snapshot is written."""
        self.resting = True
        self.demand_snapshot()

    def settle_snapshot(self, entry: Entry, error: BaseException | None) -> None:
        self.snapshot, self.resting = None, False
        finish(entry.future, None, error)
        if error is not None:
            # Due again, but not at once: the disk may be full.
            self.journal.seconds += entry.args["seconds"] / 2
        self.wake()

    def demand_snapshot(self) -> asyncio.Future[Any]:
        if self.demanded is None:
            self.demanded = unhandled_is_fine(asyncio.get_running_loop().create_future())
        self.wake()
        return self.demanded

    # ---- turns ----

    def take_head(self) -> Entry | None:
        """A snapshot that is due, or the next operation, if nothing has to be waited for."""
        if self.reached is not None and self.reached[0] == self.next_seq_id and not self.under_way:
            finish(self.reached[1], None, None)
            self.reached = None
        if self.under_way is not None or self.failed:
            return None
        if self.snapshot is None and (self.demanded is not None or self.journal.due):
            return self._take_snapshot()
        if self.resting or self.next_seq_id not in self.waiting:
            return None
        entry = self.waiting.pop(self.next_seq_id)
        self.next_seq_id += 1
        self.under_way = entry if entry.kind in BATCHES else None
        return entry

    def _take_snapshot(self) -> Entry:
        """Of a run between two operations; it takes no number."""
        waiting = [entry.position for entry in self.waiting.values()]
        about = dict(
            publish_steps=self.publish_steps,
            published=self.published,
            next_seq_id=self.next_seq_id,
            position=min([self.journal.log.end, *waiting]),
            seconds=self.journal.seconds,
        )
        self.journal.seconds = 0.0
        self.snapshot = self.demand_snapshot()
        self.demanded = None
        return Entry("snapshot", about, self.snapshot)

    @property
    def suspect(self) -> bool:
        """Whether what it has to do next is to be done while nothing else is."""
        return self.next_seq_id in self.waiting and self.next_seq_id <= self.suspect_until

    def take_alone(self) -> Entry | None:
        """The head, marked as what is being done, for a learner that comes after this one."""
        entry = self.take_head()
        if entry is not None and entry.kind != "snapshot":
            entry.alone = True
            self.journal.write_later(records.mark("alone", entry.seq_id, entry.kind))
        return entry

    # ---- after a learner died ----

    def remember(self, record: Record) -> asyncio.Future[Any]:
        """A result that may be asked for again."""
        future = unhandled_is_fine(asyncio.get_running_loop().create_future())
        finish(future, *record.outcome())
        self.results[record.seq_id], self.kinds[record.seq_id] = future, record.kind
        self.journal.keep(record)
        return future

    def enter(self, written: list[tuple[int, Record]], crashed: bool) -> None:
        """Let what the log holds wait for its turn again. `crashed`: the learner before died.

        Raises:
            CorruptLog: it holds something else.
            OperationCrashed: replaying it kills learners.
        """
        results = {r.seq_id: r for _, r in written if r.what == "result"}
        operations = {r.seq_id: (at, r) for at, r in written if r.what == "operation"}
        if crashed:
            self._look_for_crashes([record for _, record in written], results, operations)
        for seq_id, (position, record) in sorted(operations.items()):
            result, kind, args = results.get(seq_id), record.kind, {}
            if result is not None and not result.applied:
                kind = "skip"  # it changed nothing
            try:
                args = {} if kind == "skip" else record.args()
            except InvalidInput as error:
                if result is not None:
                    raise CorruptLog(f"{self.journal.log.place(position)}: {error}") from None
                # It was refused as such, or would have been.
                result = records.result(seq_id, kind, None, error, False)
                self.journal.write_later(result)
                kind = "skip"
            if kind == "skip" and result is None:
                # Of what was withdrawn or refused; nobody was told of it yet.
                gone = OpCancelled(f"operation {seq_id} was withdrawn or refused before the crash")
                result = records.result(seq_id, kind, None, gone, False)
                self.journal.write_later(result)
            if result is None:
                self._wait(seq_id, kind, args, position)
            else:
                future = self.remember(result)
                self.waiting[seq_id] = Entry(
                    kind, args, future, seq_id=seq_id, position=position, settled=True
                )
            self.replayed = max(self.replayed, seq_id)

    def _look_for_crashes(
        self,
        written: list[Record],
        results: dict[int, Record],
        operations: dict[int, tuple[int, Record]],
    ) -> None:
        """Every learner that recovers the run leaves a mark before and after. With too many that have
        only the first, all that is replayed is done alone, with a mark before and after each: of what
        has only the first, the learner has died."""
        died_of: Counter[int] = Counter()
        began, doing, killer = 0, None, None
        for record in [*written, records.mark("recovery", self.next_seq_id, "")]:
            if record.what == "alone":
                doing = None if record.applied else record.seq_id
            elif record.what == "recovery" and record.applied:
                began = 0
                died_of.clear()
            elif record.what == "recovery":
                began += 1
                died_of.update([] if doing is None else [doing])
                killer, doing = doing, None
        if killer is not None and died_of[killer] >= CRASHES_ALONE:
            record = operations[killer][1]
            report = (
                f"{_told(record)} of run {self.run_id} kills the learner: {began} have died of it, "
                f"{died_of[killer]} of them when they did nothing else"
            )
            if killer in results:
                raise OperationCrashed(
                    f"{report}. It had been done before, so the run cannot go on without it: "
                    "resume it from a checkpoint (path=...)"
                )
            refused = OperationCrashed(f"{report}. It was refused; the run goes on without it")
            results[killer] = records.result(killer, record.kind, None, refused, False)
            self.journal.write_later(results[killer])
        elif began > CRASHES_BEFORE_ALONE:
            self.suspect_until = max(operations, default=0)
        self.mark_recovery(over=False)

    def mark_recovery(self, *, over: bool) -> None:
        self.journal.write_later(records.mark("recovery", self.next_seq_id, "", over=over))


def _told(record: Record) -> str:
    """An operation, as a crash report names it."""
    try:
        args = record.args()
    except InvalidInput:
        args = {}
    told = [repr(args["loss_fn"])] if "loss_fn" in args else []
    if "data" in args:
        told.append(
            f"{len(args['data'])} datums of {sum(d.model_input.length for d in args['data']):,} tokens"
        )
    return f"operation {record.seq_id} ({', '.join([record.kind, *told])})"


def finish(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


def unhandled_is_fine(future: asyncio.Future[Any]) -> asyncio.Future[Any]:
    future.add_done_callback(lambda f: f.cancelled() or f.exception())
    return future


def _seconds(result: Any) -> float:
    """That doing an operation again would take, by its result."""
    names = ("forward_s:sum", "backward_s:sum", "optimizer_s")
    return sum(getattr(result, "metrics", {}).get(name, 0.0) for name in names)
