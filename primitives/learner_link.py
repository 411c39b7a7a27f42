"""The way to a run's learner, which may die and be started again meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from .errors import StorageFailure, TinsmithError, Unavailable
from .op import Handle, completed, forward_result
from .sync import later
from .window import Window

RETRY_SECONDS = 300.0  # how long a learner may fail to come back, from the first failure
PAUSE_SECONDS = 0.5  # between two attempts


@dataclass(frozen=True)
class RunGrant:
    """What the controller hands out for a run: the way to its learner, where its log stands."""

    run_id: str
    base_model: str
    model_path: str
    learner: Handle
    next_seq_id: int


@dataclass(eq=False)
class _Sent:
    """An operation under way; `trace`: the `traceparent` of who sent it; `failed`: when its learner
    was first found dead."""

    seq_id: int
    kind: str
    args: dict[str, Any]
    trace: str | None = None
    target: Future[Any] = field(default_factory=Future)
    failed: float | None = None


class LearnerLink:
    """Submits a run's operations. When the learner dies under one, the controller is asked for
    the learner that takes its place, with the run as its log has it, and the operation is sent
    again under its number: it is applied once, whatever the first had done.

    `answered()`: the number before which the client knows what became of all operations. The learner
    passes over those of them that it misses: they were refused, when nothing could be written.
    `keep`: it also keeps their results, for a client that may ask for one again.

    What is more than a window's worth of data waits here, and not in the learner's memory.

    An operation fails with `Unavailable` when no learner could be had for `retry_seconds` from the
    first failure on (an attempt under way is waited for), or when the service itself is gone.
    """

    def __init__(
        self,
        grant: RunGrant,
        controller: Handle,
        answered: Callable[[], int],
        keep: bool = False,
        retry_seconds: float = RETRY_SECONDS,
    ) -> None:
        self.grant = grant
        self._answered_before, self._keep = answered, keep
        self._controller = controller
        self._retry_seconds = retry_seconds
        self._lock = threading.Lock()
        self._asking: Future[RunGrant] | None = None
        self._window = Window()

    def submit(
        self, seq_id: int, kind: str, args: dict[str, Any], trace: str | None = None
    ) -> Future[Any]:
        """Send an operation, now or when there is room; the future has its result."""
        sent = _Sent(seq_id, kind, args, trace)
        sent.target.add_done_callback(lambda _: self._window.leave(seq_id))
        size = sum(datum.nbytes for datum in args.get("data", ()))
        self._window.enter(seq_id, size, lambda: self._send(sent))
        return sent.target

    def withdraw(self, seq_id: int) -> Future[bool]:
        return self.grant.learner.call("withdraw", self.grant.run_id, seq_id)

    def _send(self, sent: _Sent) -> None:
        learner = self.grant.learner
        operation = (self.grant.run_id, sent.seq_id, sent.kind, sent.args)
        answered = self._answered_before()
        delivered = 1 if self._keep else answered
        try:
            call = learner.call("submit", *operation, answered, delivered, sent.trace)
        except Exception as error:
            # It cannot be carried. Its number is taken: let the log pass over it.
            learner.call("submit", self.grant.run_id, sent.seq_id, "skip", {})
            sent.target.set_exception(error)
            return

        def settle(done: Future[Any]) -> None:
            error = done.exception()
            if isinstance(error, Unavailable):
                sent.failed = sent.failed or time.monotonic()
                asked = self._ask(learner)
                asked.add_done_callback(lambda answer: self._again(sent, learner, error, answer))
            else:
                forward_result(done, sent.target)

        call.add_done_callback(settle)

    def _ask(self, dead: Handle) -> Future[RunGrant]:
        """The grant of the learner in the place of one; all who wait share the question."""
        with self._lock:
            asking = self._asking
            first = asking is None and self.grant.learner == dead
            if first:
                asking = self._asking = self._controller.call("reopen_run", self.grant.run_id)
        if asking is None:
            return completed(self.grant)
        if first:
            asking.add_done_callback(self._answered)  # at once, where the service is closed
        return asking

    def _answered(self, answer: Future[RunGrant]) -> None:
        with self._lock:
            self._asking = None
            if answer.exception() is None:
                self.grant = answer.result()

    def _again(
        self, sent: _Sent, learner: Handle, error: Unavailable, answer: Future[RunGrant]
    ) -> None:
        refused = answer.exception()
        if refused is None:
            if answer.result().learner == learner:
                sent.target.set_exception(error)  # the operation's own: the learner lives
            else:
                self._send(sent)
        elif not isinstance(refused, Unavailable | StorageFailure):
            # A run that was closed meanwhile, or that cannot be recovered.
            refused.__cause__ = error
            sent.target.set_exception(error if isinstance(refused, LookupError) else refused)
        else:
            # Also where the disk is full: the learner that died may have written the operation down.
            self._later(sent, learner, error, refused)

    def _later(
        self, sent: _Sent, learner: Handle, error: Unavailable, refused: TinsmithError
    ) -> None:
        """Try again after a pause, as long as there is time and a controller."""

        def decide(pinged: Future[Any]) -> None:
            assert sent.failed is not None
            if pinged.exception() is not None:
                sent.target.set_exception(error)
            elif time.monotonic() - sent.failed > self._retry_seconds:
                late = Unavailable(
                    f"operation {sent.seq_id} ({sent.kind}) of run {self.grant.run_id}: no learner "
                    f"could be had for {self._retry_seconds:.0f} s ({refused}). The run's log is "
                    "kept: service.resume_training_client(run_id) goes on from there"
                )
                late.__cause__ = error
                sent.target.set_exception(late)
            else:
                later(PAUSE_SECONDS, lambda: self._ask_again(sent, learner, error))

        self._controller.call("ping").add_done_callback(decide)

    def _ask_again(self, sent: _Sent, learner: Handle, error: Unavailable) -> None:
        asked = self._ask(learner)
        asked.add_done_callback(lambda answer: self._again(sent, learner, error, answer))
