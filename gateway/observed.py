"""What the gateway tells of itself: metrics of its requests, ids for their logs, parents for their
spans; and the metrics of the whole service under `/metrics`."""

from __future__ import annotations

import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import Metric

from ..actors.gathering import merge
from ..actors.observed import Meters
from ..primitives import logs, tracing
from ..primitives.errors import InvalidInput
from ..primitives.metrics_text import metrics_text
from ..primitives.op import Op
from ..primitives.paths import SCHEME, CheckpointPath
from .core import Gateway

Message = MutableMapping[str, Any]

OPERATOR = "operator"
"""The owner whose key sees every run's metrics."""

SECONDS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0)


class GatewayWatch:
    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self.meters = Meters()
        self._requests = self.meters.counter(
            "http_requests", "HTTP requests answered.", "method", "route", "status"
        )
        self._seconds = self.meters.histogram(
            "http_request_seconds",
            "HTTP requests, from their head to their answer (polls wait for what they ask for).",
            "route",
            buckets=SECONDS,
        )
        for name, about, value in (
            ("pending_requests", "Operations and samples under way.", self._pending),
            ("pending_bytes", "Bytes of training requests that wait.", gateway.pending_bytes),
            ("sessions", "Client processes that are there.", gateway.active_sessions),
        ):
            self.meters.gauge(f"gateway_{name}", about).set_function(value)

    def _pending(self) -> float:
        return len(self.gateway.futures)

    def answered(self, scope: Message, status: int, seconds: float) -> None:
        # A path that no route has may be anything: these count as one.
        route = getattr(scope.get("route"), "path", "none")
        self._requests.labels(scope["method"], route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    async def families(self, owner: str) -> list[Metric]:
        """Of the whole service, as far as this owner may see: with keys, only the operator sees
        series of others' runs."""
        service = await Op(self.gateway.controller.call("metrics"))
        own = ({"process": "gateway", "model": ""}, self.meters.collect())
        families = merge([({}, service), own])
        if self.gateway.access.closed and owner != OPERATOR:
            rows = await self.gateway.store.all_runs()
            mine = {run_id for run_id, row in rows.items() if row.owner == owner}
            for family in families:
                family.samples = [s for s in family.samples if _visible(s.labels, mine)]
        return families


def _visible(labels: dict[str, str], mine: set[str]) -> bool:
    run = labels.get("run", "base")
    if run.startswith(SCHEME):  # what is sampled from a checkpoint
        try:
            run = CheckpointPath.parse(run).run_id
        except InvalidInput:
            return False
    return run in ("", "base") or run in mine


def metrics_route(gateway: Gateway, watch: GatewayWatch) -> APIRouter:
    router = APIRouter(tags=["metrics"])

    @router.get("/metrics", response_class=Response)
    async def metrics(request: Request) -> Response:
        families = await watch.families(gateway.access.owner(request))
        return Response(metrics_text(families), media_type=CONTENT_TYPE_LATEST)

    return router


class Watched:
    """Counts requests, gives each an id for its logs, and takes over its `traceparent`."""

    def __init__(self, app: Any, watch: GatewayWatch) -> None:
        self.app, self.watch = app, watch

    async def __call__(
        self,
        scope: Message,
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, began = 500, time.perf_counter()

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        given = next((v for n, v in scope["headers"] if n == b"traceparent"), None)
        token = tracing.incoming.set(None if given is None else given.decode("latin-1"))
        try:
            with logs.about(request=uuid.uuid4().hex[:12]):
                await self.app(scope, receive, noting)
        finally:
            tracing.incoming.reset(token)
            self.watch.answered(scope, status, time.perf_counter() - began)
