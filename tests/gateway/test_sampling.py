"""Everything a sampling request can ask, through the SDK, against the native API or torch."""

from __future__ import annotations

import numpy as np
import pytest
import tinker
import torch
from tinker import types
from transformers import AutoModelForCausalLM

from tests.gateway.sdk import prompt

PROMPT = [10, 20, 30, 40, 50, 60, 70]


@pytest.fixture
def sampler(client):
    return client.create_sampling_client(base_model="tiny-llama").result()


@pytest.fixture(scope="module")
def reference(tiny_home) -> np.ndarray:
    """Logprobs `[P - 1, V]` of what follows each prefix of PROMPT, by transformers."""
    model = AutoModelForCausalLM.from_pretrained(tiny_home / "models" / "tiny-llama")
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT])).logits[0].float()
    return logits.log_softmax(-1).numpy()


def ask(sampler, max_tokens: int = 1, **wanted):
    params = types.SamplingParams(max_tokens=max_tokens, seed=0, stop=[])
    return sampler.sample(prompt(PROMPT), 1, params, **wanted).result()


def test_topk_prompt_logprobs(sampler, reference):
    response = ask(sampler, include_prompt_logprobs=True, topk_prompt_logprobs=5)
    assert response.topk_prompt_logprobs[0] is None
    for row, expected in zip(response.topk_prompt_logprobs[1:], reference, strict=False):
        best = np.argsort(-expected)[:5]
        assert [token for token, _ in row] == best.tolist()
        np.testing.assert_allclose([p for _, p in row], expected[best], atol=1e-4)


def test_topk_sample_logprobs(sampler):
    (sequence,) = ask(sampler, max_tokens=6, topk_sample_logprobs=4).sequences
    assert len(sequence.topk_logprobs) == 6
    for token, logprob, row in zip(
        sequence.tokens, sequence.logprobs, sequence.topk_logprobs, strict=True
    ):
        values = [p for _, p in row]
        assert len(row) == 4
        assert values == sorted(values, reverse=True)
        if token in dict(row):
            assert dict(row)[token] == pytest.approx(logprob, abs=1e-6)


@pytest.mark.parametrize("sparse", [False, True])
def test_target_prompt_logprobs(sampler, reference, sparse):
    ids = torch.full((len(PROMPT) - 1, 8), -1, dtype=torch.int64)
    ids[1, 2], ids[4, 0], ids[4, 7] = 0, 300, 17
    make = types.TensorData.from_torch_sparse if sparse else types.TensorData.from_torch
    targets = make(ids, pad_value=-1) if sparse else make(ids)
    answer = ask(sampler, target_prompt_logprobs=targets).target_prompt_logprobs
    assert (answer.sparse_crow_indices is not None) == sparse
    dense = answer.to_numpy()
    for row, column in np.argwhere(ids.numpy() >= 0):
        assert dense[row, column] == pytest.approx(reference[row, ids[row, column]], abs=1e-4)
    assert (dense[ids.numpy() < 0] == 0).all()


def test_prompt_logprobs_of_the_last_tokens(sampler, reference):
    scored = ask(sampler, include_prompt_logprobs=True, prompt_logprobs_last_n=2).prompt_logprobs
    assert scored[:-2] == [None] * (len(PROMPT) - 2)
    expected = [reference[i - 1, PROMPT[i]] for i in (-2, -1)]
    np.testing.assert_allclose(scored[-2:], expected, atol=1e-4)


def test_prompt_alt_tokens(sampler, reference):
    alternatives = ask(sampler, prompt_alt_tokens_k=6).prompt_alt_tokens
    tokens, logprobs = alternatives.tokens.to_numpy(), alternatives.logprobs.to_numpy()
    assert tokens.shape == logprobs.shape == (len(PROMPT) - 1, 6)
    chosen = np.take_along_axis(reference[:-1], tokens, 1)
    np.testing.assert_allclose(logprobs, chosen, atol=1e-4)
    assert len(np.unique(tokens)) > 6


def test_stops_are_part_of_the_tokens(sampler):
    free = ask(sampler, max_tokens=8).sequences[0].tokens
    params = types.SamplingParams(max_tokens=8, seed=0, stop=[free[3]])
    stopped = sampler.sample(prompt(PROMPT), 1, params).result().sequences[0]
    first = free.index(free[3])
    assert (list(stopped.tokens), stopped.stop_reason) == (list(free[: first + 1]), "stop")


def test_a_prompt_that_fills_the_context_is_scored(sampler):
    tokens = [i % 300 + 3 for i in range(512)]
    assert len(sampler.compute_logprobs(prompt(tokens)).result()) == 512


def test_samples_of_one_request_differ_and_seeds_repeat(sampler):
    params = types.SamplingParams(max_tokens=8, seed=4, stop=[])
    a, b = (sampler.sample(prompt(PROMPT), 4, params).result() for _ in range(2))
    assert [s.tokens for s in a.sequences] == [s.tokens for s in b.sequences]
    assert len({tuple(s.tokens) for s in a.sequences}) > 1


def test_a_handle_makes_the_same_sampler_elsewhere(sampler):
    again = tinker.SamplingClient.from_sampler_handle(sampler.get_sampler_handle())
    assert list(ask(again, 5).sequences[0].tokens) == list(ask(sampler, 5).sequences[0].tokens)
