from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest

from tinsmith.engines.sampling import draw, uniforms


def reference_probs(logits, temperature, top_k, top_p):
    """The distribution by sorting, in float64."""
    p = torch.softmax(torch.tensor(logits, dtype=torch.float64) / temperature, 0).numpy()
    order = np.argsort(-p)
    keep = order[:top_k] if top_k > 0 else order
    if top_p < 1:
        q = p[keep] / p[keep].sum()
        keep = keep[: np.searchsorted(np.cumsum(q), top_p) + 1]
    restricted = np.zeros_like(p)
    restricted[keep] = p[keep]
    return p, restricted / restricted.sum()


@pytest.mark.parametrize("vocab", [7, 256, 1000])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, -1, 1.0), (0.7, 4, 1.0), (1.3, -1, 0.6), (1.0, 5, 0.8)],
)
def test_draws_follow_the_distribution(vocab, temperature, top_k, top_p):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, vocab).astype(np.float32)
    full, expected = reference_probs(logits, temperature, top_k, top_p)
    count = 20_000
    ones = np.ones(count)
    tokens, logprobs = draw(
        torch.tensor(logits).repeat(count, 1),
        ones * temperature,
        (ones * top_k).astype(int),
        ones * top_p,
        rng.random(count),
    )
    drawn = np.bincount(tokens.numpy(), minlength=vocab)
    assert drawn[expected == 0].sum() == 0
    common = expected * count >= 5
    observed = np.append(drawn[common], drawn[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum()) * count
    if wanted[-1] == 0:
        observed, wanted = observed[:-1], wanted[:-1]
    assert chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue > 1e-4
    # Logprobs are of the distribution before top_k and top_p.
    np.testing.assert_allclose(logprobs, np.log(full)[tokens.numpy()], atol=1e-5)


def test_extreme_uniforms_never_leave_the_support():
    logits = torch.full((2, 1000), -torch.inf)
    logits[:, 300] = 0.0
    logits[:, 700] = 0.0
    tokens, _ = draw(logits, np.ones(2), np.full(2, -1), np.ones(2), np.array([0.0, 1 - 2.0**-53]))
    assert tokens.tolist() == [300, 700]


def test_greedy_and_drawn_rows_stand_side_by_side():
    rng = np.random.default_rng(1)
    logits = torch.tensor(rng.normal(size=(4, 50)), dtype=torch.float32)
    expected = logits.log_softmax(-1)
    tokens, logprobs = draw(
        logits.clone(), np.array([0, 1, 0, 1.0]), np.full(4, -1), np.ones(4), rng.random(4)
    )
    assert tokens[[0, 2]].tolist() == logits.argmax(-1)[[0, 2]].tolist()
    torch.testing.assert_close(logprobs, expected.gather(1, tokens[:, None])[:, 0])


def test_uniforms_are_uniform_and_independent_over_streams():
    positions = np.arange(20_000)
    zeros = np.zeros_like(positions)
    streams = [
        uniforms(zeros, zeros, positions),
        uniforms(positions, zeros, zeros),
        uniforms(zeros, positions, zeros),
    ]
    for stream in streams:
        assert kstest(stream, "uniform").pvalue > 1e-4
        assert abs(np.corrcoef(stream[:-1], stream[1:])[0, 1]) < 0.03
    assert abs(np.corrcoef(streams)[np.triu_indices(3, 1)]).max() < 0.03
