"""Answers, also where the store fails."""

from __future__ import annotations

import sqlite3

import pytest

from tinsmith.gateway.futures import Answer, Futures
from tinsmith.gateway.store import Store
from tinsmith.primitives.errors import NotFound


async def answer() -> Answer:
    return Answer.json({"x": 1})


async def test_an_answer_outlives_the_process(tmp_path):
    store = Store(tmp_path / "a.sqlite")
    futures = Futures(store)
    assert await futures.begin("r", "me", answer)
    first = await futures.wait("r", "me", 10)
    store.close()
    again = Futures(Store(tmp_path / "a.sqlite"))
    assert await again.wait("r", "me", 10) == first
    assert not await again.begin("r", "me", answer)
    with pytest.raises(NotFound):
        await again.wait("r", "somebody else", 10)


async def test_a_full_disk_costs_no_answer_under_way(tmp_path, monkeypatch):
    store = Store(tmp_path / "a.sqlite")
    futures = Futures(store)

    async def full(*_):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(store, "add_result", full)
    assert await futures.begin("r", "me", answer)
    result = await futures.wait("r", "me", 10)
    assert result is not None
    assert result.kind == "json"
    await futures.drain()
    assert len(futures) == 0
