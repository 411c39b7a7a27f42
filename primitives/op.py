"""`Op`: an operation that was submitted when it was called, and can be awaited when it matters."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Generator
from concurrent.futures import Future
from typing import Any, Generic, Protocol, TypeVar

T = TypeVar("T")
U = TypeVar("U")


class Handle(Protocol):
    """The way to an actor. `call` submits at once, in order, and never blocks.

    The futures fail with the typed errors of `errors.py`.
    """

    def call(self, method: str, *args: Any, **kwargs: Any) -> Future[Any]: ...

    def stream(self, method: str, *args: Any, **kwargs: Any) -> AsyncIterator[Any]: ...


class Op(Generic[T]):
    """An operation under way: `await op` for its result, or `op.result()` where nothing runs an
    event loop.

    Cancelling an await leaves the operation to finish; `cancel()` withdraws it if it has not
    started. An `Op` may be awaited any number of times, from any event loop.
    """

    def __init__(
        self, future: Future[T], withdraw: Callable[[], Future[bool]] | None = None
    ) -> None:
        self.future = future
        self._withdraw = withdraw

    def __await__(self) -> Generator[Any, None, T]:
        waiter = asyncio.wrap_future(self.future)
        # An error that a cancelled await did not stay for is no unhandled one.
        waiter.add_done_callback(lambda done: done.cancelled() or done.exception())
        # Shielded: a cancelled await must not cancel the operation behind it.
        return asyncio.shield(waiter).__await__()

    def result(self, timeout: float | None = None) -> T:
        """Block until the result is there. `timeout` in seconds raises `TimeoutError`."""
        return self.future.result(timeout)

    def done(self) -> bool:
        return self.future.done()

    def cancel(self) -> Op[bool]:
        """Withdraw the operation; the op returned tells whether it had not started yet.

        A withdrawn operation raises `OpCancelled` where it is awaited.
        """
        if self._withdraw is None:
            return Op(completed(False))
        return Op(self._withdraw())

    def then(self, convert: Callable[[T], U]) -> Op[U]:
        """The same operation with `convert` applied to its result."""
        return Op(chain(self.future, lambda value: completed(convert(value))), self._withdraw)


def completed(value: T) -> Future[T]:
    future: Future[T] = Future()
    future.set_result(value)
    return future


def failed(error: BaseException) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_exception(error)
    return future


def forward_result(source: Future[T], target: Future[T]) -> None:
    """Complete `target` as `source` completes."""

    def copy(done: Future[T]) -> None:
        error = done.exception()
        if error is not None:
            target.set_exception(error)
        else:
            target.set_result(done.result())

    source.add_done_callback(copy)


def chain(first: Future[T], then: Callable[[T], Future[U]]) -> Future[U]:
    """The future of `then(result of first)`; submits the second as soon as the first is there."""
    target: Future[U] = Future()

    def start(done: Future[T]) -> None:
        try:
            second = then(done.result())
        except BaseException as error:
            target.set_exception(error)
        else:
            forward_result(second, target)

    first.add_done_callback(start)
    return target
