"""Answers, also where the store fails."""

from __future__ import annotations

import resource

import pytest

from tinsmith.gateway import futures as futures_module
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


async def test_a_full_disk_costs_no_answer_also_where_it_is_asked_for_again(tmp_path, monkeypatch):
    monkeypatch.setattr(futures_module, "KEEP_SECONDS", 0.01)
    store = Store(tmp_path / "a.sqlite")
    futures = Futures(store)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, limit[1]))
    try:
        assert await futures.begin("r", "me", answer)
        first = await futures.wait("r", "me", 10)
        assert first is not None
        assert await futures.wait("r", "me", 10) == first
        assert not await futures.begin("r", "me", answer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    await futures.drain()
    assert len(futures) == 0
    assert await Futures(store).wait("r", "me", 10) == first
    store.close()
