"""Server-sent events, and several sample streams as one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from ...primitives.errors import TinsmithError
from ...primitives.types import SampledToken
from .errors import describe


async def merged(
    streams: Sequence[AsyncIterator[SampledToken]],
) -> AsyncIterator[tuple[int, SampledToken]]:
    """The tokens of all streams as they come, with the stream's index. Leaving leaves them all."""
    arrived: asyncio.Queue[tuple[int, SampledToken | BaseException | None]] = asyncio.Queue()

    async def follow(index: int, stream: AsyncIterator[SampledToken]) -> None:
        try:
            async for token in stream:
                arrived.put_nowait((index, token))
            arrived.put_nowait((index, None))
        except Exception as error:
            arrived.put_nowait((index, error))

    # Tasks of their own: they end in their own time whatever cancels the request's task.
    followers = [asyncio.create_task(follow(i, stream)) for i, stream in enumerate(streams)]
    try:
        running = len(followers)
        while running:
            index, item = await arrived.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                running -= 1
            else:
                yield index, item
    finally:
        for follower in followers:
            follower.cancel()


async def event_stream(chunks: AsyncGenerator[dict[str, Any]]) -> EventStream:
    """The response that sends `chunks`. The first is awaited here, so that a request that is
    refused gets a status of its own."""
    return EventStream(await anext(chunks), chunks)


class EventStream(StreamingResponse):
    """Chunks as server-sent events. When the client leaves, they are closed at once."""

    def __init__(self, first: dict[str, Any], rest: AsyncGenerator[dict[str, Any]]) -> None:
        self.rest = rest
        super().__init__(
            _events(first, rest),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.rest.aclose()


async def _events(first: dict[str, Any], rest: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    yield _event(first)
    try:
        async for chunk in rest:
            yield _event(chunk)
    except TinsmithError as error:
        yield _event(describe(error)[1])
    yield "data: [DONE]\n\n"


def _event(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk)}\n\n"
