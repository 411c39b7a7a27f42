"""What a learner tells of its operations: metrics, spans, log lines, and notes for a crash report.

The learner says when an operation came and when it began; how it ended, its future says. The
engine says which batches a pass computes.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from prometheus_client.metrics_core import Metric

from ..engines.learner import LearnerEngine
from ..primitives import tracing
from ..primitives.errors import (
    InvalidInput,
    NotFound,
    OpCancelled,
    OutOfCapacity,
    Unavailable,
)
from .notes import Notes
from .observed import Meters

# The stages that an operation's metrics name.
PHASES = ("queue", "pack", "forward", "backward", "optimizer", "publish")
PASSES_TRACED = 32  # of one batch

logger = logging.getLogger(__name__)

Future = asyncio.Future[Any]


@dataclass(frozen=True)
class _Pass:
    """A batch's share in a pass; times by `time.perf_counter()`."""

    began: float
    forward_s: float
    backward_s: float
    rows: int
    batches: int


@dataclass(eq=False)
class _Op:
    """`counted`: it came from a client; others are done again from a run's log."""

    run_id: str
    seq_id: int
    kind: str
    tokens: int = 0
    span: tracing.Span = tracing.NOTHING
    counted: bool = True
    arrived: float = field(default_factory=time.perf_counter)
    began: float | None = None
    slot: int = 0
    passes: list[_Pass] = field(default_factory=list)


class LearnerWatch:
    """Of one learner. Methods run in its event loop, but for those that the engine calls.

    Args:
        batch: the future of the batch that the engine knows by that number.
    """

    def __init__(self, meters: Meters, notes: Notes, batch: Callable[[int], Future]) -> None:
        self.notes, self.meters = notes, meters
        self._batch = batch
        self._ops: dict[Future, _Op] = {}
        self._runs: set[str] = set()
        self._computing: list[int] = []
        m = meters
        self._done = m.counter(
            "ops", "Operations done, by kind and how they ended.", "run", "kind", "outcome"
        )
        self._tokens = m.counter(
            "learner_tokens", "Tokens of batches computed, by kind of operation.", "run", "kind"
        )
        self._waited = m.histogram(
            "op_queue_seconds", "From an operation's arrival until it began.", "kind"
        )
        self._took = m.histogram("op_execute_seconds", "From its beginning to its end.", "kind")
        self._phases = m.histogram(
            "op_phase_seconds", "What an operation's stages took, as its metrics say.", "phase"
        )
        self._queued = m.gauge("queued_ops", "Operations that have not begun.", "run")
        self._queued_tokens = m.gauge(
            "queued_tokens", "Tokens of batches that have not begun.", "run"
        )
        self._version = m.gauge("run_version", "A run's version: its optimizer steps.", "run")
        self._bytes = m.gauge(
            "run_bytes",
            "Parameters, gradient and optimizer of a run, by where they are.",
            "run",
            "where",
        )

    # ---- what happens to operations ----

    def accepted(
        self,
        run_id: str,
        seq_id: int,
        kind: str,
        args: Mapping[str, Any],
        future: Future,
        trace: str | None,
    ) -> None:
        """An operation came; `future` is its result's."""
        if kind == "skip":
            return
        tokens = sum(datum.model_input.length for datum in args.get("data", ()))
        span = tracing.NOTHING
        if trace is not None:
            about = dict(run=run_id, op=seq_id, tokens=tokens or None)
            span = tracing.start(f"learner.{kind}", trace, **about)
        self._runs.add(run_id)
        self._enter(_Op(run_id, seq_id, kind, tokens, span), future)

    def _enter(self, op: _Op, future: Future) -> None:
        self._ops[future] = op
        future.add_done_callback(self._ended)

    def began(self, run_id: str, seq_id: int, kind: str, future: Future) -> None:
        """It is its turn. One with a result is done again for what it does to the run."""
        if future.done():
            return
        op = self._ops.get(future)
        if op is None:
            op = _Op(run_id, seq_id, kind, counted=False)
            self._enter(op, future)
        op.began = time.perf_counter()
        op.slot = self.notes.begin(kind, run_id, op.seq_id, op.tokens)

    def forget(self, run_id: str) -> None:
        """The run is closed."""
        self._runs.discard(run_id)
        self.meters.forget(run_id)

    # ---- the engine's watcher, in its thread ----

    def pass_begins(self, numbers: Collection[int]) -> None:
        self.notes.in_pass(self._computing, False)
        ops = [self._ops.get(self._batch(number)) for number in numbers]
        self._computing = [op.slot for op in ops if op is not None]
        self.notes.in_pass(self._computing, True)

    def pass_ended(
        self, rows: Mapping[int, int], began: float, forward_s: float, backward_s: float
    ) -> None:
        for number, count in rows.items():
            op = self._ops.get(self._batch(number))
            if op is not None and op.span.traceparent and len(op.passes) < PASSES_TRACED:
                op.passes.append(_Pass(began, forward_s, backward_s, count, len(rows)))

    # ---- how they end ----

    def _ended(self, future: Future) -> None:
        op, now = self._ops.pop(future), time.perf_counter()
        self.notes.end(op.slot)
        error = None if future.cancelled() else future.exception()
        metrics = {} if error is not None else getattr(future.result(), "metrics", {})
        if op.counted and op.run_id in self._runs:
            self._count(op, error, metrics, now)
        self._log(op, error)
        if op.span.traceparent:
            self._trace(op, metrics, now)
        op.span.end(error)

    def _count(
        self, op: _Op, error: BaseException | None, metrics: Mapping[str, float], now: float
    ) -> None:
        self._done.labels(op.run_id, op.kind, outcome(error)).inc()
        if op.began is not None:
            self._waited.labels(op.kind).observe(op.began - op.arrived)
            self._took.labels(op.kind).observe(now - op.began)
        if op.tokens and error is None:
            self._tokens.labels(op.run_id, op.kind).inc(op.tokens)
        for phase, seconds in _phases(metrics).items():
            self._phases.labels(phase).observe(seconds)

    def _log(self, op: _Op, error: BaseException | None) -> None:
        level = logging.DEBUG
        if error is not None:
            level = logging.INFO if outcome(error) in ("refused", "cancelled") else logging.WARNING
        if logger.isEnabledFor(level):
            ids = {"run": op.run_id, "op": op.seq_id, "kind": op.kind}
            told = "done" if error is None else f"{type(error).__name__}: {error}"
            logger.log(level, "operation %s: %s", op.kind, told, extra=ids)

    def _trace(self, op: _Op, metrics: Mapping[str, float], ended: float) -> None:
        parent, phases = op.span.traceparent, _phases(metrics)
        began = ended if op.began is None else op.began
        tracing.record("queue", parent, op.arrived, began)
        if "pack" in phases:
            packed = began + phases["pack"]
            tracing.record("pack", parent, began, packed)
            if op.passes:
                tracing.record("turn", parent, packed, max(op.passes[0].began, packed))
        for taken in op.passes:
            middle = taken.began + taken.forward_s
            end = middle + taken.backward_s
            together = tracing.record(
                "pass", parent, taken.began, end, rows=taken.rows, batches=taken.batches
            )
            tracing.record("forward", together, taken.began, middle)
            if op.kind == "forward_backward":
                tracing.record("backward", together, middle, end)
        if "optimizer" in phases:
            tracing.record("optimizer", parent, began, began + phases["optimizer"])
        if "publish" in phases:
            tracing.record("publish", parent, ended - phases["publish"], ended)

    # ---- asked for ----

    def collect(self, engine: LearnerEngine | None) -> list[Metric]:
        """`engine`: None before it is there."""
        queued: Counter[str] = Counter()
        tokens: defaultdict[str, int] = defaultdict(int)
        for op in list(self._ops.values()):
            if op.began is None:
                queued[op.run_id] += 1
                tokens[op.run_id] += op.tokens
        for gauge in (self._queued, self._queued_tokens, self._version, self._bytes):
            gauge.clear()
        for run_id, place, size, version in [] if engine is None else engine.runs.places():
            self._queued.labels(run_id).set(queued[run_id])
            self._queued_tokens.labels(run_id).set(tokens[run_id])
            self._version.labels(run_id).set(version)
            self._bytes.labels(run_id, place).set(size)
        return self.meters.collect()


def outcome(error: BaseException | None) -> str:
    """How a call ended, in one word."""
    if error is None:
        return "ok"
    if isinstance(error, OpCancelled):
        return "cancelled"
    if isinstance(error, Unavailable):
        return "unavailable"
    return "refused" if isinstance(error, InvalidInput | NotFound | OutOfCapacity) else "failed"


def _phases(metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics named `forward_s:sum` or `optimizer_s`, by stage."""
    found = {}
    for name, seconds in metrics.items():
        stage, _, unit = name.partition(":")[0].rpartition("_")
        if unit == "s" and stage in PHASES:
            found[stage] = seconds
    return found
