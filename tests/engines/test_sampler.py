"""The torch sampling engine against transformers, and its promises about batches and memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM, AutoTokenizer

import tinsmith
from tinsmith.engines.backbone import Backbone
from tinsmith.engines.sampler import SamplerEngine
from tinsmith.primitives.types import (
    LoraConfig,
    PolicyRef,
    SampleRequest,
    SamplingParams,
)

BLOCK_BYTES = 2 * 2 * 2 * 16 * 4 * 16  # keys and values, layers, heads, head size, float32, tokens


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def model_path(request, tiny_llama, tiny_qwen2, tiny_qwen3) -> str:
    return {"llama": tiny_llama, "qwen2": tiny_qwen2, "qwen3": tiny_qwen3}[request.param]


@pytest.fixture(scope="module")
def llama(tiny_llama):
    return Backbone(tiny_llama), AutoTokenizer.from_pretrained(tiny_llama)


def make_engine(llama, blocks=400, **options) -> SamplerEngine:
    return SamplerEngine(*llama, kv_bytes=blocks * BLOCK_BYTES, **options)


def finish(engine, *numbers):
    """Step until all is done; the responses by request number."""
    responses = {}
    while engine.busy:
        for event in engine.step():
            assert event.error is None
            if event.response is not None:
                responses[event.request] = event.response
    return [responses[n] for n in numbers] if numbers else responses


def random_adapter(engine, run_id, version, seed, rank=4, **groups):
    config = LoraConfig(rank=rank, **groups)
    layout = engine.backbone.layout(config)
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randn(layout.size, generator=generator) * 0.1
    engine.add_adapter(run_id, version, config, flat)


def greedy(prompt, tokens=12, **kwargs):
    return SampleRequest(
        prompt, SamplingParams(max_tokens=tokens, temperature=0, stop=[]), **kwargs
    )


BASE_MODEL = PolicyRef()


def seeded(prompt, seed, tokens=12, policy=BASE_MODEL, samples=1, **params):
    return SampleRequest(
        prompt, SamplingParams(max_tokens=tokens, stop=[], seed=seed, **params), policy, samples
    )


@pytest.mark.parametrize("reorder", [False, True])
def test_greedy_tokens_and_logprobs_equal_generates(model_path, reorder):
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    engine = SamplerEngine(
        Backbone(model_path), tokenizer, kv_bytes=1 << 24, max_step_rows=48, reorder=reorder
    )
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 336, n) for n in (1, 5, 16, 33, 60, 100)]
    numbers = [engine.submit(greedy(p, 20)) for p in prompts]
    for prompt, response in zip(prompts, finish(engine, *numbers), strict=True):
        tokens = torch.tensor(prompt)[None]
        expected = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=20,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0]
        sequence = response.sequences[0]
        assert sequence.tokens.tolist() == expected[len(prompt) :].tolist()
        logprobs = model(expected[None]).logits[0].log_softmax(-1)
        want = logprobs[len(prompt) - 1 : -1].gather(1, expected[len(prompt) :, None])[:, 0]
        np.testing.assert_allclose(sequence.logprobs, want.detach(), atol=1e-4)


def test_a_groups_prompt_is_computed_once(llama):
    engine = make_engine(llama)
    prompt = np.arange(100)
    engine.submit(seeded(prompt, 0, samples=8))
    finish(engine)
    assert engine.stats.prompt_tokens == 100
    # The same prompt again, by many requests at once: only its last, partly filled block.
    for seed in range(8):
        engine.submit(seeded(prompt, seed))
    responses = finish(engine)
    assert engine.stats.prompt_tokens == 100 + 8 * 4
    assert all(r.prompt_cache_hit_tokens == 96 for r in responses.values())


def test_requests_with_one_prompt_at_once_share_its_computation(llama):
    engine = make_engine(llama)
    numbers = [engine.submit(seeded(np.arange(100), seed)) for seed in range(8)]
    together = finish(engine, *numbers)
    # Only the last token, whose hidden state is needed, is computed again.
    assert engine.stats.prompt_tokens == 100 + 7
    assert engine.pool.in_use == 0
    for seed, response in enumerate(together):
        alone = make_engine(llama)
        (expected,) = finish(alone, alone.submit(seeded(np.arange(100), seed)))
        sampled, wanted = response.sequences[0], expected.sequences[0]
        assert sampled.tokens.tolist() == wanted.tokens.tolist()
        np.testing.assert_allclose(sampled.logprobs, wanted.logprobs, atol=1e-4)


def test_a_next_turn_reuses_what_was_sampled(llama):
    engine = make_engine(llama)
    first = finish(engine, engine.submit(seeded(np.arange(40), 0, 40)))[0]
    grown = np.concatenate([np.arange(40), first.sequences[0].tokens, np.arange(10)])
    second = finish(engine, engine.submit(seeded(grown, 1)))[0]
    assert second.prompt_cache_hit_tokens == 64  # 79 tokens were cached: four whole blocks
    fresh = make_engine(llama)
    expected = finish(fresh, fresh.submit(seeded(grown, 1)))[0]
    np.testing.assert_allclose(
        second.sequences[0].logprobs, expected.sequences[0].logprobs, atol=1e-4
    )


def test_cached_blocks_of_other_weights_are_not_reused(llama):
    engine = make_engine(llama)
    random_adapter(engine, "a", 1, seed=1)
    finish(engine, engine.submit(greedy(np.arange(64))))
    response = finish(engine, engine.submit(greedy(np.arange(64), policy=PolicyRef("a"))))[0]
    assert response.prompt_cache_hit_tokens == 0


def test_weights_published_again_under_an_old_version_do_not_meet_its_cache(llama):
    engine = make_engine(llama)
    prompt = np.arange(40)
    random_adapter(engine, "a", 1, seed=1)
    finish(engine, engine.submit(seeded(prompt, 0, 5, PolicyRef("a", 1))))
    random_adapter(engine, "a", 1, seed=1)  # the very same: its cache still holds
    same = finish(engine, engine.submit(seeded(prompt, 0, 5, PolicyRef("a", 1))))[0]
    assert same.prompt_cache_hit_tokens == 32
    random_adapter(engine, "a", 1, seed=2)  # as after going back to an older checkpoint
    other = finish(engine, engine.submit(seeded(prompt, 0, 5, PolicyRef("a", 1))))[0]
    assert other.prompt_cache_hit_tokens == 0


def test_dropping_a_run_fails_its_requests_and_frees_their_memory(llama):
    engine = make_engine(llama)
    random_adapter(engine, "a", 1, seed=1)
    running = engine.submit(greedy([1, 2, 3], 50, policy=PolicyRef("a")))
    engine.step()
    engine.drop_run("a")
    (event,) = engine.step()
    assert event.request == running
    assert isinstance(event.error, tinsmith.NotFound)
    assert engine.pool.in_use == 0
    assert not engine.busy


def test_a_full_cache_makes_requests_wait_and_loses_none(llama):
    engine = make_engine(llama, blocks=12)
    rng = np.random.default_rng(4)
    prompts = [rng.integers(0, 336, 30) for _ in range(10)]
    numbers = [engine.submit(seeded(p, i, 20, samples=2)) for i, p in enumerate(prompts)]
    engine.step()
    assert engine.stats.waiting > 0
    tight = finish(engine, *numbers)
    assert engine.pool.reserved == 0
    assert engine.pool.in_use == 0
    roomy = make_engine(llama)
    numbers = [roomy.submit(seeded(p, i, 20, samples=2)) for i, p in enumerate(prompts)]
    for a, b in zip(tight, finish(roomy, *numbers), strict=True):
        assert [s.tokens.tolist() for s in a.sequences] == [s.tokens.tolist() for s in b.sequences]


def test_what_can_never_fit_is_refused(llama):
    engine = make_engine(llama, blocks=4)
    with pytest.raises(tinsmith.OutOfCapacity, match="need 5 cache blocks, the sampler has 4"):
        engine.submit(seeded(np.arange(40), 0, 40))
    engine.submit(seeded(np.arange(40), 0, 24))
    assert len(finish(engine)) == 1


def test_a_live_request_goes_on_under_a_new_version_and_a_pinned_one_does_not_notice(llama):
    engine = make_engine(llama)
    random_adapter(engine, "a", 1, seed=1)
    live = engine.submit(seeded(np.arange(40), 3, 30, PolicyRef("a")))
    pinned = engine.submit(seeded(np.arange(40), 3, 30, PolicyRef("a", 1)))
    for _ in range(10):
        engine.step()
    random_adapter(engine, "a", 2, seed=2)
    live_response, pinned_response = finish(engine, live, pinned)
    versions = live_response.sequences[0].versions.tolist()
    assert versions == [1] * 10 + [2] * 20
    assert (pinned_response.sequences[0].versions == 1).all()
    tokens = [r.sequences[0].tokens.tolist() for r in (live_response, pinned_response)]
    assert tokens[0][:10] == tokens[1][:10]
    assert tokens[0] != tokens[1]
    # Nothing computed under mixed weights may serve a later request.
    grown = np.concatenate([np.arange(40), live_response.sequences[0].tokens])
    later = finish(engine, engine.submit(seeded(grown, 0, 5, PolicyRef("a", 2))))[0]
    fresh = make_engine(llama)
    random_adapter(fresh, "a", 2, seed=2)
    expected = finish(fresh, fresh.submit(seeded(grown, 0, 5, PolicyRef("a", 2))))[0]
    np.testing.assert_allclose(
        later.sequences[0].logprobs, expected.sequences[0].logprobs, atol=1e-4
    )


def reference_logprobs(model_path, tokens, temperature=1.0):
    """float32 `[len(tokens), V]` by the model's own forward pass."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    logits = model(torch.tensor(tokens)[None]).logits[0].detach()
    return (logits / temperature).log_softmax(-1)


def at(logprobs, tokens):
    return logprobs.gather(1, torch.tensor(tokens)[:, None])[:, 0].numpy()


def test_prompt_logprobs_equal_the_models(model_path):
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    engine = SamplerEngine(Backbone(model_path), tokenizer, kv_bytes=1 << 24, max_step_rows=30)
    prompt = np.random.default_rng(5).integers(0, 336, 100)
    finish(engine, engine.submit(greedy(prompt)))  # a cached prefix must not cost any logprob
    # Logprobs of prompt tokens are at temperature 1 whatever the request's.
    params = SamplingParams(max_tokens=1, temperature=0.5)
    request = SampleRequest(prompt, params, prompt_logprobs=True, topk_prompt_logprobs=3)
    response = finish(engine, engine.submit(request))[0]
    logprobs = reference_logprobs(model_path, prompt)
    assert np.isnan(response.prompt_logprobs[0])
    np.testing.assert_allclose(
        response.prompt_logprobs[1:], at(logprobs[:-1], prompt[1:]), atol=1e-4
    )
    top = response.topk_prompt_logprobs
    assert top.tokens.shape == top.logprobs.shape == (100, 3)
    assert np.isnan(top.logprobs[0]).all()
    assert (top.tokens[0] == 0).all()
    values, ids = logprobs[:-1].topk(3)
    np.testing.assert_array_equal(top.tokens[1:], ids)
    np.testing.assert_allclose(top.logprobs[1:], values, atol=1e-4)


@pytest.mark.parametrize("max_step_rows", [13, 768])
def test_the_last_n_prompt_logprobs_leave_the_prefix_to_the_cache(tiny_llama, llama, max_step_rows):
    prompt = np.random.default_rng(6).integers(0, 336, 100)
    logprobs = reference_logprobs(tiny_llama, prompt)
    for last_n, hits in ((1, 96), (3, 96), (4, 80), (50, 48), (99, 0)):
        engine = make_engine(llama, max_step_rows=max_step_rows)
        finish(engine, engine.submit(greedy(prompt)))
        request = SampleRequest(
            prompt,
            SamplingParams(max_tokens=1),
            prompt_logprobs=True,
            topk_prompt_logprobs=2,
            prompt_logprobs_last_n=last_n,
        )
        response = finish(engine, engine.submit(request))[0]
        assert response.prompt_cache_hit_tokens == hits
        scored = slice(100 - last_n, 100)
        got = response.prompt_logprobs
        assert np.isnan(got[: 100 - last_n]).all()
        assert np.isnan(response.topk_prompt_logprobs.logprobs[: 100 - last_n]).all()
        np.testing.assert_allclose(got[scored], at(logprobs[:-1], prompt[1:])[-last_n:], atol=1e-4)
        values, ids = logprobs[:-1][-last_n:].topk(2)
        np.testing.assert_array_equal(response.topk_prompt_logprobs.tokens[scored], ids)
        np.testing.assert_allclose(
            response.topk_prompt_logprobs.logprobs[scored], values, atol=1e-4
        )


def test_scoring_the_end_of_a_prompt_under_way_shares_its_computation(tiny_llama, llama):
    prompt = np.random.default_rng(6).integers(0, 336, 100)
    engine = make_engine(llama)
    drawing = engine.submit(greedy(prompt, 30))
    engine.step()
    scoring = SampleRequest(
        prompt, SamplingParams(max_tokens=1), prompt_logprobs=True, prompt_logprobs_last_n=10
    )
    _, response = finish(engine, drawing, engine.submit(scoring))
    assert response.prompt_cache_hit_tokens == 89  # copied, but what predicts the last 10
    expected = at(reference_logprobs(tiny_llama, prompt)[:-1], prompt[1:])
    np.testing.assert_allclose(response.prompt_logprobs[90:], expected[89:], atol=1e-4)


@pytest.mark.parametrize("max_step_rows", [7, 768])
def test_target_prompt_logprobs_equal_the_models(tiny_llama, llama, max_step_rows):
    rng = np.random.default_rng(7)
    prompt = rng.integers(0, 336, 60)
    targets = np.where(rng.random((59, 5)) < 0.5, -1, rng.integers(0, 336, (59, 5)))
    targets[:40] = -1
    targets[40, 0] = 7
    engine = make_engine(llama, max_step_rows=max_step_rows)
    finish(engine, engine.submit(greedy(prompt)))
    request = SampleRequest(
        prompt, SamplingParams(max_tokens=1, temperature=2.0), target_prompt_logprobs=targets
    )
    response = finish(engine, engine.submit(request))[0]
    got = response.target_prompt_logprobs
    assert got.dtype == np.float32
    expected = reference_logprobs(tiny_llama, prompt)[:-1].gather(
        1, torch.tensor(np.maximum(targets, 0))
    )
    np.testing.assert_allclose(got, np.where(targets >= 0, expected, 0), atol=1e-4)
    assert response.prompt_logprobs is None
    # Token 41 is the first to be scored, from the hidden state of token 40.
    assert response.prompt_cache_hit_tokens == 32


def test_alternative_prompt_tokens_are_drawn_from_the_models_distribution(tiny_llama, llama):
    prompt, count = np.random.default_rng(8).integers(0, 336, 5), 4000
    engine = make_engine(llama, max_step_rows=3)
    request = SampleRequest(
        prompt, SamplingParams(max_tokens=1, temperature=0.7, seed=3), prompt_alt_tokens_k=count
    )
    alternatives = finish(engine, engine.submit(request))[0].prompt_alt_tokens
    assert alternatives.tokens.shape == alternatives.logprobs.shape == (4, count)
    tempered = reference_logprobs(tiny_llama, prompt, 0.7)[:-1].double().exp().numpy()
    logprobs = reference_logprobs(tiny_llama, prompt)[:-1]
    for row in range(4):
        drawn = np.bincount(alternatives.tokens[row], minlength=336)
        expected = tempered[row] * count
        common = expected >= 5
        observed = np.append(drawn[common], drawn[~common].sum())
        wanted = np.append(expected[common], expected[~common].sum())
        assert chisquare(observed, wanted * count / wanted.sum()).pvalue > 1e-4
        np.testing.assert_allclose(
            alternatives.logprobs[row], logprobs[row].numpy()[alternatives.tokens[row]], atol=1e-4
        )
    again = finish(engine, engine.submit(request))[0].prompt_alt_tokens
    np.testing.assert_array_equal(again.tokens, alternatives.tokens)


def test_more_alternatives_than_memory_holds_are_refused(llama):
    request = SampleRequest([1, 2], SamplingParams(max_tokens=1), prompt_alt_tokens_k=1 << 40)
    with pytest.raises(tinsmith.InvalidInput, match="prompt_alt_tokens_k must be at most"):
        make_engine(llama).submit(request)


def test_alternative_prompt_tokens_at_temperature_0_are_the_likeliest(tiny_llama, llama):
    prompt = np.random.default_rng(9).integers(0, 336, 20)
    engine = make_engine(llama)
    request = SampleRequest(
        prompt, SamplingParams(max_tokens=1, temperature=0), prompt_alt_tokens_k=2
    )
    alternatives = finish(engine, engine.submit(request))[0].prompt_alt_tokens
    best = reference_logprobs(tiny_llama, prompt)[:-1].argmax(-1)
    np.testing.assert_array_equal(alternatives.tokens, np.stack([best, best], 1))


def test_a_prompt_as_long_as_the_context_is_scored_to_its_end(tiny_llama, llama):
    engine = make_engine(llama)
    prompt = np.random.default_rng(10).integers(0, 336, 512)
    request = SampleRequest(prompt, SamplingParams(max_tokens=1), prompt_logprobs=True)
    response = finish(engine, engine.submit(request))[0]
    expected = at(reference_logprobs(tiny_llama, prompt)[:-1], prompt[1:])
    np.testing.assert_allclose(response.prompt_logprobs[1:], expected, atol=1e-4)
    assert len(response.sequences[0].tokens) == 1


def test_a_prompt_of_one_token_has_nothing_to_score(llama):
    engine = make_engine(llama)
    request = SampleRequest(
        [5],
        SamplingParams(max_tokens=1),
        prompt_logprobs=True,
        topk_prompt_logprobs=2,
        prompt_alt_tokens_k=3,
    )
    response = finish(engine, engine.submit(request))[0]
    assert np.isnan(response.prompt_logprobs).tolist() == [True]
    assert response.topk_prompt_logprobs.tokens.shape == (1, 2)
    assert response.prompt_alt_tokens.tokens.shape == (0, 3)


def test_a_cancelled_request_frees_its_memory(llama):
    engine = make_engine(llama, blocks=20)
    running = engine.submit(seeded(np.arange(60), 0, 100))
    waiting = engine.submit(seeded(np.arange(60), 1, 200))
    engine.step()
    engine.cancel(running)
    engine.cancel(waiting)
    assert not engine.busy
    assert engine.pool.in_use == engine.pool.reserved == 0
