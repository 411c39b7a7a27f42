"""Requests under way by name, so that another call can end one."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..primitives.errors import OpCancelled


class Withdrawable:
    """A part of an actor that samples."""

    def __init__(self) -> None:
        self._named: dict[str | None, asyncio.Task[Any]] = {}

    @contextmanager
    def under_way(self, name: str | None) -> Iterator[None]:
        """What is done here can be withdrawn by its name, unique among those under way; it then
        raises `OpCancelled`."""
        task = asyncio.current_task()
        if name is not None and task is not None:
            self._named[name] = task
        try:
            yield
        except asyncio.CancelledError:
            raise OpCancelled("the sampling request was withdrawn") from None
        finally:
            self._named.pop(name, None)

    async def withdraw(self, name: str) -> bool:
        """End the request of that name; it raises `OpCancelled`. False if it is not under way."""
        task = self._named.get(name)
        if task is None:
            return False
        task.cancel()
        return True
