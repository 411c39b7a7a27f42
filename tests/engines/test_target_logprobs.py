"""Logprobs block by block against `log_softmax` of all logits, and their gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinsmith.engines import target_logprobs as module
from tinsmith.engines.target_logprobs import UnembedSpan, target_logprobs


def plain(h_ND, rows_M, targets_M, w_VD, spans):
    """The same by all logits, in double precision."""
    logits_NV = h_ND @ w_VD.T
    for span in spans:
        here = slice(span.start, span.stop)
        adapted = logits_NV[here] + span.scale * (h_ND[here] @ span.a.T) @ span.b.T
        logits_NV = torch.cat([logits_NV[: span.start], adapted, logits_NV[span.stop :]])
    return logits_NV.log_softmax(-1)[rows_M, targets_M]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 23),
    vocabulary=st.integers(1, 40),
    blocks=st.tuples(st.integers(1, 25), st.integers(1, 45)),
    spread=st.sampled_from([0.0, 1.0, 40.0]),
    cuts=st.lists(st.integers(0, 23), max_size=4),
    seed=st.integers(0, 10**6),
)
def test_blocks_equal_the_whole(rows, vocabulary, blocks, spread, cuts, seed):
    """To 1e-5 of the largest logit or gradient, of outputs and of the gradients of rows, A and B: rows and tokens in blocks
    of any size, spans with adapters and rows without one, several targets of a row, logits far apart."""
    rng = torch.Generator().manual_seed(seed)
    h, w = torch.randn(rows, 6, generator=rng), torch.randn(vocabulary, 6, generator=rng) * spread
    edges = sorted({min(cut, rows) for cut in cuts})
    spans = [
        UnembedSpan(
            start,
            stop,
            0.5 + index,
            torch.randn(2, 6, generator=rng).requires_grad_(),
            torch.randn(vocabulary, 2, generator=rng).requires_grad_(),
        )
        for index, (start, stop) in enumerate(zip(edges[::2], edges[1::2], strict=False))
    ]
    several = torch.randint(0, rows, (5,), generator=rng)
    rows_M = torch.cat([torch.arange(rows), several]).sort().values
    targets_M = torch.randint(0, vocabulary, (len(rows_M),), generator=rng)
    dp_M = torch.randn(len(rows_M), generator=rng)
    h.requires_grad_()
    factors = [factor for span in spans for factor in (span.a, span.b)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK_ROWS", blocks[0])
        patch.setattr(module, "BLOCK_TOKENS", blocks[1])
        ours = target_logprobs(h, rows_M, targets_M, w, spans)
        with torch.no_grad():
            assert torch.equal(target_logprobs(h, rows_M, targets_M, w, spans), ours)
        gradients = torch.autograd.grad(ours, [h, *factors], dp_M)
    wide = [x.detach().double().requires_grad_() for x in (h, *factors)]
    doubled = [
        UnembedSpan(span.start, span.stop, span.scale, a, b)
        for span, a, b in zip(spans, wide[1::2], wide[2::2], strict=True)
    ]
    wanted = plain(wide[0], rows_M, targets_M, w.double(), doubled)
    theirs = torch.autograd.grad(wanted, wide, dp_M.double())
    for one, other in zip((ours, *gradients), (wanted, *theirs), strict=True):
        # What is subtracted from each other may be much larger than the difference.
        atol = 1e-5 * max(float(other.detach().abs().max()), 10 * spread, 10.0)
        torch.testing.assert_close(one.double(), other, rtol=0, atol=atol)


def test_bfloat16_is_as_exact_as_its_logits():
    """Logits of about 10 are rounded to 2^-5; the mean of many is closer."""
    rng = torch.Generator().manual_seed(0)
    h, w = (torch.randn(n, 64, generator=rng).mul_(x).bfloat16() for n, x in ((50, 0.3), (5000, 1)))
    rows = torch.arange(50)
    targets = torch.randint(0, 5000, (50,), generator=rng)
    ours = target_logprobs(h, rows, targets, w)
    wanted = (h.double() @ w.double().T).log_softmax(-1)[rows, targets]
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), wanted, rtol=0, atol=0.06)
