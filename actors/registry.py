"""What exists: runs and checkpoints, in one SQLite file below `TINSMITH_HOME`."""

from __future__ import annotations

import itertools
import json
import sqlite3
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..primitives.errors import NotFound
from ..primitives.types import Checkpoint, Crash, Interrupted, LoraConfig, TrainingRun
from .database import Database

SCHEMA = """
CREATE TABLE IF NOT EXISTS runs (
    run_id TEXT PRIMARY KEY, base_model TEXT NOT NULL, lora TEXT NOT NULL,
    user_metadata TEXT NOT NULL, created REAL NOT NULL, last_request REAL NOT NULL,
    creation TEXT);
CREATE TABLE IF NOT EXISTS checkpoints (
    path TEXT PRIMARY KEY, run_id TEXT NOT NULL REFERENCES runs(run_id) ON DELETE CASCADE,
    kind TEXT NOT NULL, name TEXT NOT NULL, version INTEGER NOT NULL, created REAL NOT NULL,
    size_bytes INTEGER NOT NULL, user_metadata TEXT NOT NULL,
    expires REAL, public INTEGER NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS crashes (
    time REAL NOT NULL, process TEXT NOT NULL, pid INTEGER NOT NULL, host TEXT NOT NULL,
    reason TEXT NOT NULL, under_way TEXT NOT NULL);
"""
CRASHES_KEPT = 1000
# What came after the first version; added to the files that it wrote.
ADDED = {
    ("checkpoints", "expires"): "REAL",
    ("checkpoints", "public"): "INTEGER NOT NULL DEFAULT 0",
    ("runs", "creation"): "TEXT",
}


class Registry:
    def __init__(self, path: str | Path) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self.db = Database(path)
        self.db.execute("PRAGMA foreign_keys=ON")
        self.db.executescript(SCHEMA)
        self._add_columns()

    def _add_columns(self) -> None:
        if self._missing_columns():
            self.db.execute(
                "BEGIN IMMEDIATE"
            )  # and look again: another process may have added them
            for table, name in self._missing_columns():
                self.db.execute(f"ALTER TABLE {table} ADD COLUMN {name} {ADDED[table, name]}")
            self.db.execute("COMMIT")

    def _missing_columns(self) -> list[tuple[str, str]]:
        there = {
            (table, row["name"])
            for table in ("runs", "checkpoints")
            for row in self.db.execute(f"PRAGMA table_info({table})")
        }
        return [column for column in ADDED if column not in there]

    def add_run(self, run: TrainingRun, creation: str | None = None) -> None:
        """`creation` names the call that made it."""
        self.db.execute(
            "INSERT INTO runs VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                run.run_id,
                run.base_model,
                json.dumps(asdict(run.lora)),
                json.dumps(run.user_metadata),
                run.created,
                run.last_request,
                creation,
            ),
        )

    def touch_run(self, run_id: str) -> None:
        self.db.execute("UPDATE runs SET last_request=? WHERE run_id=?", (time.time(), run_id))

    def run(self, run_id: str) -> TrainingRun:
        row = self.db.execute("SELECT * FROM runs WHERE run_id=?", (run_id,)).fetchone()
        if row is None:
            raise NotFound(f"no run {run_id!r}; list_training_runs() shows those there are")
        return _run(row)

    def has_run(self, run_id: str) -> bool:
        return (
            self.db.execute("SELECT 1 FROM runs WHERE run_id=?", (run_id,)).fetchone() is not None
        )

    def made_by(self, run_id: str, creation: str) -> bool:
        """Whether there is that run, made by that call."""
        found = self.db.execute("SELECT creation FROM runs WHERE run_id=?", (run_id,)).fetchone()
        return found is not None and found["creation"] == creation

    def runs(self) -> list[TrainingRun]:
        return [_run(r) for r in self.db.execute("SELECT * FROM runs ORDER BY created DESC")]

    def count_runs(self) -> int:
        return self.db.execute("SELECT count(*) FROM runs").fetchone()[0]

    def delete_run(self, run_id: str) -> None:
        self.run(run_id)
        self.db.execute("DELETE FROM runs WHERE run_id=?", (run_id,))

    # Checkpoints past their time are no longer there for anyone but `expired_checkpoints`.

    def add_checkpoint(self, checkpoint: Checkpoint) -> None:
        row: dict[str, Any] = asdict(checkpoint)
        row["user_metadata"] = json.dumps(checkpoint.user_metadata)
        names, values = ", ".join(row), ", ".join(f":{name}" for name in row)
        self.db.execute(f"INSERT OR REPLACE INTO checkpoints ({names}) VALUES ({values})", row)

    def checkpoint(self, path: str) -> Checkpoint:
        row = self.db.execute(
            "SELECT * FROM checkpoints WHERE path=? AND (expires IS NULL OR expires > ?)",
            (path, time.time()),
        ).fetchone()
        if row is None:
            raise NotFound(f"no checkpoint {path!r}; list_checkpoints() shows those there are")
        return _checkpoint(row)

    def checkpoints(self, run_id: str | None = None, kind: str | None = None) -> list[Checkpoint]:
        rows = self.db.execute(
            "SELECT * FROM checkpoints WHERE (?1 IS NULL OR run_id=?1) AND (?2 IS NULL OR kind=?2)"
            " AND (expires IS NULL OR expires > ?3) ORDER BY created DESC, rowid DESC",
            (run_id, kind, time.time()),
        )
        return [_checkpoint(row) for row in rows]

    def expired_checkpoints(self) -> list[Checkpoint]:
        """Those that are to be deleted."""
        rows = self.db.execute("SELECT * FROM checkpoints WHERE expires <= ?", (time.time(),))
        return [_checkpoint(row) for row in rows]

    def set_expires(self, path: str, expires: float | None) -> None:
        self.checkpoint(path)
        self.db.execute("UPDATE checkpoints SET expires=? WHERE path=?", (expires, path))

    def set_public(self, path: str, public: bool) -> None:
        self.checkpoint(path)
        self.db.execute("UPDATE checkpoints SET public=? WHERE path=?", (public, path))

    def delete_checkpoint(self, path: str) -> None:
        self.db.execute("DELETE FROM checkpoints WHERE path=?", (path,))

    # Crashes: the newest are kept.

    def add_crash(self, crash: Crash) -> None:
        row = asdict(crash) | {"under_way": json.dumps([asdict(i) for i in crash.under_way])}
        names, values = ", ".join(row), ", ".join(f":{name}" for name in row)
        self.db.execute(f"INSERT INTO crashes ({names}) VALUES ({values})", row)
        self.db.execute(
            "DELETE FROM crashes WHERE rowid <= (SELECT max(rowid) FROM crashes) - ?",
            (CRASHES_KEPT,),
        )

    def crashes(self, run_id: str | None = None, last: int = CRASHES_KEPT) -> list[Crash]:
        """Newest first; with `run_id`, those under an operation of that run."""
        rows = self.db.execute("SELECT * FROM crashes ORDER BY rowid DESC")
        found = (_crash(row) for row in rows)
        wanted = (c for c in found if run_id is None or any(i.run == run_id for i in c.under_way))
        return list(itertools.islice(wanted, last))


def _run(row: sqlite3.Row) -> TrainingRun:
    fields = dict(row)
    del fields["creation"]
    fields["lora"] = LoraConfig(**json.loads(fields["lora"]))
    fields["user_metadata"] = json.loads(fields["user_metadata"])
    return TrainingRun(**fields)


def _crash(row: sqlite3.Row) -> Crash:
    fields = dict(row)
    fields["under_way"] = [Interrupted(**each) for each in json.loads(fields["under_way"])]
    return Crash(**fields)


def _checkpoint(row: sqlite3.Row) -> Checkpoint:
    fields = dict(row)
    fields["user_metadata"] = json.loads(fields["user_metadata"])
    fields["public"] = bool(fields["public"])
    return Checkpoint(**fields)
