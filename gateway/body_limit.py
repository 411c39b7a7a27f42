"""Requests larger than the server takes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fastapi import HTTPException

Message = MutableMapping[str, Any]


class TooLarge(HTTPException):
    """HTTP 413. `part` is the part of the body that was one too many: it may be the first, which
    tells what was refused."""

    def __init__(self, max_bytes: int, part: bytes) -> None:
        super().__init__(413, f"the request is larger than {max_bytes} bytes")
        self.part = part


class BodyLimit:
    """Refuses a request whose body is larger than `max_bytes`, however it is sent."""

    def __init__(self, app: Any, max_bytes: int) -> None:
        self.app, self.max_bytes = app, max_bytes

    async def __call__(
        self,
        scope: Message,
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        left = self.max_bytes

        async def limited() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise TooLarge(self.max_bytes, message["body"])
            return message

        await self.app(scope, limited, send)
