"""Sampling through the real sampler: what a request asks for, versions, streams."""

from __future__ import annotations

import asyncio
import pickle
from dataclasses import replace

import numpy as np
import pytest

import tinsmith
from tests.actors.test_training import new_run
from tests.data import VOCAB, text_datum
from tinsmith.primitives.client import SamplingClient
from tinsmith.primitives.op import Op, completed
from tinsmith.primitives.types import AdamParams, PolicyRef, SamplingParams

MODEL = "tiny-llama"
PROMPT = np.arange(20)


def params(max_tokens: int = 12, **settings) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, **{"stop": [], **settings})


def tokens(response) -> list[list[int]]:
    return [sequence.tokens.tolist() for sequence in response.sequences]


async def stats(client) -> dict[str, int]:
    return await Op(client._grant.result().sampler.call("stats"))


async def learn(training, seed: int = 0, steps: int = 1) -> None:
    for _ in range(steps):
        training.forward_backward([text_datum(np.random.default_rng(seed), 40)])
        await training.optim_step(AdamParams(learning_rate=0.02))


def alternatives(response, position: int) -> dict[int, float]:
    """The likeliest tokens at a prompt position, with their logprobs."""
    top = response.topk_prompt_logprobs
    return dict(zip(top.tokens[position].tolist(), top.logprobs[position].tolist(), strict=True))


@pytest.fixture(scope="module")
async def base(service):
    return await service.create_sampling_client(base_model=MODEL)


async def test_num_samples_are_drawn_with_a_logprob_and_a_version_per_token(base):
    response = await base.sample(PROMPT, 4, params(seed=1))
    assert len(response.sequences) == 4
    assert len({tuple(t) for t in tokens(response)}) == 4
    for sequence in response.sequences:
        assert sequence.tokens.dtype == np.int64
        assert sequence.logprobs.dtype == np.float32
        assert len(sequence.tokens) == len(sequence.logprobs) == len(sequence.versions) == 12
        assert (sequence.logprobs < 0).all()
        assert sequence.stop_reason == "length"


async def test_a_seeded_request_draws_the_same_again_in_any_company(base):
    alone = await base.sample(PROMPT, 2, params(seed=5))
    crowd = await asyncio.gather(
        *(base.sample(PROMPT[: 5 + i], 2, params(seed=i)) for i in range(10)),
        base.sample(PROMPT, 2, params(seed=5)),
    )
    assert tokens(crowd[-1]) == tokens(alone)
    assert tokens(await base.sample(PROMPT, 2, params(seed=6))) != tokens(alone)
    unseeded = [await base.sample(PROMPT, 1, params()) for _ in range(2)]
    assert tokens(unseeded[0]) != tokens(unseeded[1])


async def test_temperature_0_takes_the_likeliest_token_and_so_does_top_k_1(base):
    greedy = tokens(await base.sample(PROMPT, 1, params(temperature=0)))
    assert tokens(await base.sample(PROMPT, 1, params(temperature=0, seed=9))) == greedy
    assert tokens(await base.sample(PROMPT, 1, params(top_k=1, seed=3))) == greedy
    assert tokens(await base.sample(PROMPT, 1, params(top_p=1e-6, seed=4))) == greedy


async def test_top_k_and_top_p_bound_what_may_be_drawn(base):
    whole = await base.sample(
        PROMPT, 1, params(1), topk_prompt_logprobs=VOCAB
    )  # the distribution after each prompt token
    after = alternatives(whole, -1)  # of the token at the last position
    ranked = sorted(after, key=after.get, reverse=True)
    prompt = PROMPT[:-1]
    drawn = await base.sample(prompt, 64, params(1, top_k=3, seed=0))
    assert {t for (t,) in tokens(drawn)} <= set(ranked[:3])
    nucleus, total = set(), 0.0
    for token in ranked:
        if total >= 0.5:
            break
        nucleus.add(token)
        total += np.exp(after[token])
    drawn = await base.sample(prompt, 64, params(1, top_p=0.5, seed=0))
    assert {t for (t,) in tokens(drawn)} <= nucleus
    for sequence in drawn.sequences:  # logprobs are those of the whole distribution
        assert sequence.logprobs[0] == pytest.approx(after[sequence.tokens[0]], abs=1e-4)


async def test_stop_strings_and_tokens_end_a_sample_and_are_part_of_it(base):
    free = (await base.sample(PROMPT, 1, params(30, temperature=0))).sequences[0]
    token = int(free.tokens[7])
    first = free.tokens.tolist().index(token)
    got = (await base.sample(PROMPT, 1, params(30, temperature=0, stop=[token]))).sequences[0]
    assert got.stop_reason == "stop"
    assert got.tokens.tolist() == free.tokens[: first + 1].tolist()

    text = base.get_tokenizer().decode(free.tokens[:10])
    word = text[-2:]
    got = (await base.sample(PROMPT, 1, params(30, temperature=0, stop=word))).sequences[0]
    assert got.stop_reason == "stop"
    assert base.get_tokenizer().decode(got.tokens).count(word) == 1


async def test_prompt_logprobs_and_top_alternatives_agree(base):
    response = await base.sample(
        PROMPT, 1, params(1), include_prompt_logprobs=True, topk_prompt_logprobs=VOCAB
    )
    assert response.prompt_logprobs.dtype == np.float32
    assert np.isnan(response.prompt_logprobs[0])
    assert np.isnan(response.topk_prompt_logprobs.logprobs[0]).all()
    for position in range(1, len(PROMPT)):
        after = alternatives(response, position)
        assert sum(np.exp(list(after.values()))) == pytest.approx(1, abs=1e-4)
        assert after[PROMPT[position]] == pytest.approx(
            response.prompt_logprobs[position], abs=1e-5
        )
    np.testing.assert_array_equal(await base.compute_logprobs(PROMPT), response.prompt_logprobs)
    last = await base.compute_logprobs(PROMPT, prompt_logprobs_last_n=3)
    assert np.isnan(last[:-3]).all()
    np.testing.assert_allclose(last[-3:], response.prompt_logprobs[-3:], atol=1e-4)


async def test_whatever_may_be_asked_about_a_prompt_and_a_sample_comes_with_the_response(base):
    named = np.stack([PROMPT[1:], np.full(19, -1)], 1)
    response = await base.sample(
        PROMPT,
        2,
        params(3, seed=0, temperature=0.5),
        include_prompt_logprobs=True,
        target_prompt_logprobs=named,
        prompt_alt_tokens_k=4,
        topk_sample_logprobs=5,
    )
    targets = response.target_prompt_logprobs
    np.testing.assert_allclose(targets[:, 0], response.prompt_logprobs[1:], atol=1e-5)
    assert (targets[:, 1] == 0).all()
    assert response.prompt_alt_tokens.tokens.shape == (19, 4)
    assert response.topk_prompt_logprobs is None
    for sequence in response.sequences:
        assert sequence.topk_logprobs.tokens.shape == (3, 5)
        assert (sequence.topk_logprobs.logprobs[:, 0] >= sequence.logprobs - 1e-5).all()


async def test_compute_logprobs_equals_the_learners_forward(service):
    training = await new_run(service)
    await learn(training, steps=3)
    policy = await training.save_weights_and_get_sampling_client()
    text = np.random.default_rng(3).integers(0, VOCAB, 100)
    datum = tinsmith.Datum(text[:-1], {"target_tokens": text[1:], "weights": np.ones(99)})
    expected = (await training.forward([datum])).loss_fn_outputs[0]["logprobs"]
    np.testing.assert_allclose((await policy.compute_logprobs(text))[1:], expected, atol=1e-4)


async def test_logprobs_of_a_text_as_long_as_the_context_can_be_had(base):
    text = np.random.default_rng(4).integers(0, VOCAB, 512)
    assert len(await base.compute_logprobs(text)) == 512


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ([], {}, "prompt is empty"),
        ([1, VOCAB], {}, f"prompt holds token {VOCAB} at position 1"),
        ([1, -1], {}, "prompt holds a negative token id at position 1"),
        ([1.5], {}, "prompt must be integer token ids"),
        (PROMPT, {"max_tokens": 600}, "max_tokens=600 do not fit"),
        (np.zeros(513, int), {"max_tokens": 1}, "a prompt of 513 tokens"),
    ],
)
async def test_bad_requests_are_typed_errors_and_the_sampler_goes_on(
    base, prompt, settings, message
):
    with pytest.raises(tinsmith.InvalidInput, match=message):
        await base.sample(prompt, 1, params(**settings))
    with pytest.raises(tinsmith.InvalidInput, match=message):
        async for _ in base.sample_stream(prompt, 1, params(**settings)):
            pass
    assert await base.sample(PROMPT, 1, params(1))


async def test_more_than_ever_fits_is_out_of_capacity(base):
    with pytest.raises(tinsmith.OutOfCapacity, match="lower num_samples or max_tokens"):
        await base.sample(PROMPT, 10_000, params(400))


async def test_a_stream_yields_the_tokens_that_sample_returns(base):
    streamed: dict[int, list] = {0: [], 1: []}
    async for token in base.sample_stream(PROMPT, 2, params(seed=7)):
        streamed[token.index].append(token)
    response = await base.sample(PROMPT, 2, params(seed=7))
    for index, sequence in enumerate(response.sequences):
        assert [t.token for t in streamed[index]] == sequence.tokens.tolist()
        np.testing.assert_allclose(
            [t.logprob for t in streamed[index]], sequence.logprobs, atol=1e-4
        )
        assert [t.stop_reason for t in streamed[index]] == [None] * 11 + ["length"]


async def test_a_streamed_token_comes_with_the_likeliest_ones_if_asked_for(base):
    whole = await base.sample(PROMPT, 2, params(seed=2), topk_sample_logprobs=3)
    streamed: dict[int, list] = {0: [], 1: []}
    async for token in base.sample_stream(PROMPT, 2, params(seed=2), topk_sample_logprobs=3):
        streamed[token.index].append(token)
    for index, sequence in enumerate(whole.sequences):
        got = tinsmith.SampledSequence.of(streamed[index])
        np.testing.assert_array_equal(got.tokens, sequence.tokens)
        top, expected = got.topk_logprobs, sequence.topk_logprobs
        np.testing.assert_array_equal(top.tokens, expected.tokens)
        np.testing.assert_allclose(top.logprobs, expected.logprobs, atol=1e-5)


async def drain(stream) -> None:
    async for _ in stream:
        pass


async def eventually(condition, seconds: float = 20) -> None:
    async with asyncio.timeout(seconds):
        while not await condition():  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def test_leaving_a_stream_early_frees_the_sampler(base):
    async def idle() -> bool:
        # Counters move with the engine's steps: make one.
        await base.sample(PROMPT, 1, params(1))
        now = await stats(base)
        return now["running"] == now["waiting"] == now["blocks_in_use"] == 0

    await eventually(idle)
    before = (await stats(base))["sampled_tokens"]
    async for token in base.sample_stream(PROMPT, 1, params(480, seed=0)):
        assert token.token >= 0
        break
    await eventually(idle)
    assert (await stats(base))["sampled_tokens"] - before < 400


async def test_a_client_travels_once_it_is_ready(service, base):
    twin = pickle.loads(pickle.dumps(base))
    assert twin.policy == base.policy
    expected = tokens(await base.sample(PROMPT, 1, params(seed=1)))
    assert tokens(await twin.sample(PROMPT, 1, params(seed=1))) == expected

    training = await new_run(service)
    live = training.live_sampling_client()
    with pytest.raises(tinsmith.InvalidInput, match=r"await client\.ready\(\)"):
        pickle.dumps(live)
    assert await live.ready() is live
    pickle.dumps(live)


async def test_a_pinned_client_stays_and_a_live_one_moves_on(service):
    training = await new_run(service)
    await learn(training)
    pinned = await training.save_weights_and_get_sampling_client()
    live = training.live_sampling_client()
    first = await pinned.sample(PROMPT, 1, params(seed=1))
    assert tokens(await live.sample(PROMPT, 1, params(seed=1))) == tokens(first)
    await learn(training, seed=1, steps=3)
    again, moved = await asyncio.gather(
        pinned.sample(PROMPT, 1, params(seed=1)), live.sample(PROMPT, 1, params(seed=1))
    )
    assert tokens(again) == tokens(first)
    assert set(again.sequences[0].versions) == {1}
    assert set(moved.sequences[0].versions) == {4}
    newest = await training.save_weights_and_get_sampling_client()
    assert tokens(await newest.sample(PROMPT, 1, params(seed=1))) == tokens(moved)


async def test_published_weights_are_those_of_their_place_in_the_log(service):
    """Publishing is pipelined like everything else: what comes later does not show."""
    training = await new_run(service)
    ops = []
    for seed in range(3):
        training.forward_backward([text_datum(np.random.default_rng(seed), 40)])
        training.optim_step(AdamParams(learning_rate=0.02))
        ops.append(training.save_weights_and_get_sampling_client())
    policies = await asyncio.gather(*ops)
    assert [p.policy.version for p in policies] == [1, 2, 3]
    texts = [tuple((await p.compute_logprobs(PROMPT))[1:]) for p in policies]
    assert len(set(texts)) == 3


async def test_weights_may_be_made_the_newest_without_pinning_them_or_what_comes_later(service):
    training = await new_run(service)
    await learn(training)
    await training._submit("publish", keep=False, every_step=False)
    grant = await Op(service.controller.call("grant_sampler", MODEL, PolicyRef(training.run_id)))
    newest = SamplingClient(completed(grant))

    async def version() -> int:
        return int((await newest.sample(PROMPT, 1, params(1))).sequences[0].versions[0])

    assert await version() == 1
    await learn(training)
    assert await version() == 1
    await training._submit("publish", keep=False, every_step=False)
    assert await version() == 2
    ref = PolicyRef(training.run_id, 1)
    old = SamplingClient(completed(replace(grant, policy=ref)))
    with pytest.raises(tinsmith.NotFound, match="no longer holds version 1"):
        await old.sample(PROMPT, 1, params(1))


async def test_a_request_under_way_goes_on_under_new_versions_with_no_token_dropped(service):
    training = await new_run(service)
    live = await training.live_sampling_client().ready()
    request = live.sample(PROMPT, 8, params(480, seed=0))
    stream = live.sample_stream(PROMPT, 1, params(480, seed=1))
    streamed = [await anext(stream)]
    await learn(training, steps=4)
    streamed += [token async for token in stream]
    response = await request
    assert [len(s.tokens) for s in response.sequences] == [480] * 8
    assert len(streamed) == 480
    for versions in [*(s.versions for s in response.sequences), [t.version for t in streamed]]:
        assert (np.diff(versions) >= 0).all()
        assert len(set(versions)) > 1
    # Each token's logprob is that of the version that drew it.
    sequence = response.sequences[0]
    mixed = np.concatenate([PROMPT, sequence.tokens])
    kept = int((sequence.versions == 0).sum())
    fresh = await new_run(service)  # the same seed: version 0 is the same
    datum = tinsmith.Datum(mixed[:-1], {"target_tokens": mixed[1:], "weights": np.ones(499)})
    expected = (await fresh.forward([datum])).loss_fn_outputs[0]["logprobs"][19 : 19 + kept]
    np.testing.assert_allclose(sequence.logprobs[:kept], expected, atol=1e-4)


async def test_a_sample_of_a_run_that_is_deleted_meanwhile_fails(service):
    training = await new_run(service)
    live = await training.live_sampling_client().ready()
    request = live.sample(PROMPT, 8, params(480))
    stream = live.sample_stream(PROMPT, 1, params(480))
    await anext(stream)
    await service.delete_training_run(training.run_id)
    for call in (request, drain(stream), live.sample(PROMPT, 1, params(1))):
        with pytest.raises(tinsmith.NotFound, match=training.run_id):
            await asyncio.wait_for(call, 20)
