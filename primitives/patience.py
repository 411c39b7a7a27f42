"""Coming again when something is refused for now."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from .errors import Busy
from .op import forward_result
from .sync import later

T = TypeVar("T")


def patiently(send: Callable[[], Future[T]]) -> Future[T]:
    """The result of `send()`, which is called again, when it says to, as long as it raises `Busy`."""
    target: Future[T] = Future()

    def attempt() -> None:
        send().add_done_callback(settle)

    def settle(done: Future[T]) -> None:
        error = done.exception()
        if isinstance(error, Busy):
            later(error.retry_after_s, attempt)
        else:
            forward_result(done, target)

    attempt()
    return target
