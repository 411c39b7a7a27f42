"""`/v1/completions` samples as the native client does."""

from __future__ import annotations

import numpy as np
import openai
import pytest

from tests.gateway.openai.talk import ANSWERS, MESSAGES, TOOLS
from tinsmith.primitives.types import SamplingParams

PROMPT = "the quick brown fox"
KNOBS = dict(model="tiny", prompt=PROMPT)


@pytest.fixture(scope="module")
def tokenizer(native):
    return native.get_tokenizer()


def text_of(tokenizer, tokens) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=True)


async def test_a_greedy_completion_is_the_native_one(alice, native, tokenizer):
    prompt = tokenizer.encode(PROMPT)
    (sequence,) = (
        await native.sample(prompt, 1, SamplingParams(max_tokens=12, temperature=0))
    ).sequences
    got = await alice.completions.create(**KNOBS, max_tokens=12, temperature=0, logprobs=0)
    (choice,) = got.choices
    assert choice.text == text_of(tokenizer, sequence.tokens)
    assert choice.finish_reason == sequence.stop_reason == "length"
    np.testing.assert_allclose(choice.logprobs.token_logprobs, sequence.logprobs, atol=1e-5)
    assert choice.logprobs.text_offset[:2] == [0, len(choice.logprobs.tokens[0])]
    assert got.usage.prompt_tokens == len(prompt)
    assert got.usage.completion_tokens == 12
    again = await alice.completions.create(
        **KNOBS | {"prompt": prompt}, max_tokens=12, temperature=0
    )
    assert again.choices[0].text == choice.text


async def test_the_likeliest_tokens_stream_too(alice):
    knobs = dict(**KNOBS, max_tokens=6, temperature=0, logprobs=2)
    whole = (await alice.completions.create(**knobs)).choices[0].logprobs
    top, offsets = [], []
    async for chunk in await alice.completions.create(**knobs, stream=True):
        top += chunk.choices[0].logprobs.top_logprobs
        offsets += chunk.choices[0].logprobs.text_offset
    assert offsets == whole.text_offset
    assert [sorted(entry) for entry in top] == [sorted(entry) for entry in whole.top_logprobs]
    for token, entry in zip(whole.tokens, top, strict=True):
        assert max(entry, key=entry.get) == token


async def test_several_prompts_and_samples_are_numbered_prompt_by_prompt(alice):
    knobs = dict(model="tiny", max_tokens=6, seed=3)
    prompts = ["the lazy dog", "What is 3 times 4?"]
    both = await alice.completions.create(prompt=prompts, n=2, **knobs)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    alone = [await alice.completions.create(prompt=p, n=2, **knobs) for p in prompts]
    expected = [choice.text for got in alone for choice in got.choices]
    assert [choice.text for choice in both.choices] == expected
    assert len(set(expected)) == 4
    assert both.usage.prompt_tokens == sum(got.usage.prompt_tokens for got in alone)

    streamed = dict.fromkeys(range(4), "")
    async for chunk in await alice.completions.create(prompt=prompts, n=2, stream=True, **knobs):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert list(streamed.values()) == expected


async def test_a_seed_repeats_and_none_does_not(alice):
    async def sample(seed):
        got = await alice.completions.create(**KNOBS, max_tokens=12, seed=seed)
        return got.choices[0].text

    assert await sample(7) == await sample(7) != await sample(8)
    assert await sample(-7) == await sample(-7) != await sample(7)
    assert await sample(None) != await sample(None)


async def test_a_stop_string_ends_the_text_before_it_and_streams_no_part_of_it(alice):
    knobs = dict(**KNOBS, max_tokens=40, temperature=0)
    free = (await alice.completions.create(**knobs)).choices[0].text
    stop = free[10:13]
    expected = free[: free.index(stop)]
    for given in (stop, ["nowhere", stop]):
        (choice,) = (await alice.completions.create(**knobs, stop=given, logprobs=0)).choices
        assert choice.text == expected
        assert choice.finish_reason == "stop"
        assert stop in "".join(choice.logprobs.tokens)  # the tokens are all there
        streamed = [
            chunk.choices[0]
            async for chunk in await alice.completions.create(**knobs, stop=given, stream=True)
        ]
        assert "".join(piece.text for piece in streamed) == expected
        assert streamed[-1].finish_reason == "stop"


async def test_stop_strings_are_added_to_the_models_own_end(alice, caller):
    """A model that ends its turn ends it, whatever else would stop it."""
    renderer_prompt = caller.tokenizer.apply_chat_template(
        MESSAGES[:1], TOOLS, tokenize=False, add_generation_prompt=True
    )
    got = await alice.completions.create(
        model="caller", prompt=renderer_prompt, max_tokens=200, temperature=0, stop="@@@"
    )
    assert got.choices[0].finish_reason == "stop"
    assert got.choices[0].text == ANSWERS[0]


async def test_echo_gives_the_prompts_logprobs_too(alice, native, tokenizer):
    tokens = np.array(tokenizer.encode(PROMPT))
    expected = await native.compute_logprobs(tokens)
    for max_tokens in (0, 1):
        got = await alice.completions.create(
            **KNOBS, max_tokens=max_tokens, echo=True, logprobs=2, temperature=0
        )
        (choice,) = got.choices
        assert choice.text.startswith(PROMPT)
        assert choice.logprobs.token_logprobs[0] is None
        logprobs = choice.logprobs.token_logprobs[1 : len(tokens)]
        np.testing.assert_allclose(logprobs, expected[1:], atol=1e-5)
        assert len(choice.logprobs.tokens) == len(tokens) + max_tokens
        assert len(choice.logprobs.top_logprobs) == len(tokens) + max_tokens
        assert choice.logprobs.top_logprobs[0] is None
        assert "".join(choice.logprobs.tokens[: len(tokens)]) == PROMPT
        assert max(choice.logprobs.top_logprobs[1].values()) >= logprobs[0] - 1e-5
        assert got.usage.completion_tokens == max_tokens


async def test_the_same_prompt_again_comes_from_the_cache(alice):
    prompt = "a prompt long enough to fill several blocks of the sampler's cache, twice over"
    for _ in range(2):
        got = await alice.completions.create(model="tiny", prompt=prompt, max_tokens=1)
    assert 0 < got.usage.prompt_tokens_details.cached_tokens < got.usage.prompt_tokens


async def test_a_stream_may_end_with_its_usage(alice):
    stream = await alice.completions.create(
        **KNOBS, max_tokens=5, n=2, stream=True, stream_options={"include_usage": True}
    )
    *_, last = [chunk async for chunk in stream]
    assert last.choices == []
    assert last.usage.completion_tokens == 10


@pytest.mark.parametrize(
    "wrong",
    [
        dict(prompt=[]),
        dict(prompt=""),
        dict(prompt=[[]]),
        dict(prompt=[1, -1]),
        dict(prompt=[1, 10**30]),
        dict(prompt=[10**6]),
        dict(prompt=[1.5]),
        dict(prompt={"a": 1}),
        dict(prompt="x" * 5000),
        dict(max_tokens=0),
        dict(max_tokens=-1),
        dict(max_tokens=600),
        dict(n=0),
        dict(n=10**9),
        dict(temperature=-1),
        dict(top_p=0),
        dict(top_p=2),
        dict(stop=[""]),
        dict(seed=2**63),
        dict(extra_body={"top_k": 10**30}),
        dict(logprobs=21),
        dict(extra_body={"logit_bias": {"1": 5}}),
        dict(extra_body={"best_of": 3}),
        dict(extra_body={"suffix": "x"}),
        dict(frequency_penalty=0.5),
        dict(stream=True, echo=True, logprobs=1),
        dict(extra_body={"trajectory_id": "a b"}),
    ],
    ids=str,
)
async def test_what_cannot_be_done_is_refused(alice, wrong):
    with pytest.raises(openai.BadRequestError) as error:
        await alice.completions.create(**{**KNOBS, **wrong})
    assert error.value.body["message"]
    assert error.value.body["type"] == "invalid_request_error"


async def test_neutral_and_unknown_parameters_pass(alice):
    got = await alice.completions.create(
        **KNOBS,
        max_tokens=1,
        frequency_penalty=0,
        user="someone",
        extra_body={"logit_bias": None, "presence_penalty": 0.0, "store": True, "n": None},
    )
    assert len(got.choices) == 1
