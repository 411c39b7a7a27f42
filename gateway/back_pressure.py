"""When a client that was refused for now should come again."""

from __future__ import annotations

import math

from ..primitives.errors import Busy

MAX_S = 60  # clients ignore what is longer


def retry_headers(error: Exception) -> dict[str, str] | None:
    """Of the answer to what `error` refused."""
    if not isinstance(error, Busy):
        return None
    return {"retry-after": str(max(1, min(math.ceil(error.retry_after_s), MAX_S)))}
