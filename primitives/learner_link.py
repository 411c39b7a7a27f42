"""The way to a run's learner, which may die and be started again meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from .op import Handle, failed, forward_result
from .resending import RETRY_SECONDS, Resending
from .window import Window


@dataclass(frozen=True)
class RunGrant:
    """What the controller hands out for a run: the way to its learner, where its log stands."""

    run_id: str
    base_model: str
    model_path: str
    learner: Handle
    next_seq_id: int


@dataclass(frozen=True)
class Answered:
    """What a client knows of a run's operations: what became of all `before` a number, and that those
    in `failed`, from that number on, failed."""

    before: int
    failed: list[int] = field(default_factory=list)


class LearnerLink:
    """Submits a run's operations. When the learner dies under one, the controller is asked for
    the learner that takes its place, with the run as its log has it, and the operation is sent
    again under its number: it is applied once, whatever the first had done.

    `answered()`: which operations the client knows the outcome of. The learner passes over those of
    them that it misses: they were refused, when nothing could be written.
    `keep`: it also keeps their results, for a client that may ask for one again.

    What is more than a window's worth of data waits here, and not in the learner's memory.

    An operation fails with `Unavailable` when no learner could be had for `retry_seconds` from the
    first failure on (an attempt under way is waited for), or when the service itself is gone.
    """

    def __init__(
        self,
        grant: RunGrant,
        controller: Handle,
        answered: Callable[[], Answered],
        keep: bool = False,
        retry_seconds: float = RETRY_SECONDS,
    ) -> None:
        self._answered, self._keep = answered, keep
        self._first = grant.next_seq_id  # what came before is another client's
        self._window = Window()
        self._way = Resending(
            grant,
            lambda held: held.learner,
            lambda held: controller.call("reopen_run", held.run_id),
            controller,
            retry_seconds,
            "the run's log is kept: service.resume_training_client(run_id) goes on from there",
        )

    @property
    def grant(self) -> RunGrant:
        return self._way.grant

    def submit(
        self, seq_id: int, kind: str, args: dict[str, Any], trace: str | None = None
    ) -> Future[Any]:
        """Send an operation, now or when there is room; the future has its result."""

        def call(grant: RunGrant) -> Future[Any]:
            operation = (grant.run_id, seq_id, kind, args)
            answered = self._answered()
            delivered = self._first if self._keep else answered.before
            known = (answered.before, answered.failed, (self._first, delivered))
            try:
                return grant.learner.call("submit", *operation, *known, trace)
            except Exception as error:
                # It cannot be carried. Its number is taken: let the log pass over it.
                grant.learner.call("submit", grant.run_id, seq_id, "skip", {})
                return failed(error)

        def send() -> None:
            what = f"operation {seq_id} ({kind}) of run {self.grant.run_id}"
            sent = self._way.send(call, what)
            sent.add_done_callback(lambda _: self._window.leave(seq_id))
            forward_result(sent, target)

        target: Future[Any] = Future()
        size = sum(datum.nbytes for datum in args.get("data", ()))
        self._window.enter(seq_id, size, send)
        return target

    def outcome(self, seq_id: int) -> Future[tuple[str, Any]]:
        """The kind and the result of an operation that was submitted before, by whomever.

        Raises:
            NotFound: it never came to the run's log, or its result is not kept any more.
        """
        what = f"operation {seq_id} of run {self.grant.run_id}"
        return self._way.send(
            lambda grant: grant.learner.call("outcome", grant.run_id, seq_id), what
        )

    def withdraw(self, seq_id: int) -> Future[bool]:
        return self.grant.learner.call("withdraw", self.grant.run_id, seq_id)
