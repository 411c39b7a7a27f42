"""`primitives.Handle` over a Ray actor: calls become futures, Ray's errors become ours."""

from __future__ import annotations

from collections.abc import AsyncIterator
from concurrent.futures import Future
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


def typed_error(error: BaseException, actor: str) -> BaseException:
    """The error of `errors.py` behind an error of Ray's; the remote traceback stays as a note."""
    if isinstance(error, RayTaskError):
        cause = error.cause
        if isinstance(cause, TinsmithError):
            return cause
        return error
    if isinstance(error, TaskCancelledError):
        return OpCancelled(f"a call to the {actor} was cancelled")
    if isinstance(error, ActorDiedError | ActorUnavailableError | RayActorError):
        return Unavailable(f"the {actor} actor is gone: {error}")
    return error


class RayHandle:
    """Submits calls to one actor. Picklable."""

    def __init__(self, actor: Any, name: str) -> None:
        self.actor = actor
        self.name = name

    def call(self, method: str, *args: Any, **kwargs: Any) -> Future[Any]:
        target: Future[Any] = Future()
        reference = getattr(self.actor, method).remote(*args, **kwargs)

        def complete(done: Future[Any]) -> None:
            error = done.exception()
            if error is not None:
                target.set_exception(typed_error(error, self.name))
            else:
                target.set_result(done.result())

        reference.future().add_done_callback(complete)
        return target

    async def stream(self, method: str, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        generator = (
            getattr(self.actor, method).options(num_returns="streaming").remote(*args, **kwargs)
        )
        finished = False
        try:
            async for reference in generator:
                yield await reference
            finished = True
        except (RayTaskError, RayActorError) as error:
            finished = True
            raise typed_error(error, self.name) from None
        finally:
            if not finished:
                ray.cancel(generator)

    def __repr__(self) -> str:
        return f"RayHandle({self.name})"
