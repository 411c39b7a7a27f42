"""`/v1/chat/completions`: the template's prompt, the native tokens, tools there and back."""

from __future__ import annotations

import asyncio
import json

import numpy as np
import openai
import pytest

from tests.actors.test_sampling import eventually, stats
from tests.gateway.openai.talk import MESSAGES, TOOLS
from tinsmith.envs import ChatRenderer
from tinsmith.primitives.types import SamplingParams

HELLO = [{"role": "system", "content": "answer"}, {"role": "user", "content": "the lazy dog?"}]
KNOBS = dict(model="tiny", messages=HELLO, max_tokens=24)


async def joined(stream) -> tuple[str, list[dict], str]:
    """Content, tool calls and finish reason of a streamed answer of one choice."""
    content, calls, finish = "", [], None
    async for chunk in stream:
        (choice,) = chunk.choices
        assert finish is None
        content += choice.delta.content or ""
        for call in choice.delta.tool_calls or []:
            assert call.index == len(calls)
            calls.append((call.function.name, json.loads(call.function.arguments)))
        finish = choice.finish_reason
    return content, calls, finish


async def test_a_greedy_answer_is_the_native_one(alice, native):
    renderer = ChatRenderer(native.get_tokenizer())
    prompt = renderer.start(HELLO).prompt
    sampled = await native.sample(prompt, 1, SamplingParams(max_tokens=24, temperature=0))
    (sequence,) = sampled.sequences
    got = await alice.chat.completions.create(**KNOBS, temperature=0, logprobs=True)
    (choice,) = got.choices
    assert choice.message.role == "assistant"
    tokenizer = renderer.tokenizer
    assert choice.message.content == tokenizer.decode(sequence.tokens, skip_special_tokens=True)
    entries = choice.logprobs.content
    assert [e.token for e in entries] == [tokenizer.decode([t]) for t in sequence.tokens]
    np.testing.assert_allclose([e.logprob for e in entries], sequence.logprobs, atol=1e-5)
    for entry in entries:
        assert entry.bytes is None or bytes(entry.bytes).decode() == entry.token
    assert got.usage.prompt_tokens == len(prompt)


@pytest.mark.parametrize("stop", [None, "e", ["\n", "a"]])
async def test_a_stream_tells_the_same(alice, stop):
    for seed in range(4):
        knobs = dict(**KNOBS, seed=seed, stop=stop)
        (whole,) = (await alice.chat.completions.create(**knobs)).choices
        content, calls, finish = await joined(
            await alice.chat.completions.create(**knobs, stream=True)
        )
        assert (content, calls, finish) == (whole.message.content, [], whole.finish_reason)


async def test_streamed_logprobs_come_token_by_token(alice):
    knobs = dict(**KNOBS, seed=1, logprobs=True, top_logprobs=3)
    (whole,) = (await alice.chat.completions.create(**knobs)).choices
    streamed = []
    async for chunk in await alice.chat.completions.create(**knobs, stream=True):
        if chunk.choices[0].logprobs:
            streamed += chunk.choices[0].logprobs.content
    assert [e.token for e in streamed] == [e.token for e in whole.logprobs.content]
    np.testing.assert_allclose(
        [e.logprob for e in streamed], [e.logprob for e in whole.logprobs.content], atol=1e-5
    )
    for entry, expected in zip(streamed, whole.logprobs.content, strict=True):
        top = [t.token for t in entry.top_logprobs]
        assert top == [t.token for t in expected.top_logprobs]
        assert len(top) == 3


async def test_the_likeliest_token_is_the_greedy_one(alice):
    got = await alice.chat.completions.create(**KNOBS, temperature=0, logprobs=True, top_logprobs=2)
    for entry in got.choices[0].logprobs.content:
        first, second = entry.top_logprobs
        assert (first.token, first.bytes) == (entry.token, entry.bytes)
        assert first.logprob == pytest.approx(entry.logprob, abs=1e-5)
        assert second.logprob <= first.logprob


async def test_n_answers_differ_and_stream_side_by_side(alice):
    knobs = dict(**KNOBS, seed=2, n=3)
    got = await alice.chat.completions.create(**knobs)
    whole = [choice.message.content for choice in got.choices]
    assert len(set(whole)) == 3
    streamed = ["", "", ""]
    stream = await alice.chat.completions.create(
        **knobs, stream=True, stream_options={"include_usage": True}
    )
    async for chunk in stream:
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == whole
    assert chunk.usage.completion_tokens == got.usage.completion_tokens


async def test_content_may_come_in_parts_and_developers_are_the_system(alice):
    parts = [
        {"role": "developer", "content": "answer"},
        {"role": "user", "content": [{"type": "text", "text": "the lazy dog?"}]},
    ]
    got = await alice.chat.completions.create(**KNOBS | {"messages": parts}, seed=1)
    expected = await alice.chat.completions.create(**KNOBS, seed=1)
    assert got.choices[0].message.content == expected.choices[0].message.content


async def test_without_max_tokens_an_answer_may_fill_the_context(alice):
    knobs = dict(model="tiny", messages=HELLO, temperature=0, max_completion_tokens=None)
    got = await alice.chat.completions.create(**knobs)
    assert got.choices[0].finish_reason == "stop" or got.usage.total_tokens == 513


async def test_tools_go_there_and_come_back(alice):
    messages = MESSAGES[:1]
    for result, expected in (("3", {"a": 1, "b": 2}), ("7", {"a": 3, "b": 4})):
        knobs = dict(model="caller", messages=messages, tools=TOOLS, temperature=0)
        (choice,) = (await alice.chat.completions.create(**knobs)).choices
        assert choice.finish_reason == "tool_calls"
        (call,) = choice.message.tool_calls
        assert call.id.startswith("call_")
        assert (call.function.name, json.loads(call.function.arguments)) == ("add", expected)
        assert choice.message.content == ("I add." if result == "3" else None)
        streamed = await joined(await alice.chat.completions.create(**knobs, stream=True))
        assert streamed == (choice.message.content or "", [("add", expected)], "tool_calls")
        answered = {"role": "tool", "tool_call_id": call.id, "content": result}
        messages = [*messages, choice.message.model_dump(), answered]
        # What the model learned is its own writing of the calls, which only recordings keep.
        messages = MESSAGES[: len(messages)]
    got = await alice.chat.completions.create(**{**knobs, "messages": messages})
    assert got.choices[0].message.content == "7, not 8"
    assert got.choices[0].finish_reason == "stop"


async def test_tool_choice_none_hides_the_tools(alice):
    knobs = dict(model="caller", messages=MESSAGES[:1], max_tokens=20, temperature=0)
    hidden = await alice.chat.completions.create(**knobs, tools=TOOLS, tool_choice="none")
    plain = await alice.chat.completions.create(**knobs)
    assert hidden.choices[0].message == plain.choices[0].message
    assert hidden.usage.prompt_tokens == plain.usage.prompt_tokens


async def test_leaving_a_stream_frees_the_sampler(alice, native):
    async def idle() -> bool:
        await native.sample([1, 2, 3], 1, SamplingParams(max_tokens=1))
        now = await stats(native)
        return now["running"] == now["waiting"] == now["blocks_in_use"] == 0

    knobs = KNOBS | dict(max_tokens=400, n=16, seed=0)
    whole = (await alice.chat.completions.create(**knobs)).usage.completion_tokens
    await eventually(idle)
    before = (await stats(native))["sampled_tokens"]
    stream = await alice.chat.completions.create(**knobs, stream=True)
    async for _ in stream:
        break
    await stream.close()
    await eventually(idle)
    assert (await stats(native))["sampled_tokens"] - before < whole / 2


async def test_requests_run_side_by_side(alice):
    answers = await asyncio.gather(
        *(alice.chat.completions.create(**KNOBS, seed=seed) for seed in range(16))
    )
    assert len({answer.choices[0].message.content for answer in answers}) > 8


@pytest.mark.parametrize(
    "wrong",
    [
        dict(messages=[]),
        dict(messages=[{"role": "ghost", "content": "x"}]),
        dict(messages=[{"content": "x"}]),
        dict(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
        dict(
            messages=[
                {
                    "role": "assistant",
                    "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{"}}],
                }
            ]
        ),
        dict(max_tokens=0),
        dict(max_tokens=600),
        dict(top_logprobs=3),
        dict(logprobs=True, top_logprobs=99),
        dict(tools=[{"type": "function"}]),
        dict(tools=[{"type": "web_search"}]),
        dict(tools=TOOLS),  # this model's template knows none
        dict(model="caller", tools=TOOLS, tool_choice="required"),
        dict(tool_choice={"type": "function", "function": {"name": "add"}}),
        dict(response_format={"type": "json_object"}),
        dict(presence_penalty=1),
        dict(logit_bias={"1": 1}),
        dict(extra_body={"chat_template_kwargs": {"tokenize": True}}),
        dict(extra_body={"chat_template_kwargs": {"chat_template": "x"}}),
        dict(extra_body={"chat_template": "x"}),
        dict(model="tinker://bare/sampler_weights/1"),
        dict(stream=True, temperature=-1),
        dict(n=2, extra_headers={"X-Trajectory-Id": "t"}),
    ],
    ids=str,
)
async def test_what_cannot_be_done_is_refused(alice, wrong):
    with pytest.raises(openai.BadRequestError) as error:
        await alice.chat.completions.create(**{**KNOBS, **wrong})
    assert error.value.body["message"]


async def test_a_base_model_without_template_completes_but_does_not_chat(alice):
    name = "tinker://bare/sampler_weights/1"
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        await alice.chat.completions.create(**KNOBS | {"model": name})
    got = await alice.completions.create(model=name, prompt="the", max_tokens=2)
    assert got.usage.completion_tokens == 2
