"""Calls to an actor that may die: they are sent again to the one that takes its place."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

from .errors import StorageFailure, TinsmithError, Unavailable
from .op import Handle, completed, forward_result
from .sync import later

G = TypeVar("G")
T = TypeVar("T")

RETRY_SECONDS = 300.0  # how long an actor may fail to come back, from the first failure
PAUSE_SECONDS = 0.5  # between two attempts


class Resending(Generic[G]):
    """The way to an actor by what the controller granted for it; `grant` is the newest.

    Args:
        actor: the handle in a grant.
        ask: has the controller start what takes the actor's place, if it died; gives its grant.
        controller: who is asked; while it restarts, calls to it wait.
        retry_seconds: how long none may be had, from the first failure on (an attempt under way is
            waited for).
        then: what can be done after that, for the error.
    """

    def __init__(
        self,
        grant: G,
        actor: Callable[[G], Any],
        ask: Callable[[G], Future[G]],
        controller: Handle,
        retry_seconds: float = RETRY_SECONDS,
        then: str = "try again later",
    ) -> None:
        self.grant = grant
        self._actor = actor
        self._ask = ask
        self._controller = controller
        self._retry_seconds = retry_seconds
        self._then = then
        self._lock = threading.Lock()
        self._asking: Future[G] | None = None

    def send(self, call: Callable[[G], Future[T]], what: str) -> Future[T]:
        """`call(grant)` now, and again with the newest grant whenever the actor dies under it.

        `what`, for the error where no actor can be had: "request 7", for instance. The future fails
        with `Unavailable` then, when the controller is gone, or when that is the answer of an actor
        that lives.
        """
        target: Future[T] = Future()
        self._send(call, what, target, None)
        return target

    def _send(
        self, call: Callable[[G], Future[T]], what: str, target: Future[T], since: float | None
    ) -> None:
        grant = self.grant

        def settle(done: Future[T]) -> None:
            error = done.exception()
            if isinstance(error, Unavailable):
                failed = time.monotonic() if since is None else since
                found = self.successor(grant, error, what, failed)
                found.add_done_callback(lambda answer: again(answer, failed))
            else:
                forward_result(done, target)

        def again(found: Future[G], failed: float) -> None:
            error = found.exception()
            try:
                if error is not None:
                    raise error
                self._send(call, what, target, failed)
            except BaseException as failure:
                target.set_exception(failure)

        call(grant).add_done_callback(settle)

    def successor(
        self, dead: G, error: Unavailable, what: str, since: float | None = None
    ) -> Future[G]:
        """The grant of what takes the place of an actor that failed with `error` (`since`: first, in
        `time.monotonic()`). Fails as `send` does."""
        target: Future[G] = Future()
        failed = time.monotonic() if since is None else since

        def answered(answer: Future[G]) -> None:
            refused = answer.exception()
            if refused is None:
                if self._actor(answer.result()) == self._actor(dead):
                    target.set_exception(error)  # the call's own: the actor lives
                else:
                    target.set_result(answer.result())
            elif not isinstance(refused, Unavailable | StorageFailure):
                # What it served is closed meanwhile, or cannot be recovered.
                refused.__cause__ = error
                target.set_exception(error if isinstance(refused, LookupError) else refused)
            else:
                # Also where the disk is full: what died may have written down what it was told.
                pinged = self._controller.call("ping")
                pinged.add_done_callback(lambda done: ask_later(done, refused))

        def ask_later(pinged: Future[Any], refused: TinsmithError) -> None:
            if pinged.exception() is not None:
                target.set_exception(error)
            elif time.monotonic() - failed > self._retry_seconds:
                late = Unavailable(
                    f"{what}: nothing could be had in the place of what died, for "
                    f"{self._retry_seconds:.0f} s ({refused}); {self._then}"
                )
                late.__cause__ = error
                target.set_exception(late)
            else:
                later(PAUSE_SECONDS, ask)

        def ask() -> None:
            self._asked(dead).add_done_callback(answered)

        ask()
        return target

    def _asked(self, dead: G) -> Future[G]:
        """All who wait share the question."""
        with self._lock:
            if self._asking is not None:
                return self._asking
            if self._actor(self.grant) != self._actor(dead):
                return completed(self.grant)
            asking = self._asking = self._ask(self.grant)
        asking.add_done_callback(self._answered)  # which may be at once, and takes the lock
        return asking

    def _answered(self, answer: Future[G]) -> None:
        with self._lock:
            self._asking = None
            if answer.exception() is None:
                self.grant = answer.result()
