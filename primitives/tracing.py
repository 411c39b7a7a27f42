"""Spans of an operation on its way through the processes, by OpenTelemetry's API where it is in use.

A process records spans if it has a tracer provider: its own, or the one that `connect(trace_file=…)`
or OpenTelemetry's environment variables give it (`actors/telemetry.py`). Otherwise nothing is
imported, and every span is `NOTHING`. Between processes a span goes as a W3C `traceparent`.
"""

from __future__ import annotations

import sys
import time
from concurrent.futures import Future
from contextvars import ContextVar
from typing import Any

incoming: ContextVar[str | None] = ContextVar("traceparent", default=None)
"""The `traceparent` of the request being served; parent of what is started for it."""


class Span:
    """A part of an operation; `traceparent` is what its children are told (None: not recorded)."""

    def __init__(self, span: Any = None) -> None:
        self._span = span
        self.traceparent = None if span is None else _traceparent(span)

    def set(self, **attributes: Any) -> None:
        if self._span is not None:
            self._span.set_attributes(_named(attributes))

    def end(self, error: BaseException | None = None) -> None:
        if self._span is not None:
            if error is not None:
                from opentelemetry.trace import Status, StatusCode

                told = f"{type(error).__name__}: {error}"
                self._span.set_status(Status(StatusCode.ERROR, told))
            self._span.end()

    def __enter__(self) -> Span:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        self.end(error)

    def end_with(self, future: Future[Any]) -> None:
        """End when the future is done, and as it ended."""
        if self._span is not None:
            future.add_done_callback(self._done)

    def _done(self, future: Any) -> None:
        self.end(TimeoutError("cancelled") if future.cancelled() else future.exception())


NOTHING = Span()


def start(name: str, parent: str | None = None, **attributes: Any) -> Span:
    """Begin a span: child of `parent`, else of the request being served, else of the caller's
    current span, else the first of a trace."""
    tracer = _tracer()
    if tracer is None:
        return NOTHING
    context = _context(parent or incoming.get())
    return Span(tracer.start_span(name, context, attributes=_named(attributes)))


def record(
    name: str, parent: str | None, began: float, ended: float, **attributes: Any
) -> str | None:
    """A span that is over, by its times of `time.perf_counter()`; returns its traceparent."""
    tracer = _tracer()
    if tracer is None or parent is None:
        return None
    offset = time.time_ns() - time.perf_counter_ns()
    named = _named(attributes)
    span = tracer.start_span(
        name, _context(parent), attributes=named, start_time=offset + int(began * 1e9)
    )
    span.end(offset + int(ended * 1e9))
    return _traceparent(span)


def _tracer() -> Any:
    api = sys.modules.get("opentelemetry.trace")
    if api is None:
        return None
    provider = api.get_tracer_provider()
    return (
        None if isinstance(provider, api.ProxyTracerProvider) else provider.get_tracer("tinsmith")
    )


def _context(traceparent: str | None) -> Any:
    if traceparent is None:
        return None
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract({"traceparent": traceparent})


def _traceparent(span: Any) -> str | None:
    context = span.get_span_context()
    if not context.is_valid:
        return None
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


def _named(attributes: dict[str, Any]) -> dict[str, Any]:
    return {f"tinsmith.{name}": value for name, value in attributes.items() if value is not None}
