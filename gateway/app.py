"""The gateway's HTTP application: routes, errors, limits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from ..primitives.errors import InvalidInput, NotFound, OutOfCapacity, TinsmithError, Unavailable
from .access import Unauthorized
from .core import Busy, Gateway
from .openai import openai_router
from .policies import GatewayPolicies
from .rest_routes import rest_routes
from .sampling_routes import Lost, sampling_routes
from .session_routes import Gone, session_routes
from .training_routes import training_routes

Message = MutableMapping[str, Any]
# Clients send again what was answered with 408, 409, 429 or 5xx: none of these for a user's error.
STATUS = {
    Unauthorized: 401,
    Gone: 410,
    Lost: 410,
    Busy: 429,
    OutOfCapacity: 413,
    NotFound: 404,
    InvalidInput: 400,
    Unavailable: 503,
}


def create_app(gateway: Gateway) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        housekeeping = asyncio.create_task(gateway.keep_house())
        yield
        housekeeping.cancel()

    app = FastAPI(title="Tinsmith", lifespan=lifespan, openapi_url="/openapi.json")
    for routes in (session_routes, training_routes, sampling_routes, rest_routes):
        app.include_router(routes(gateway), prefix="/api/v1")
    app.include_router(openai_router(GatewayPolicies(gateway)))

    @app.exception_handler(TinsmithError)
    async def refused(request: Request, error: TinsmithError) -> JSONResponse:
        status = next((s for kind, s in STATUS.items() if isinstance(error, kind)), 500)
        return JSONResponse({"detail": str(error)}, status)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        if isinstance(error.body, dict):
            owner = gateway.access.owner(request)
            await gateway.skip(owner, error.body.get("model_id"), error.body.get("seq_id"))
        return JSONResponse({"detail": f"{where}: {first['msg']}"}, 422)

    app.add_middleware(BodyLimit, max_bytes=gateway.settings.max_body_bytes)
    return app


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
                raise OutOfCapacity(f"the request is larger than {self.max_bytes} bytes")
            return message

        await self.app(scope, limited, send)
