"""Logs and traces of a process, as the environment asks for them.

Traces go to a file, a JSON object per line (`TINSMITH_TRACE_FILE`), or to a collector, by
OpenTelemetry's own environment variables (`OTEL_EXPORTER_OTLP_ENDPOINT`, …). A process that has
set up a tracer provider by itself keeps it.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..primitives import logs
from ..primitives.errors import Unavailable

TRACE_FILE = "TINSMITH_TRACE_FILE"
PASSED_ON = (TRACE_FILE, "TINSMITH_LOG", "TINSMITH_LOG_LEVEL")
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


def set_up(process: str, trace_file: str | Path | None = None) -> None:
    """Of a process of the service's own."""
    logs.set_up(process)
    trace(process, trace_file or os.environ.get(TRACE_FILE))


def trace(process: str, file: str | Path | None) -> None:
    """Record spans, if there is a file for them or the environment names a collector.

    Raises:
        Unavailable: OpenTelemetry's SDK or exporter is not installed.
    """
    exported = any(os.environ.get(name) for name in _ENDPOINTS)
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or not (file or exported):
        return
    try:
        from opentelemetry import trace as api
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
    except ImportError as error:
        raise Unavailable(f"traces need more packages ({error}): {INSTALL}") from None
    if not isinstance(api.get_tracer_provider(), api.ProxyTracerProvider):
        return
    about: dict[str, Any] = {"tinsmith.process": process, "process.pid": os.getpid()}
    if not os.environ.get("OTEL_SERVICE_NAME"):
        about["service.name"] = "tinsmith"
    provider = TracerProvider(resource=Resource.create(about))
    for processor in _processors(file, exported):
        provider.add_span_processor(processor)
    api.set_tracer_provider(provider)


INSTALL = "pip install 'tinsmith[tracing]'"


def _processors(file: str | Path | None, exported: bool) -> list[Any]:
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor

    processors: list[Any] = []
    if file:
        # Each span at once: a process that is killed leaves what it had finished.
        exporter: Any = TraceFile(file)
        processors.append(SimpleSpanProcessor(exporter))
    if exported:
        processors.append(BatchSpanProcessor(_otlp_exporter()))
    return processors


def _otlp_exporter() -> Any:
    name = "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"
    protocol = os.environ.get(name) or os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL")
    try:
        way = "grpc" if protocol == "grpc" else "http"
        name = f"opentelemetry.exporter.otlp.proto.{way}.trace_exporter"
        return importlib.import_module(name).OTLPSpanExporter()
    except ImportError as error:
        install = f"pip install opentelemetry-exporter-otlp-proto-{way}"
        raise Unavailable(f"exporting traces needs one more package ({error}): {install}") from None


class TraceFile:
    """A span exporter: a JSON object per span and line, whole lines of many processes in one file."""

    def __init__(self, path: str | Path) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_APPEND | os.O_CREAT | os.O_WRONLY
        self._file = os.open(path, flags, 0o600)

    def export(self, spans: Sequence[Any]) -> Any:
        from opentelemetry.sdk.trace.export import SpanExportResult

        lines = "".join(f"{json.dumps(_facts(span))}\n" for span in spans).encode()
        try:
            os.write(self._file, lines)
        except OSError:  # a full disk costs spans, and nothing else
            return SpanExportResult.FAILURE
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        os.close(self._file)

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return True


def _facts(span: Any) -> dict[str, Any]:
    context, parent = span.context, span.parent
    return {
        "name": span.name,
        "trace_id": f"{context.trace_id:032x}",
        "span_id": f"{context.span_id:016x}",
        "parent_id": None if parent is None else f"{parent.span_id:016x}",
        "start": span.start_time / 1e9,
        "end": span.end_time / 1e9,
        "process": span.resource.attributes["tinsmith.process"],
        "pid": span.resource.attributes["process.pid"],
        "attributes": dict(span.attributes),
        **(
            {}
            if span.status.is_ok or not span.status.description
            else {"error": span.status.description}
        ),
    }


def passed_on(trace_file: str | None) -> dict[str, str]:
    """What all processes of the service are to have in their environment. (What OpenTelemetry reads
    may hold secrets: it is not passed on, but set where they run.)"""
    given = {name: os.environ[name] for name in PASSED_ON if os.environ.get(name)}
    return given if trace_file is None else {**given, TRACE_FILE: trace_file}
