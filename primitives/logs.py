"""Structured logs: every line with the process, and the run, operation and request it is about.

`TINSMITH_LOG` is `text` (default) or `json`, a JSON object per line; `TINSMITH_LOG_LEVEL` is
`warning` (default), `info`, `debug` or `error`. Logs go to stderr.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from .errors import InvalidInput

FORMATS = ("text", "json")
LEVELS = ("debug", "info", "warning", "error")
IDS = ("run", "op", "request", "kind")

_about: ContextVar[dict[str, Any]] = ContextVar("about", default={})  # noqa: B039 (never changed)
_SECRET = re.compile(r"tml-[\w-]{8,}|sk-[\w-]{8,}|(?i:(?<=bearer )[^\s\"']+)")


@contextmanager
def about(**ids: Any) -> Iterator[None]:
    """What is logged inside, also in tasks started there, carries these ids."""
    token = _about.set({**_about.get(), **ids})
    try:
        yield
    finally:
        _about.reset(token)


def set_up(process: str) -> None:
    """Have this process's logs of Tinsmith written, as the environment says.

    Raises:
        InvalidInput: the environment names no format or no level that there is.
    """
    form = _chosen("TINSMITH_LOG", FORMATS, "text")
    level = _chosen("TINSMITH_LOG_LEVEL", LEVELS, "warning")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter((_Json if form == "json" else _Text)(process))
    logger = logging.getLogger("tinsmith")
    logger.handlers[:] = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False


def without_secrets(text: str) -> str:
    """API keys and bearer tokens left out, wherever they came from."""
    return _SECRET.sub("[secret]", text)


def _chosen(variable: str, allowed: tuple[str, ...], otherwise: str) -> str:
    value = os.environ.get(variable, "").lower() or otherwise
    if value not in allowed:
        raise InvalidInput(f"{variable} must be one of {', '.join(allowed)}, got {value!r}")
    return value


class _Json(logging.Formatter):
    def __init__(self, process: str) -> None:
        super().__init__()
        self.process = process

    def fields(self, record: logging.LogRecord) -> dict[str, Any]:
        given = {name: getattr(record, name) for name in IDS if hasattr(record, name)}
        return {**_about.get(), **given}

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": _when(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": self.process,
            "pid": record.process,
            "message": record.getMessage(),
            **self.fields(record),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return without_secrets(json.dumps(line, default=str))


class _Text(_Json):
    def format(self, record: logging.LogRecord) -> str:
        ids = "".join(f" {name}={value}" for name, value in self.fields(record).items())
        line = (
            f"{_when(record.created)} {record.levelname.lower()} {self.process}[{record.process}]: "
            f"{record.getMessage()}{ids}"
        )
        if record.exc_info:
            line += f"\n{self.formatException(record.exc_info)}"
        return without_secrets(line)


def _when(seconds: float) -> str:
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{whole}.{int(seconds % 1 * 1000):03d}Z"
