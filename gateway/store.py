"""What a gateway must still know after a restart, in `registry.sqlite` beside the runs and
checkpoints: sessions, who owns what, finished results, recorded sequences.

One thread owns the connection; every method is a coroutine.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from ..actors.database import Database

T = TypeVar("T")

SCHEMA = """
CREATE TABLE IF NOT EXISTS sessions (
    session_id TEXT PRIMARY KEY, owner TEXT NOT NULL, created REAL NOT NULL,
    status TEXT NOT NULL, detail TEXT, display_name TEXT, user_metadata TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS session_runs (
    run_id TEXT PRIMARY KEY, session_id TEXT NOT NULL, owner TEXT NOT NULL,
    base_model TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS session_runs_owner ON session_runs(owner);
CREATE TABLE IF NOT EXISTS samplers (
    sampler_id TEXT PRIMARY KEY, session_id TEXT NOT NULL, owner TEXT NOT NULL,
    base_model TEXT NOT NULL, model_path TEXT, run_id TEXT, version INTEGER,
    clients INTEGER NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS results (
    request_id TEXT PRIMARY KEY, owner TEXT NOT NULL, kind TEXT NOT NULL, body BLOB NOT NULL,
    finished REAL NOT NULL);
CREATE INDEX IF NOT EXISTS results_finished ON results(finished);
CREATE TABLE IF NOT EXISTS sequences (
    sequence_id TEXT PRIMARY KEY, session_id TEXT NOT NULL, record BLOB NOT NULL,
    used REAL NOT NULL);
CREATE INDEX IF NOT EXISTS sequences_used ON sequences(used);
"""


@dataclass(frozen=True)
class SessionRow:
    """`status` is `active`, `expired`, or how its client said that it finished."""

    session_id: str
    owner: str
    created: float
    status: str = "active"
    detail: str | None = None
    display_name: str | None = None
    user_metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RunRow:
    """`base_model` is the name that the client used."""

    run_id: str
    session_id: str
    owner: str
    base_model: str


@dataclass(frozen=True)
class SamplerRow:
    """Samples from a base model, a checkpoint (`model_path`), or what a run published
    (`version=None`: always the newest)."""

    sampler_id: str
    session_id: str
    owner: str
    base_model: str
    model_path: str | None = None
    run_id: str | None = None
    version: int | None = None
    clients: int = 0


@dataclass(frozen=True)
class Result:
    """A finished request's answer: `kind` is `json`, `proto` or `error`."""

    owner: str
    kind: str
    body: bytes


class Store:
    def __init__(self, path: str | Path) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="gateway-store")
        self._thread.submit(self._open, str(path)).result()

    def _open(self, path: str) -> None:
        self._db = Database(path)
        # A commit reaches the operating system, which survives this process's death; waiting for the
        # disk as well would cost every operation milliseconds.
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.executescript(SCHEMA)

    async def _do(self, function: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)

    async def _write(self, sql: str, *values: Any) -> None:
        await self._do(self._db.execute, sql, values)

    async def _one(self, sql: str, *values: Any) -> sqlite3.Row | None:
        return await self._do(lambda: self._db.execute(sql, values).fetchone())

    async def _all(self, sql: str, *values: Any) -> list[sqlite3.Row]:
        return await self._do(lambda: self._db.execute(sql, values).fetchall())

    def close(self) -> None:
        self._thread.submit(self._db.close).result()
        self._thread.shutdown()

    # ---- sessions ----

    async def add_session(self, row: SessionRow) -> None:
        await self._write(
            "INSERT INTO sessions VALUES (?, ?, ?, ?, ?, ?, ?)",
            row.session_id,
            row.owner,
            row.created,
            row.status,
            row.detail,
            row.display_name,
            json.dumps(row.user_metadata),
        )

    async def end_session(self, session_id: str, status: str, detail: str | None) -> None:
        """The first reason stays."""
        await self._write(
            "UPDATE sessions SET status=?, detail=? WHERE session_id=? AND status='active'",
            status,
            detail,
            session_id,
        )

    async def session(self, session_id: str) -> SessionRow | None:
        row = await self._one("SELECT * FROM sessions WHERE session_id=?", session_id)
        return None if row is None else _session(row)

    async def sessions(self, owner: str) -> list[SessionRow]:
        """Newest first."""
        sql = "SELECT * FROM sessions WHERE owner=? ORDER BY created DESC, rowid DESC"
        return [_session(row) for row in await self._all(sql, owner)]

    async def active_sessions(self) -> list[SessionRow]:
        rows = await self._all("SELECT * FROM sessions WHERE status='active'")
        return [_session(row) for row in rows]

    # ---- runs and samplers ----

    async def add_run(self, row: RunRow) -> None:
        await self._write(
            "INSERT OR IGNORE INTO session_runs VALUES (?, ?, ?, ?)",
            row.run_id,
            row.session_id,
            row.owner,
            row.base_model,
        )

    async def run(self, run_id: str) -> RunRow | None:
        row = await self._one("SELECT * FROM session_runs WHERE run_id=?", run_id)
        return None if row is None else RunRow(**dict(row))

    async def runs(self, owner: str, session_id: str | None = None) -> list[RunRow]:
        sql = "SELECT * FROM session_runs WHERE owner=?1 AND (?2 IS NULL OR session_id=?2)"
        return [RunRow(**dict(row)) for row in await self._all(sql, owner, session_id)]

    async def all_runs(self) -> dict[str, RunRow]:
        rows = await self._all("SELECT * FROM session_runs")
        return {row["run_id"]: RunRow(**dict(row)) for row in rows}

    async def add_sampler(self, row: SamplerRow) -> None:
        await self._write(
            "INSERT OR IGNORE INTO samplers VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            row.sampler_id,
            row.session_id,
            row.owner,
            row.base_model,
            row.model_path,
            row.run_id,
            row.version,
            row.clients,
        )

    async def sampler(self, sampler_id: str) -> SamplerRow | None:
        row = await self._one("SELECT * FROM samplers WHERE sampler_id=?", sampler_id)
        return None if row is None else SamplerRow(**dict(row))

    async def samplers(self, session_id: str) -> list[SamplerRow]:
        rows = await self._all("SELECT * FROM samplers WHERE session_id=?", session_id)
        return [SamplerRow(**dict(row)) for row in rows]

    async def next_client(self, sampler: SamplerRow) -> SamplerRow:
        """The sampler with one client more."""
        row = await self._one(
            "UPDATE samplers SET clients=clients+1 WHERE sampler_id=? RETURNING clients",
            sampler.sampler_id,
        )
        assert row is not None
        return replace(sampler, clients=row["clients"])

    # ---- results ----

    async def add_result(self, request_id: str, result: Result) -> None:
        await self._write(
            "INSERT OR REPLACE INTO results VALUES (?, ?, ?, ?, ?)",
            request_id,
            result.owner,
            result.kind,
            result.body,
            time.time(),
        )

    async def result(self, request_id: str) -> Result | None:
        row = await self._one(
            "SELECT owner, kind, body FROM results WHERE request_id=?", request_id
        )
        return None if row is None else Result(**dict(row))

    async def forget_results(self, before: float, max_bytes: int) -> None:
        """Those of before a time, and the older half where all take more than `max_bytes`."""
        await self._write("DELETE FROM results WHERE finished < ?", before)
        row = await self._one("SELECT SUM(LENGTH(body)) AS bytes, COUNT(*) AS count FROM results")
        assert row is not None
        if (row["bytes"] or 0) > max_bytes:
            await self._write(
                "DELETE FROM results WHERE request_id IN "
                "(SELECT request_id FROM results ORDER BY finished LIMIT ?)",
                (row["count"] + 1) // 2,
            )

    async def drop_results(self, owner: str, request_ids: Sequence[str]) -> None:
        rows = [(name, owner) for name in request_ids]

        def delete() -> None:
            self._db.executemany("DELETE FROM results WHERE request_id=? AND owner=?", rows)

        await self._do(delete)

    # ---- recorded sequences ----

    async def add_sequences(self, session_id: str, records: Mapping[str, bytes]) -> None:
        now = time.time()
        rows = [(name, session_id, record, now) for name, record in records.items()]

        def insert() -> None:
            self._db.executemany("INSERT OR REPLACE INTO sequences VALUES (?, ?, ?, ?)", rows)

        await self._do(insert)

    async def use_sequences(self, session_id: str, names: Sequence[str]) -> dict[str, bytes]:
        """The records of a session's sequences that are still there; their life starts anew."""

        def take() -> dict[str, bytes]:
            found = {}
            for name in names:
                row = self._db.execute(
                    "UPDATE sequences SET used=? WHERE sequence_id=? AND session_id=? "
                    "RETURNING record",
                    (time.time(), name, session_id),
                ).fetchone()
                if row is not None:
                    found[name] = row["record"]
            return found

        return await self._do(take)

    async def forget_sequences(self, before: float) -> None:
        await self._write("DELETE FROM sequences WHERE used < ?", before)


def _session(row: sqlite3.Row) -> SessionRow:
    fields = dict(row)
    fields["user_metadata"] = json.loads(fields["user_metadata"])
    return SessionRow(**fields)
