"""SQLite files whose disk may be full, read-only or broken: then that is what is said."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..primitives.errors import StorageFailure

_DISK = {
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_CANTOPEN,
}


class Database(sqlite3.Connection):
    """Every statement is durable, as far as `PRAGMA synchronous` asks for, when it returns.

    Statements raise `StorageFailure`, and change nothing, where the disk does not take it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        super().__init__(self.path, isolation_level=None, timeout=30)
        self.row_factory = sqlite3.Row
        self.execute("PRAGMA journal_mode=WAL")

    def execute(self, *args: Any) -> sqlite3.Cursor:
        with self._disk():
            return super().execute(*args)

    def executemany(self, *args: Any) -> sqlite3.Cursor:
        with self._disk():
            return super().executemany(*args)

    @contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF not in _DISK:
                raise
            raise StorageFailure(
                f"{self.path} cannot be written: {error}. Nothing was done; try again when there is "
                "room"
            ) from error
