"""The gateway's HTTP application: routes, errors, limits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from ..primitives.errors import (
    Busy,
    InvalidInput,
    NotFound,
    OutOfCapacity,
    StorageFailure,
    TinsmithError,
    Unavailable,
)
from .access import Unauthorized
from .back_pressure import retry_headers
from .body_limit import BodyLimit
from .core import Gateway
from .observed import GatewayWatch, Watched, metrics_route
from .openai import openai_router
from .policies import GatewayPolicies
from .rest_routes import rest_routes
from .sampling_routes import Lost, sampling_routes
from .session_routes import Gone, session_routes
from .training_routes import training_routes

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
    StorageFailure: 507,
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
    watch = GatewayWatch(gateway)
    app.include_router(metrics_route(gateway, watch))

    @app.exception_handler(TinsmithError)
    async def refused(request: Request, error: TinsmithError) -> JSONResponse:
        status = next((s for kind, s in STATUS.items() if isinstance(error, kind)), 500)
        return JSONResponse({"detail": str(error)}, status, retry_headers(error))

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        if isinstance(error.body, dict):
            try:
                owner = gateway.access.owner(request)
            except Unauthorized as unknown:
                return await refused(request, unknown)
            await gateway.skip(owner, error.body.get("model_id"), error.body.get("seq_id"))
        return JSONResponse({"detail": f"{where}: {first['msg']}"}, 422)

    app.add_middleware(BodyLimit, max_bytes=gateway.settings.max_body_bytes)
    app.add_middleware(Watched, watch=watch)
    return app
