"""Attention over a packed forest against a softmax over all pairs of rows."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinsmith.engines.tree_attention import TreeAttention, cuts

HEADS, GROUPS, SIZE, SCALE = 4, 2, 8, 0.3


@st.composite
def forests(draw) -> tuple[list[int], list[tuple[int, ...]]]:
    """Segments of lengths around those where they are cut, after any that came before; several of one length
    with the same ancestors stand side by side."""
    segments: list[int] = []
    paths: list[tuple[int, ...]] = []
    for _ in range(draw(st.integers(1, 4))):
        length = draw(st.sampled_from([1, 5, 63, 64, 127, 128, 200, 255, 256, 512, 513]))
        parent = draw(st.integers(-1, len(segments) - 1))
        path = () if parent < 0 else (*paths[parent], parent)
        alike = draw(st.integers(1, 3))
        segments += alike * [length]
        paths += alike * [path]
    return segments, paths


def plain(q_HTE, k_GTE, v_GTE, visible_TT):
    k, v = (x.repeat_interleave(HEADS // GROUPS, 0) for x in (k_GTE, v_GTE))
    scores = (q_HTE @ k.transpose(1, 2)) * SCALE
    return (scores.masked_fill(~visible_TT, -torch.inf).softmax(-1) @ v).transpose(0, 1)


def visible(segments, paths) -> torch.Tensor:
    """Bool `[T, T]`: which rows each row sees."""
    starts = [0, *accumulate(segments)]
    seen = torch.zeros(starts[-1], starts[-1], dtype=torch.bool)
    for index, path in enumerate(paths):
        rows = slice(starts[index], starts[index + 1])
        for ancestor in path:
            seen[rows, starts[ancestor] : starts[ancestor + 1]] = True
        seen[rows, rows] = torch.ones(segments[index], segments[index], dtype=torch.bool).tril()
    return seen


@settings(max_examples=40, deadline=None)
@given(forests(), st.data())
def test_outputs_and_gradients_are_those_of_all_pairs(forest, data):
    segments, paths = forest
    first = data.draw(st.integers(0, len(segments) - 1))
    own = (first, data.draw(st.integers(first + 1, len(segments))))
    starts = [0, *accumulate(segments)]
    here = slice(starts[own[0]], starts[own[1]])
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(n, starts[-1], SIZE, dtype=torch.float64, requires_grad=True)
        for n in (HEADS, GROUPS, GROUPS)
    )
    attention = TreeAttention(
        segments, paths, HEADS // GROUPS, torch.device("cpu"), torch.float64, own
    )
    got = attention(0, q[:, here], k, v, SCALE)
    wanted = plain(q, k, v, visible(segments, paths))[here]
    assert torch.allclose(got, wanted, atol=1e-12)
    dy = torch.randn_like(wanted)
    for a, b in zip(
        torch.autograd.grad(got, (q, k, v), dy),
        torch.autograd.grad(wanted, (q, k, v), dy),
        strict=True,
    ):
        assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 63, 64, 127, 128, 255, 256, 300, 511, 512, 513, 2000])
def test_pieces_are_whole_and_of_64_rows_or_more(rows):
    pieces = cuts(rows, "cpu")
    assert [start for start, _ in pieces] == [0, *(stop for _, stop in pieces[:-1])]
    assert pieces[-1][1] == rows
    assert len(pieces) == (min(4, max(1, rows // 64)) if rows <= 512 else 1)
    assert cuts(rows, "cuda") == [(0, rows)]
