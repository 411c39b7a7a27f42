"""Logprobs of chosen target tokens without ever holding all the logits.

The logits of a block of rows and vocabulary are formed, reduced to what forward and backward need, and
dropped while they are in a CPU's cache; a row's largest logit so far scales what was summed before it
(Milakov & Gimelshein, "Online normalizer calculation for softmax", 2018). With `P` the softmax of a row's
logits, `d logprob[t] / d h = W[t] - P W`, so keeping `P W` (one vector per row) makes the backward pass a
matter of indexing. Only a trained unembedding's B needs `P` itself again, and recomputes it.

Dimension names: N rows with a target, M (row, target) pairs, C rows of a block, W its part of the
vocabulary V, D hidden size, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .products import rows_times, rows_times_transposed

BLOCK_ROWS, BLOCK_TOKENS = 2048, 2048


@dataclass(frozen=True, eq=False)
class UnembedSpan:
    """Rows `[start, stop)` have `scale * B A` added to their unembedding; A `[R, D]`, B `[V, R]`."""

    start: int
    stop: int
    scale: float
    a: Tensor
    b: Tensor


def target_logprobs(
    hidden_ND: Tensor,
    pair_rows_M: Tensor,
    targets_M: Tensor,
    unembedding_VD: Tensor,
    spans: Sequence[UnembedSpan] = (),
) -> Tensor:
    """Float32 `[M]`: the logprob of `targets[m]` at row `pair_rows[m]`.

    Args:
        hidden_ND: final hidden states.
        pair_rows_M: int64, ascending; every row has at least one pair.
        targets_M: int64 token ids.
        unembedding_VD: frozen.
        spans: disjoint, in order.
    """
    factors = [factor for span in spans for factor in (span.a, span.b)]
    bounds = tuple((span.start, span.stop, span.scale) for span in spans)
    return _TargetLogprobs.apply(
        hidden_ND, pair_rows_M, targets_M, unembedding_VD, bounds, *factors
    )


def _row_blocks(rows: int, bounds: Sequence[tuple[int, int, float]]) -> list[tuple[int, int, int]]:
    """Cut `[0, rows)` into `(start, stop, span index or -1)` of at most `BLOCK_ROWS` rows."""
    pieces, position = [], 0
    for index, (start, stop, _) in enumerate(bounds):
        pieces += [(position, start, -1), (start, stop, index)]
        position = stop
    pieces.append((position, rows, -1))
    return [
        (first, min(first + BLOCK_ROWS, stop), index)
        for start, stop, index in pieces
        for first in range(start, stop, BLOCK_ROWS)
    ]


class _TargetLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_ND, rows_M, targets_M, w_VD, bounds, *factors):  # type: ignore[no-untyped-def]
        grads = any(ctx.needs_input_grad)
        blocks = _row_blocks(len(h_ND), bounds)
        lse_N = torch.empty(len(h_ND), dtype=torch.float32, device=h_ND.device)
        mean_w_ND = torch.empty_like(h_ND) if grads else None
        mean_b = [
            b.new_empty(stop - start, b.shape[1])
            for (start, stop, _), b in zip(bounds, factors[1::2], strict=True)
            if grads
        ]
        for start, stop, span in blocks:
            adapter = _adapter(bounds, factors, span)
            lse_C, means = _reduced(h_ND[start:stop], w_VD, adapter, grads)
            lse_N[start:stop] = lse_C
            if mean_w_ND is not None:
                mean_w_ND[start:stop] = means[0]
            if grads and span >= 0:
                first = bounds[span][0]
                mean_b[span][start - first : stop - first] = means[1]
        p_M = _dots(h_ND, w_VD, rows_M, targets_M) - lse_N[rows_M]
        for (start, stop, scale), a_RD, b_VR in zip(
            bounds, factors[::2], factors[1::2], strict=True
        ):
            here = _pairs(rows_M, start, stop)
            xa_SR = h_ND[start:stop].to(a_RD.dtype) @ a_RD.T
            p_M[here] += _dots(xa_SR, b_VR, rows_M[here] - start, targets_M[here]) * scale
        if grads:
            ctx.blocks, ctx.bounds = blocks, bounds
            ctx.save_for_backward(
                h_ND, rows_M, targets_M, w_VD, lse_N, mean_w_ND, *mean_b, *factors
            )
        return p_M

    @staticmethod
    def backward(ctx: Any, *grads):  # type: ignore[no-untyped-def]
        (dp_M,) = grads
        h_ND, rows_M, targets_M, w_VD, lse_N, mean_w_ND, *rest = ctx.saved_tensors
        count = len(ctx.bounds)
        mean_b, factors = rest[:count], rest[count:]
        dp_N = torch.zeros(len(h_ND), dtype=dp_M.dtype, device=dp_M.device)
        dp_N.index_add_(0, rows_M, dp_M)
        # d loss / d h through the frozen unembedding.
        dh_ND = mean_w_ND * -dp_N[:, None].to(h_ND.dtype)
        dh_ND.index_add_(0, rows_M, w_VD[targets_M] * dp_M[:, None].to(h_ND.dtype))
        out: list[Tensor | None] = []
        for index, (start, stop, scale) in enumerate(ctx.bounds):
            a_RD, b_VR = factors[2 * index], factors[2 * index + 1]
            here = _pairs(rows_M, start, stop)
            rows, targets, dp = rows_M[here] - start, targets_M[here], dp_M[here]
            dxa_SR = mean_b[index] * -dp_N[start:stop, None].to(b_VR.dtype)
            dxa_SR.index_add_(0, rows, b_VR[targets] * dp[:, None].to(b_VR.dtype))
            dxa_SR *= scale
            h_SD = h_ND[start:stop].to(a_RD.dtype)
            out.append(dxa_SR.T @ h_SD)
            dh_ND[start:stop] += (dxa_SR @ a_RD).to(h_ND.dtype)
            xa_SR = h_SD @ a_RD.T * scale
            db_VR = torch.zeros_like(b_VR)
            db_VR.index_add_(0, targets, xa_SR[rows] * dp[:, None])
            xa_SR *= -dp_N[start:stop, None]
            for first, last, _ in (block for block in ctx.blocks if block[2] == index):
                adapter = _adapter(ctx.bounds, factors, index)
                weighted_CR = xa_SR[first - start : last - start]
                for columns, logits_CW in _logits(h_ND[first:last], w_VD, adapter):
                    softmax_CW = logits_CW.sub_(lse_N[first:last, None]).exp_()
                    db_VR[columns].addmm_(softmax_CW.T.to(b_VR.dtype), weighted_CR)
            out.append(db_VR)
        return dh_ND, None, None, None, None, *out


def _pairs(rows_M: Tensor, start: int, stop: int) -> slice:
    """Those of rows `[start, stop)`."""
    return slice(*torch.searchsorted(rows_M, rows_M.new_tensor([start, stop])).tolist())


def _dots(x_NX: Tensor, y_VX: Tensor, rows_M: Tensor, targets_M: Tensor) -> Tensor:
    """Float32 `[M]`: of a row and a target each."""
    parts = [
        (x_NX[rows].float() * y_VX[targets].float()).sum(1)
        for rows, targets in zip(rows_M.split(BLOCK_ROWS), targets_M.split(BLOCK_ROWS), strict=True)
    ]
    return torch.cat(parts)


def _adapter(bounds, factors, span):  # type: ignore[no-untyped-def]
    """`(scale, A, B)` of a row block's span, if it is in one."""
    return None if span < 0 else (bounds[span][2], *factors[2 * span : 2 * span + 2])


def _reduced(h_CD, w_VD, adapter, means: bool) -> tuple[Tensor, list[Tensor]]:  # type: ignore[no-untyped-def]
    """Of a block of rows the logarithm of the logits' exponentials' sum, `[C]`; and the means under their
    softmax, if they are wanted, of the unembedding's rows and an adapter's B's. Float32."""
    matrices = [w_VD] if adapter is None else [w_VD, adapter[2]]
    sums = [h_CD.new_zeros(len(h_CD), m.shape[1], dtype=torch.float32) for m in matrices if means]
    top_C1 = h_CD.new_full((len(h_CD), 1), -torch.inf, dtype=torch.float32)
    total_C1 = torch.zeros_like(top_C1)
    for columns, logits_CW in _logits(h_CD, w_VD, adapter):
        before_C1, top_C1 = top_C1, torch.maximum(top_C1, logits_CW.amax(1, keepdim=True))
        shrunk_C1 = (before_C1 - top_C1).exp_()
        logits_CW.sub_(top_C1).exp_()
        total_C1.mul_(shrunk_C1).add_(logits_CW.sum(1, keepdim=True, dtype=torch.float32))
        for sum_CX, matrix_VX in zip(sums, matrices, strict=False):
            matrix_WX = matrix_VX[columns].to(logits_CW.dtype)
            sum_CX.mul_(shrunk_C1).add_(rows_times_transposed(logits_CW, matrix_WX))
    return (total_C1.log() + top_C1)[:, 0], [sum_CX.div_(total_C1) for sum_CX in sums]


def _logits(h_CD, w_VD, adapter) -> Iterator[tuple[slice, Tensor]]:  # type: ignore[no-untyped-def]
    """Of a part of the vocabulary after the other."""
    if adapter is not None:
        scale, a_RD, b_VR = adapter
        xa_CR = h_CD @ a_RD.to(h_CD.dtype).T
    for first in range(0, len(w_VD), BLOCK_TOKENS):
        columns = slice(first, first + BLOCK_TOKENS)
        logits_CW = rows_times(h_CD, w_VD[columns])
        if adapter is not None:
            logits_CW.addmm_(xa_CR, b_VR[columns].to(h_CD.dtype).T, alpha=scale)
        yield columns, logits_CW
