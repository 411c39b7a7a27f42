"""SQLite files on a disk that takes nothing more."""

from __future__ import annotations

import resource
import sqlite3

import pytest

from tinsmith.actors.database import Database
from tinsmith.primitives.errors import StorageFailure


def test_a_disk_that_takes_nothing_is_told_as_such_and_nothing_is_half_written(tmp_path):
    database = Database(tmp_path / "registry.sqlite")
    database.execute("CREATE TABLE things (name TEXT PRIMARY KEY)")
    database.execute("INSERT INTO things VALUES ('before')")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, limit[1]))
    try:
        with pytest.raises(StorageFailure, match=r"registry.sqlite cannot be written: disk I/O"):
            database.execute("INSERT INTO things VALUES ('refused')")
        with pytest.raises(StorageFailure, match="cannot be written"):
            database.executemany("INSERT INTO things VALUES (?)", [("refused",)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    database.execute("INSERT INTO things VALUES ('after')")
    names = [row["name"] for row in database.execute("SELECT name FROM things")]
    assert names == ["before", "after"]
    with pytest.raises(sqlite3.IntegrityError):
        database.execute("INSERT INTO things VALUES ('after')")
