"""`primitives.Handle` over a Ray actor: calls become futures, Ray's errors become ours."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from concurrent.futures import Future, InvalidStateError
from typing import Any

import ray
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    RayActorError,
    RayTaskError,
    TaskCancelledError,
)

from ..primitives.errors import OpCancelled, TinsmithError, Unavailable
from ..primitives.op import failed
from .notes import notes_path, was_doing

# Waiting operations are coroutines of the actor: let hundreds of clients keep hundreds each.
MAX_WAITING_CALLS = 100_000

_pending: set[Future[Any]] = set()
_END = object()


class ActorGone(Unavailable):
    """The actor's process ended, or its node is lost or cut off."""


def typed_error(error: BaseException, actor: str, was_doing: str = "") -> BaseException:
    """The error of `errors.py` behind an error of Ray's; `was_doing` is told if the actor died."""
    if isinstance(error, RayTaskError):
        cause = error.cause
        if isinstance(cause, TinsmithError):
            return cause
        return error
    if isinstance(error, TaskCancelledError):
        return OpCancelled(f"a call to the {actor} was cancelled")
    if isinstance(error, ActorDiedError | ActorUnavailableError | RayActorError):
        return ActorGone(f"the {actor} actor is gone{was_doing}: {error}")
    return error


def leave_cluster() -> None:
    """Disconnect this process, ending a cluster that it started. Calls still waiting fail."""
    _fail_pending()  # before Ray tells some of them that their actor died
    ray.shutdown()
    _fail_pending()  # submitted meanwhile: Ray would never complete them


def _fail_pending() -> None:
    while _pending:
        with contextlib.suppress(InvalidStateError):
            _pending.pop().set_exception(Unavailable("the service was closed before it answered"))


class RayHandle:
    """Submits calls to one actor. Picklable; equal to others of the same actor. `home`: where the
    actor leaves its notes."""

    def __init__(self, actor: Any, name: str, home: str | None = None) -> None:
        self.actor = actor
        self.name = name
        self.notes = None if home is None else notes_path(home, actor._actor_id.hex())

    def _error(self, error: BaseException, args: tuple[Any, ...]) -> BaseException:
        died = isinstance(error, RayActorError)
        return typed_error(error, self.name, was_doing(self.notes, _run(args)) if died else "")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RayHandle) and self.actor == other.actor

    def __hash__(self) -> int:
        return hash(self.actor)

    def call(self, method: str, *args: Any, **kwargs: Any) -> Future[Any]:
        if not ray.is_initialized():
            return failed(Unavailable(f"the service is closed: no {self.name} to call"))
        target: Future[Any] = Future()
        reference = getattr(self.actor, method).remote(*args, **kwargs)

        def complete(done: Future[Any]) -> None:
            _pending.discard(target)
            error = done.exception()
            with contextlib.suppress(InvalidStateError):  # the service was closed meanwhile
                if error is not None:
                    target.set_exception(self._error(error, args))
                else:
                    target.set_result(done.result())

        _pending.add(target)
        reference.future().add_done_callback(complete)
        return target

    async def stream(self, method: str, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        if not ray.is_initialized():
            raise Unavailable(f"the service is closed: no {self.name} to call")
        generator = (
            getattr(self.actor, method).options(num_returns="streaming").remote(*args, **kwargs)
        )
        closed: Future[Any] = Future()
        _pending.add(closed)
        leaving = asyncio.wrap_future(closed)
        following: asyncio.Task[Any] | None = None
        finished = False
        try:
            while True:
                following = asyncio.create_task(_next(generator))
                await asyncio.wait((following, leaving), return_when=asyncio.FIRST_COMPLETED)
                item = leaving.result() if leaving.done() else following.result()
                if item is _END:
                    finished = True
                    return
                yield item
        except (RayTaskError, RayActorError) as error:
            finished = True
            raise self._error(error, args) from None
        finally:
            _pending.discard(closed)
            if following is not None:
                following.cancel()
            if not finished and ray.is_initialized():
                ray.cancel(generator)

    def __repr__(self) -> str:
        return f"RayHandle({self.name})"


def _run(args: tuple[Any, ...]) -> str | None:
    """Whose call it is."""
    first = args[0] if args else None
    return (
        first if isinstance(first, str) else getattr(getattr(first, "policy", None), "run_id", None)
    )


async def _next(generator: Any) -> Any:
    reference: Any = await anext(generator, _END)
    return _END if reference is _END else await reference
