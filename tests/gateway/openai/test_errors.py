"""Whatever is sent, the answer is typed and has OpenAI's shape."""

from __future__ import annotations

import httpx
import openai
import pytest


async def test_models_are_listed_and_found_by_name(alice):
    names = [model.id async for model in await alice.models.list()]
    assert names == ["tiny", "tinker://bare/sampler_weights/1", "caller"]
    for name in names:
        found = await alice.models.retrieve(name)
        assert (found.id, found.object, found.owned_by) == (name, "model", "tinsmith")
    with pytest.raises(openai.NotFoundError, match="no model 'nonesuch'"):
        await alice.models.retrieve("nonesuch")


async def test_an_unknown_model_is_not_found(alice):
    with pytest.raises(openai.NotFoundError) as error:
        await alice.completions.create(model="nonesuch", prompt="x")
    assert error.value.code == "not_found"


async def test_a_prompt_too_long_has_the_code_that_frameworks_look_for(alice):
    with pytest.raises(openai.BadRequestError, match="maximum context length of 512") as error:
        await alice.completions.create(model="tiny", prompt="x" * 2000)
    assert error.value.code == "context_length_exceeded"


async def test_what_can_never_fit_is_not_retried(url):
    async with openai.AsyncOpenAI(base_url=url, api_key="key-alice", max_retries=5) as client:
        with pytest.raises(openai.RateLimitError, match="need"):
            await client.completions.create(model="tiny", prompt="x", n=128, max_tokens=500)


async def test_a_wrong_key_comes_before_everything_else(url):
    async with openai.AsyncOpenAI(base_url=url, api_key="wrong") as client:
        for call in (
            client.models.list(),
            client.models.retrieve("tiny"),
            client.completions.create(model="nonesuch", prompt=[]),
            client.chat.completions.create(model="tiny", messages=[]),
            client.get("/trajectories", cast_to=object),
        ):
            with pytest.raises(openai.AuthenticationError, match="wrong API key"):
                await call


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"model": 1, "prompt": "x"}',
        b'{"model": "tiny", "prompt": "\\ud800"}',
        b'{"model": "tiny", "prompt": "x", "temperature": NaN}',
        b'{"model": "tiny", "prompt": "x", "temperature": 1e999}',
        b'{"model": "tiny", "prompt": "x", "stop": "\\ud800"}',
        b'{"model": "tiny", "prompt": "x", "max_tokens": 1' + b"0" * 4000 + b"}",
    ],
    ids=lambda body: repr(body[:50]),
)
async def test_a_body_that_is_no_request_is_a_bad_one(url, body):
    headers = {"Authorization": "Bearer key-alice", "Content-Type": "application/json"}
    async with httpx.AsyncClient() as client:
        for path in ("completions", "chat/completions"):
            got = await client.post(f"{url}/{path}", content=body, headers=headers)
            assert got.status_code == 400, got.text
            assert set(got.json()["error"]) == {"message", "type", "param", "code"}


async def test_text_that_is_no_unicode_is_a_bad_request_wherever_it_stands(url):
    headers = {"Authorization": "Bearer key-alice", "Content-Type": "application/json"}
    bodies = [
        b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "caller", "messages": [{"role": "user", "content": "x"}],'
        b' "tools": [{"type": "function", "function": {"name": "f", "x": "\\ud800"}}]}',
        b'{"model": "caller", "messages": [{"role": "assistant", "tool_calls": '
        b'[{"function": {"name": "f", "arguments": "{\\"\\\\ud800\\": 1}"}}]}]}',
    ]
    async with httpx.AsyncClient() as client:
        for body in bodies:
            got = await client.post(f"{url}/chat/completions", content=body, headers=headers)
            assert got.status_code == 400, got.text
