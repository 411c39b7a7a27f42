"""A stream that breaks says so, and one that is left leaves what it follows."""

from __future__ import annotations

import asyncio

import httpx
import openai
import pytest
from fastapi import FastAPI

import tinsmith
from tinsmith.gateway.openai.streaming import event_stream, merged
from tinsmith.primitives.types import SampledToken


async def counting(left: list[int], number: int, end: int = 100):
    try:
        for index in range(end):
            yield SampledToken(0, index, 0.0, 0)
            await asyncio.sleep(0)
    finally:
        left.append(number)


async def test_all_streams_are_followed_at_once_and_left_together():
    left: list[int] = []
    tokens = merged([counting(left, number) for number in range(3)])
    seen = [(await anext(tokens))[0] for _ in range(9)]
    assert set(seen) == {0, 1, 2}
    await tokens.aclose()
    await asyncio.sleep(0.01)
    assert sorted(left) == [0, 1, 2]
    whole = [token async for token in merged([counting(left, 0, 2), counting(left, 1, 3)])]
    assert len(whole) == 5


async def test_an_error_on_the_way_ends_the_stream_as_openais_client_knows_it():
    app = FastAPI()

    @app.post("/v1/completions")
    async def broken():
        async def chunks():
            yield {"id": "c", "object": "text_completion", "choices": []}
            raise tinsmith.NotFound("run 'x' was closed while it sampled")

        return await event_stream(chunks())

    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        body = (await client.post("/v1/completions")).text
    first, error, done = body.strip().split("\n\n")
    assert '"choices": []' in first
    assert '"message": "run \'x\' was closed while it sampled"' in error
    assert done == "data: [DONE]"


async def test_a_stream_refused_at_once_has_a_status(alice):
    with pytest.raises(openai.BadRequestError):
        await alice.completions.create(model="tiny", prompt=[10**6], stream=True)
