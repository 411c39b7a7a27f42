"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from ...primitives.errors import (
    Busy,
    InvalidInput,
    NotFound,
    OutOfCapacity,
    TinsmithError,
    Unavailable,
)
from ..back_pressure import retry_headers


class InvalidRequest(InvalidInput):
    """`InvalidInput` that names the parameter, and may have a code that clients know."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.code = param, code


_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
_KINDS: list[tuple[type[TinsmithError], int, str | None]] = [
    (NotFound, 404, "not_found"),
    (OutOfCapacity, 429, "out_of_capacity"),
    (Busy, 429, "rate_limit_exceeded"),
    (Unavailable, 503, "unavailable"),
    (InvalidInput, 400, None),
    (TinsmithError, 500, None),
]


def error_body(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def describe(error: TinsmithError) -> tuple[int, dict[str, Any]]:
    """The HTTP status and body of an error of ours."""
    status, code = next((s, c) for kind, s, c in _KINDS if isinstance(error, kind))
    param = getattr(error, "param", None)
    return status, error_body(status, str(error), param, getattr(error, "code", None) or code)


class OpenAIRoute(APIRoute):
    """A route whose errors have OpenAI's shape, whatever the application around it does."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            try:
                return await handle(request)
            except TinsmithError as error:
                status, body = describe(error)
                # What can never fit is not worth the retries that clients give a 429.
                never = {"x-should-retry": "false"} if isinstance(error, OutOfCapacity) else None
                return JSONResponse(body, status, never or retry_headers(error))
            except RequestValidationError as error:
                return JSONResponse(error_body(400, *_first_problem(error)), 400)
            except HTTPException as error:
                body = error_body(error.status_code, str(error.detail))
                return JSONResponse(body, error.status_code, error.headers)

        return guarded


def _first_problem(error: RequestValidationError) -> tuple[str, str | None]:
    """Its message and the parameter."""
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"][1:])
    message = problem["msg"]
    return (f"{where}: {message}", where) if where else (message, None)
