"""What both sampling engines promise, on the same tests: the torch engine and vLLM."""

from __future__ import annotations

import asyncio
import importlib.util
import threading

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM, AutoTokenizer

import tinsmith
from tests.tiny import make_tiny_model
from tinsmith.actors.engine_thread import EngineThread
from tinsmith.engines.backbone import Backbone
from tinsmith.engines.learner import LearnerEngine
from tinsmith.engines.sampler import SamplerEngine
from tinsmith.engines.vllm_start import VllmOptions
from tinsmith.primitives.types import (
    AdamParams,
    Datum,
    LoraConfig,
    PolicyRef,
    SampleRequest,
    SamplingParams,
)

CLOSE = dict(atol=1e-4)  # float32, DESIGN.md, contract 6
VLLM = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    # vLLM has no attention for heads of 16 on a CPU.
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", "qwen3", head_dim=32)


@pytest.fixture(scope="module")
def tokenizer(model_path):
    return AutoTokenizer.from_pretrained(model_path)


@pytest.fixture(scope="module")
def reference(model_path):
    return AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)


@pytest.fixture(scope="module")
def learner(model_path):
    """One with a run that has learned something, so that its adapter is none of zeros."""
    learner = LearnerEngine(Backbone(model_path))
    learner.create_run("learned", LoraConfig(rank=8, seed=0))
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 336, 61)
    datum = Datum(tokens[:-1], {"target_tokens": tokens[1:], "weights": np.ones(60)})
    for _ in range(3):
        learner.forward_backward("learned", [datum], "cross_entropy")
        learner.optim_step("learned", AdamParams(learning_rate=1e-2))
    return learner


ENGINES = [
    "torch",
    pytest.param("vllm", marks=[VLLM, pytest.mark.slow]),
    pytest.param("vllm-recompute", marks=[VLLM, pytest.mark.slow]),
]


@pytest.fixture(scope="module", params=ENGINES)
async def engine(request, model_path, tokenizer):
    if request.param == "torch":
        yield EngineThread(SamplerEngine(Backbone(model_path), tokenizer, kv_bytes=1 << 24))
        return
    from tinsmith.actors.vllm_engine import VllmEngine

    cache = "recompute" if request.param == "vllm-recompute" else "keep"
    options = VllmOptions(max_adapters=4, max_rank=8, dtype="float32", live_cache=cache)
    started = VllmEngine(model_path, tokenizer, kv_bytes=1 << 26, options=options)
    yield started
    started.close()


@pytest.fixture
async def add(engine):
    """Gives the engine random adapters, and takes their runs away again."""
    runs = set()

    async def add(run_id, version, seed, rank=4, keep=True, **groups):
        config = LoraConfig(rank=rank, **groups)
        size = engine.layout(config).size
        flat = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 0.1
        await engine.add_adapter(run_id, version, config, flat.numpy(), keep)
        runs.add(run_id)

    yield add
    for run_id in runs:
        await engine.drop_run(run_id)


BASE_MODEL = PolicyRef()


def greedy(prompt, tokens=12, policy=BASE_MODEL, **kwargs):
    params = SamplingParams(max_tokens=tokens, temperature=0, stop=[])
    return SampleRequest(prompt, params, policy, **kwargs)


def seeded(prompt, seed, tokens=12, policy=BASE_MODEL, samples=1, **params):
    params = SamplingParams(max_tokens=tokens, seed=seed, **{"stop": [], **params})
    return SampleRequest(prompt, params, policy, samples)


def prompt_of(length, seed=0):
    return np.random.default_rng(seed).integers(0, 336, length)


def logprobs_of(model, tokens, temperature=1.0):
    """float32 `[len(tokens), V]` of the token after each."""
    logits = model(torch.tensor(tokens)[None]).logits[0].detach()
    return (logits / temperature).log_softmax(-1)


def at(logprobs, tokens):
    return logprobs.gather(1, torch.tensor(tokens)[:, None])[:, 0].numpy()


async def sequence(engine, request):
    return (await engine.sample(request)).sequences[0]


async def test_a_version_waits_for_no_step_and_is_there_for_what_is_asked_next(
    model_path, tokenizer, monkeypatch
):
    sampler = SamplerEngine(Backbone(model_path), tokenizer, kv_bytes=1 << 22)
    begun, may_end, step = threading.Event(), threading.Event(), sampler.step

    def long_step():
        begun.set()
        assert may_end.wait(60)
        return step()

    monkeypatch.setattr(sampler, "step", long_step)
    engine, config, run = EngineThread(sampler), LoraConfig(rank=4), PolicyRef("run")
    flat = np.zeros(engine.layout(config).size, np.float32)
    await engine.add_adapter("run", 1, config, flat, False)
    before = asyncio.create_task(sequence(engine, greedy(prompt_of(5), 3, run)))
    await asyncio.to_thread(begun.wait, 60)
    await asyncio.wait_for(engine.add_adapter("run", 2, config, flat, False), 30)
    after = asyncio.create_task(sequence(engine, greedy(prompt_of(6), 3, run)))
    with pytest.raises(tinsmith.InvalidInput, match=r"\(1,\) parameters, expected"):
        await engine.add_adapter("run", 3, config, flat[:1], False)
    may_end.set()
    assert (await before).versions.tolist() == [1, 2, 2]
    assert (await after).versions.tolist() == [2, 2, 2]


async def test_greedy_tokens_and_logprobs_are_the_models(engine, reference):
    prompts = [prompt_of(n, n) for n in (1, 5, 33, 100)]
    got = await asyncio.gather(*(sequence(engine, greedy(p, 20)) for p in prompts))
    for prompt, drawn in zip(prompts, got, strict=True):
        text = np.concatenate([prompt, drawn.tokens])
        logprobs = logprobs_of(reference, text)[len(prompt) - 1 : -1]
        np.testing.assert_array_equal(drawn.tokens, logprobs.argmax(-1))
        np.testing.assert_allclose(drawn.logprobs, at(logprobs, drawn.tokens), **CLOSE)
        assert drawn.stop_reason == "length"
        assert drawn.versions.tolist() == [0] * 20


async def test_logprobs_agree_with_the_learners(engine, learner):
    config = learner.runs["learned"].config
    await engine.add_adapter("learned", 3, config, learner.export("learned").numpy())
    prompt = prompt_of(40)
    response = await engine.sample(seeded(prompt, 5, 30, PolicyRef("learned"), samples=4))
    for drawn in response.sequences:
        tokens = np.concatenate([prompt, drawn.tokens])
        weights = np.ones(len(tokens) - 1)
        datum = Datum(tokens[:-1], {"target_tokens": tokens[1:], "weights": weights})
        (expected,) = learner.forward("learned", [datum], "cross_entropy").loss_fn_outputs
        np.testing.assert_allclose(drawn.logprobs, expected["logprobs"][39:], **CLOSE)
        assert (drawn.versions == 3).all()
    assert len({tuple(drawn.tokens) for drawn in response.sequences}) == 4
    await engine.drop_run("learned")


@pytest.mark.parametrize("temperature", [0.6, 1.0, 0.0])
async def test_logprobs_are_at_the_temperature_before_top_k(engine, reference, temperature):
    prompt = prompt_of(20)
    params = SamplingParams(max_tokens=15, stop=[], seed=1, temperature=temperature, top_k=5)
    request = SampleRequest(prompt, params, num_samples=3, topk_sample_logprobs=4)
    for drawn in (await engine.sample(request)).sequences:
        text = np.concatenate([prompt, drawn.tokens])
        logprobs = logprobs_of(reference, text, temperature or 1.0)[19:-1]
        np.testing.assert_allclose(drawn.logprobs, at(logprobs, drawn.tokens), **CLOSE)
        values, ids = logprobs.topk(5)
        assert all(token in row for token, row in zip(drawn.tokens, ids, strict=True))
        np.testing.assert_array_equal(drawn.topk_logprobs.tokens, ids[:, :4])
        np.testing.assert_allclose(drawn.topk_logprobs.logprobs, values[:, :4], **CLOSE)


async def test_draws_follow_the_models_distribution(engine, reference):
    prompt, count = prompt_of(8), 3000
    requests = [seeded(prompt, seed, 1, samples=500, temperature=0.7) for seed in range(6)]
    responses = await asyncio.gather(*map(engine.sample, requests))
    drawn = np.bincount([s.tokens[0] for r in responses for s in r.sequences], minlength=336)
    expected = logprobs_of(reference, prompt, 0.7)[-1].double().exp().numpy() * count
    common = expected >= 5
    observed = np.append(drawn[common], drawn[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum())
    assert chisquare(observed, wanted * count / wanted.sum()).pvalue > 1e-4


async def test_a_seed_draws_the_same_in_any_company_and_none_does_not(engine):
    prompt = prompt_of(50)
    alone = await engine.sample(seeded(prompt, 7, samples=3))
    crowd = [engine.sample(seeded(prompt_of(10 + 9 * i, i), i, 20)) for i in range(6)]
    again, *_ = await asyncio.gather(engine.sample(seeded(prompt, 7, samples=3)), *crowd)
    for a, b in zip(alone.sequences, again.sequences, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_allclose(a.logprobs, b.logprobs, **CLOSE)
    assert len({tuple(s.tokens) for s in alone.sequences}) == 3
    unseeded = [await sequence(engine, seeded(prompt, None)) for _ in range(2)]
    assert unseeded[0].tokens.tolist() != unseeded[1].tokens.tolist()


async def test_a_seed_draws_the_same_when_its_prompt_is_computed_in_parts(engine):
    """As in a crowd whose prompts are more than one step takes."""
    prompts = [prompt_of(480, seed) for seed in range(20, 27)]
    crowd = await asyncio.gather(*(sequence(engine, seeded(p, 7)) for p in prompts))
    for prompt, drawn in zip(prompts, crowd, strict=True):
        alone = await sequence(engine, seeded(prompt, 7))
        np.testing.assert_array_equal(drawn.tokens, alone.tokens)


async def test_adapters_in_one_batch_do_as_each_alone(engine, add):
    await add("a", 1, seed=1)
    await add("a", 2, seed=2)
    await add("b", 5, seed=3, rank=7, train_mlp=False)
    policies = [PolicyRef("a"), PolicyRef("b"), PolicyRef(), PolicyRef("a", 1)]
    requests = [greedy(prompt_of(20 + i, i), policy=p) for i, p in enumerate(policies)]
    together = await asyncio.gather(*(sequence(engine, r) for r in requests))
    for request, version, mixed in zip(requests, (2, 5, 0, 1), together, strict=True):
        alone = await sequence(engine, request)
        np.testing.assert_array_equal(alone.tokens, mixed.tokens)
        np.testing.assert_allclose(alone.logprobs, mixed.logprobs, **CLOSE)
        assert (mixed.versions == version).all()
    assert len({tuple(s.tokens) for s in together}) == 4


async def test_more_adapters_than_a_batch_takes_are_all_served(engine, add, reference):
    """Beside the base model, whose requests no adapter may touch; versions that vLLM let go of are loaded again from what was staged, unscaled."""
    for version in range(1, 13):
        await add("many", version, seed=version)
    requests = [greedy(prompt_of(20), 5, PolicyRef("many", v)) for v in range(1, 13)]
    bare = greedy(prompt_of(21), 5)
    *first, base = await asyncio.gather(*(sequence(engine, r) for r in (*requests, bare)))
    logprobs = logprobs_of(reference, np.concatenate([bare.prompt, base.tokens]))[20:-1]
    np.testing.assert_allclose(base.logprobs, at(logprobs, base.tokens), **CLOSE)
    again = await asyncio.gather(*(sequence(engine, r) for r in requests))
    for version, (a, b) in enumerate(zip(first, again, strict=True), 1):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_allclose(a.logprobs, b.logprobs, **CLOSE)
        assert (a.versions == version).all()


async def test_nothing_computed_under_other_weights_is_reused(engine, add):
    prompt = prompt_of(300)
    await engine.sample(greedy(prompt))
    await add("c", 1, seed=1)
    first = await engine.sample(greedy(prompt, policy=PolicyRef("c", 1)))
    assert first.prompt_cache_hit_tokens == 0
    await add("c", 1, seed=1)  # the very same: its cache still holds
    same = await engine.sample(greedy(prompt, policy=PolicyRef("c", 1)))
    assert same.prompt_cache_hit_tokens >= 256
    await add("c", 1, seed=2)  # as after going back to an older checkpoint
    other = await engine.sample(greedy(prompt, policy=PolicyRef("c", 1)))
    assert other.prompt_cache_hit_tokens == 0
    assert other.sequences[0].tokens.tolist() != first.sequences[0].tokens.tolist()


async def under_way(engine, request, tokens):
    """A sample of which so many tokens have been drawn, as a task of those that are streamed."""
    reached = asyncio.Event()
    drawn = []

    async def follow():
        async for token in engine.stream(request):
            drawn.append(token)
            if len(drawn) == tokens:
                reached.set()
        return drawn

    task = asyncio.create_task(follow())
    await reached.wait()
    return task


async def test_a_live_request_goes_on_under_a_new_version_and_a_pinned_one_does_not_notice(
    engine, add, reference
):
    await add("live", 1, seed=1)
    prompt = prompt_of(40)
    tasks = [
        await under_way(engine, seeded(prompt, 3, 300, policy), 5)
        for policy in (PolicyRef("live"), PolicyRef("live", 1))
    ]
    silent = asyncio.create_task(sequence(engine, seeded(prompt, 4, 300, PolicyRef("live"))))
    await asyncio.sleep(0.05)
    await add("live", 2, seed=2)
    live, pinned = await asyncio.gather(*tasks)
    versions = [token.version for token in live]
    assert versions == sorted(versions)
    assert set(versions) == {1, 2}
    assert {token.version for token in pinned} == {1}
    assert len(live) == len(pinned) == 300
    # The stamp is true: up to the swap the tokens are those of version 1, and no further.
    swap = versions.index(2)
    text = [prompt.tolist() + [t.token for t in tokens] for tokens in (live, pinned)]
    scored = await engine.sample(
        SampleRequest(
            np.array(text[0]),
            SamplingParams(max_tokens=1),
            PolicyRef("live", 1),
            prompt_logprobs=True,
        )
    )
    off = np.abs(scored.prompt_logprobs[40:] - [token.logprob for token in live])
    assert off[:swap].max() < 1e-4
    assert off[swap : swap + 20].max() > 1e-2
    drawn = (await silent).versions.tolist()
    assert drawn == sorted(drawn)
    assert drawn[-1] == 2


async def test_what_a_swapped_request_left_behind_serves_no_other(engine, add):
    await add("swapped", 1, seed=1)
    prompt = prompt_of(140)
    task = await under_way(engine, seeded(prompt, 3, 200, PolicyRef("swapped")), 5)
    await add("swapped", 2, seed=2)
    grown = np.concatenate([prompt, [token.token for token in await task]])
    later = await sequence(engine, greedy(grown, 5, PolicyRef("swapped", 2)))
    live = await sequence(engine, greedy(grown, 5, PolicyRef("swapped")))
    await add("fresh", 2, seed=2)
    expected = await sequence(engine, greedy(grown, 5, PolicyRef("fresh")))
    for drawn in (later, live):
        np.testing.assert_array_equal(drawn.tokens, expected.tokens)
        np.testing.assert_allclose(drawn.logprobs, expected.logprobs, **CLOSE)


async def test_versions_published_live_are_let_go_and_missed_clearly(engine, add):
    for version in (1, 2, 3):
        await add("kept", version, seed=version, keep=version == 1)
    assert await engine.newest("kept") == 3
    await engine.sample(greedy([1], policy=PolicyRef("kept", 1)))
    with pytest.raises(tinsmith.NotFound, match=r"no longer holds version 2 .*newest: 3"):
        await engine.sample(greedy([1], policy=PolicyRef("kept", 2)))
    with pytest.raises(tinsmith.NotFound, match="no weights of run 'nobody'"):
        await engine.sample(greedy([1], policy=PolicyRef("nobody")))


async def test_dropping_a_run_fails_its_requests(engine, add):
    await add("gone", 1, seed=1)
    task = await under_way(engine, greedy(prompt_of(30), 400, PolicyRef("gone")), 3)
    waiting = asyncio.create_task(engine.sample(greedy(prompt_of(9), 400, PolicyRef("gone"))))
    await asyncio.sleep(0.01)
    await engine.drop_run("gone")
    for request in (task, waiting):
        with pytest.raises(tinsmith.NotFound, match="run 'gone' was closed while it sampled"):
            await request
    assert await engine.newest("gone") is None


async def test_stop_tokens_and_strings_end_a_sample_and_are_part_of_it(engine, tokenizer):
    free = await sequence(engine, greedy([5, 6], 40))
    token = int(free.tokens[10])
    first = free.tokens.tolist().index(token)
    stopped = SamplingParams(max_tokens=40, temperature=0, stop=[token])
    got = await sequence(engine, SampleRequest([5, 6], stopped))
    assert got.stop_reason == "stop"
    assert got.tokens.tolist() == free.tokens[: first + 1].tolist()

    text = tokenizer.decode(free.tokens)
    prefixes = [tokenizer.decode(free.tokens[: i + 1]) for i in range(40)]
    across = text[len(prefixes[9]) - 1 : len(prefixes[10]) + 1]  # from one token into the next
    stopped = SamplingParams(max_tokens=40, temperature=0, stop=[across])
    got = await sequence(engine, SampleRequest([5, 6], stopped))
    assert got.stop_reason == "stop"
    ends = next(i for i, prefix in enumerate(prefixes) if across in prefix)
    assert got.tokens.tolist() == free.tokens[: ends + 1].tolist()
    assert len(got.logprobs) == len(got.tokens)


async def test_without_stop_a_sample_ends_at_the_models_end(engine, tokenizer):
    params = SamplingParams(max_tokens=400, seed=1, temperature=2.0)
    drawn = (await engine.sample(SampleRequest([1, 2, 3], params, num_samples=8))).sequences
    ended = [s for s in drawn if s.stop_reason == "stop"]
    assert len(ended) >= 2
    for sequence in drawn:
        ends = np.flatnonzero(sequence.tokens == tokenizer.eos_token_id).tolist()
        assert ends == ([len(sequence.tokens) - 1] if sequence in ended else [])


async def test_prompt_logprobs_are_the_models_at_temperature_1(engine, reference):
    prompt = prompt_of(300, 5)
    await engine.sample(greedy(prompt))  # a cached prefix must not cost any logprob
    params = SamplingParams(max_tokens=1, temperature=0.5)
    logprobs = logprobs_of(reference, prompt)[:-1]
    own, (values, ids) = at(logprobs, prompt[1:]), logprobs.topk(3)
    for last_n in (None, 1, 50):
        request = SampleRequest(
            prompt,
            params,
            prompt_logprobs=True,
            topk_prompt_logprobs=3,
            prompt_logprobs_last_n=last_n,
        )
        response = await engine.sample(request)
        asked = last_n or 299
        assert np.isnan(response.prompt_logprobs[: 300 - asked]).all()
        np.testing.assert_allclose(response.prompt_logprobs[-asked:], own[-asked:], **CLOSE)
        top = response.topk_prompt_logprobs
        assert np.isnan(top.logprobs[: 300 - asked]).all()
        np.testing.assert_array_equal(top.tokens[-asked:], ids[-asked:])
        np.testing.assert_allclose(top.logprobs[-asked:], values[-asked:], **CLOSE)


async def test_named_and_drawn_prompt_tokens_are_scored(engine, reference):
    prompt, rng = prompt_of(30, 7), np.random.default_rng(7)
    targets = np.where(rng.random((29, 5)) < 0.5, -1, rng.integers(0, 336, (29, 5)))
    request = SampleRequest(
        prompt,
        SamplingParams(max_tokens=1, temperature=0.7, seed=3),
        target_prompt_logprobs=targets,
        prompt_alt_tokens_k=1000,
        prompt_logprobs=True,
    )
    response = await engine.sample(request)
    logprobs = logprobs_of(reference, prompt)[:-1]
    named = np.where(targets >= 0, logprobs.gather(1, torch.tensor(np.maximum(targets, 0))), 0)
    np.testing.assert_allclose(response.target_prompt_logprobs, named, **CLOSE)
    np.testing.assert_allclose(response.prompt_logprobs[1:], at(logprobs, prompt[1:]), **CLOSE)
    drawn = response.prompt_alt_tokens
    for row in (0, 28):
        expected = logprobs[row].numpy()[drawn.tokens[row]]
        np.testing.assert_allclose(drawn.logprobs[row], expected, **CLOSE)


async def test_samples_go_on_to_the_end_of_the_context(engine):
    for length, expected in ((500, 12), (511, 1), (512, 1)):
        drawn = await sequence(
            engine, SampleRequest(np.arange(length) % 300, SamplingParams(stop=[], seed=0))
        )
        assert len(drawn.tokens) == expected
        assert drawn.stop_reason == "length"


async def test_a_next_turn_and_a_groups_prompt_come_from_the_cache(engine):
    prompt = prompt_of(260, 9)
    first = await sequence(engine, seeded(prompt, 0, 40))
    grown = np.concatenate([prompt, first.tokens, np.arange(10)])
    second = await engine.sample(seeded(grown, 1))
    assert second.prompt_cache_hit_tokens >= 256


async def test_streamed_tokens_are_those_of_the_response(engine):
    request = seeded([1, 2, 3], 4, samples=2)
    tokens = {0: [], 1: []}
    async for token in engine.stream(request):
        tokens[token.index].append(token)
    for drawn, streamed in zip(
        (await engine.sample(request)).sequences, tokens.values(), strict=True
    ):
        assert drawn.tokens.tolist() == [t.token for t in streamed]
        np.testing.assert_allclose(drawn.logprobs, [t.logprob for t in streamed], **CLOSE)
        assert [t.stop_reason for t in streamed] == [None] * 11 + ["length"]


async def test_a_withdrawn_request_is_ended(engine):
    task = asyncio.create_task(engine.sample(greedy(prompt_of(30), 400)))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    stream = engine.stream(greedy(prompt_of(30), 400))
    await anext(stream)
    await stream.aclose()
    await sequence(engine, greedy(prompt_of(30), 3))  # and the engine goes on
    assert engine.stats.running == 0


async def test_bad_requests_say_what_is_wrong(engine):
    with pytest.raises(tinsmith.InvalidInput, match="token 336 at position 1, outside"):
        await engine.sample(greedy([3, 336]))
    with pytest.raises(tinsmith.InvalidInput, match="prompt of 510 tokens and max_tokens=12"):
        await engine.sample(greedy(np.zeros(510, np.int64)))
    with pytest.raises(
        tinsmith.InvalidInput, match="target_prompt_logprobs holds token 400 at pos"
    ):
        await engine.sample(greedy([1, 2], target_prompt_logprobs=[[3, 400]]))
    for name in ("topk_prompt_logprobs", "topk_sample_logprobs"):
        with pytest.raises(tinsmith.InvalidInput, match=f"{name}=337 is more than the vocab"):
            await engine.sample(greedy([1, 2], **{name: 337}))
    with pytest.raises(tinsmith.InvalidInput, match="prompt is empty"):
        SampleRequest([])
    with pytest.raises(tinsmith.InvalidInput, match="prompt holds a negative token"):
        SampleRequest([1, -2])
    with pytest.raises(tinsmith.InvalidInput, match=r"adapter of run 'x': \(3,\) parameters"):
        await engine.add_adapter("x", 1, LoraConfig(rank=4), np.zeros(3, np.float32))
