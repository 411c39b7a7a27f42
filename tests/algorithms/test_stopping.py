"""Work beside a loop: one piece at a time, its errors told, and never left behind."""

from __future__ import annotations

import asyncio

import pytest

from tinsmith.algorithms.stopping import Meanwhile


async def test_pieces_come_one_after_the_other_while_the_loop_goes_on():
    told: list[str] = []

    async def piece(name: str) -> None:
        told.append(f"{name} begins")
        for _ in range(3):
            await asyncio.sleep(0)
        told.append(f"{name} ends")

    async with Meanwhile() as meanwhile:
        await meanwhile.start(piece("a"))
        told.append("the loop goes on")
        await meanwhile.start(piece("b"))
        await meanwhile.finish()
    assert told == ["the loop goes on", "a begins", "a ends", "b begins", "b ends"]


async def test_an_error_is_told_when_the_next_piece_is_due():
    async def broken() -> None:
        raise ValueError("it broke")

    async with Meanwhile() as meanwhile:
        await meanwhile.start(broken())
        with pytest.raises(ValueError, match="it broke"):
            await meanwhile.start(asyncio.sleep(0))


async def test_leaving_ends_what_is_under_way():
    ended = asyncio.Event()

    async def forever() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with Meanwhile() as meanwhile:
        await meanwhile.start(forever())
        await asyncio.sleep(0)
    assert ended.is_set()
