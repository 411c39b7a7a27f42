"""Requests under way and their answers. A result is written to the store before anyone can see
it, so that whoever asks again, also after a restart, gets the same one. While the disk is full, it is
kept in memory."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from ..primitives.errors import (
    InvalidInput,
    NotFound,
    OpCancelled,
    OutOfCapacity,
    StorageFailure,
    TinsmithError,
)
from .store import Result, Store

log = logging.getLogger("tinsmith.gateway")

KEEP_SECONDS = 1.0  # between attempts to write a result down
USER_ERRORS = (InvalidInput, NotFound, OpCancelled, OutOfCapacity)


@dataclass(frozen=True)
class Answer:
    """What a request's work gives: a JSON object, or the bytes of a protobuf message."""

    kind: str
    body: bytes

    @classmethod
    def json(cls, value: dict[str, object]) -> Answer:
        return cls("json", json.dumps(value).encode())

    @classmethod
    def proto(cls, body: bytes) -> Answer:
        return cls("proto", body)

    @classmethod
    def error(cls, error: BaseException) -> Answer:
        category = "user" if isinstance(error, USER_ERRORS) else "server"
        message = str(error)
        if not isinstance(error, TinsmithError):
            cause = getattr(error, "cause", error)  # without a remote traceback
            message = f"{type(cause).__name__}: {cause}"
        body = {"error": message, "category": category}
        return cls("error", json.dumps(body).encode())


@dataclass(eq=False)
class _Pending:
    owner: str
    work: asyncio.Future[Answer]
    result: asyncio.Task[Result]


Listener = Callable[[str, Result], None]


class Futures:
    """
    Args:
        store: where results are kept.
        on_settled: called with every request that has its answer.
    """

    def __init__(self, store: Store, on_settled: Listener = lambda _, __: None) -> None:
        self._store = store
        self._on_settled = on_settled
        self._pending: dict[str, _Pending] = {}
        self._keeping: dict[str, asyncio.Task[None]] = {}  # results that their disk did not take

    def __len__(self) -> int:
        return len(self._pending)

    async def known(self, request_id: str) -> bool:
        """Whether it is under way, or has its answer."""
        return request_id in self._pending or await self._store.result(request_id) is not None

    async def begin(
        self, request_id: str, owner: str, work: Callable[[], Awaitable[Answer]]
    ) -> bool:
        """Start `work()`, which goes on whoever waits; False if that request was there before."""
        if await self.known(request_id):
            return False
        if request_id in self._pending:  # it came twice at once
            return False
        working = asyncio.ensure_future(work())
        result = asyncio.create_task(self._finish(request_id, owner, working))
        self._pending[request_id] = _Pending(owner, working, result)
        return True

    async def _finish(self, request_id: str, owner: str, working: asyncio.Future[Answer]) -> Result:
        try:
            answer = await working
        except asyncio.CancelledError:
            answer = Answer.error(OpCancelled("the request was cancelled"))
        except Exception as error:
            if not isinstance(error, USER_ERRORS):
                log.warning("request %s failed", request_id, exc_info=error)
            answer = Answer.error(error)
        result = Result(owner, answer.kind, answer.body)
        try:
            await self._store.add_result(request_id, result)
            self._pending.pop(request_id, None)
        except StorageFailure as error:
            log.warning("the result of request %s: %s", request_id, error)
            self._keeping[request_id] = asyncio.create_task(self._keep(request_id, result))
        except Exception:
            # Whoever waits gets it all the same; after that it cannot be asked for again.
            log.exception("the result of request %s could not be kept", request_id)
            self._pending.pop(request_id, None)
        self._on_settled(request_id, result)
        return result

    async def _keep(self, request_id: str, result: Result) -> None:
        """Until there is room for it, a result is given from here."""
        while request_id in self._pending:
            await asyncio.sleep(KEEP_SECONDS)
            with contextlib.suppress(StorageFailure):
                await self._store.add_result(request_id, result)
                self._pending.pop(request_id, None)
        del self._keeping[request_id]

    async def wait(self, request_id: str, owner: str, seconds: float) -> Result | None:
        """The answer, or None if it is not there after `seconds`.

        Raises:
            NotFound: the owner has no such request.
        """
        pending = self._pending.get(request_id)
        if pending is None:
            result = await self._store.result(request_id)
            if result is None or result.owner != owner:
                raise NotFound(f"no request {request_id!r}")
            return result
        if pending.owner != owner:
            raise NotFound(f"no request {request_id!r}")
        done, _ = await asyncio.wait((pending.result,), timeout=seconds)
        return pending.result.result() if done else None

    def settled(self, request_id: str) -> asyncio.Future[Result] | asyncio.Future[None]:
        """Done when the request has its answer, or is not under way."""
        pending = self._pending.get(request_id)
        if pending is not None:
            return pending.result
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        done.set_result(None)
        return done

    def cancel(self, request_id: str, owner: str) -> None:
        """End the work of a request that is under way; it then fails as cancelled."""
        pending = self._pending.get(request_id)
        if pending is not None and pending.owner == owner:
            pending.work.cancel()

    async def drain(self) -> None:
        """Wait until nothing is under way."""
        while self._pending:
            results = (pending.result for pending in self._pending.values())
            await asyncio.wait([*results, *self._keeping.values()])
