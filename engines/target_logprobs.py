"""Logprobs of chosen target tokens without ever holding all the logits.

The logits of a chunk of rows are formed, reduced to what forward and backward need, and dropped.
With `P` the softmax of a row's logits, `d logprob[t] / d h = W[t] - P W`, so keeping `P W` (one
vector per row) makes the backward pass a matter of indexing. Only a trained unembedding's B needs
`P` itself again, and recomputes it.

Dimension names: N rows with a target, M (row, target) pairs, C rows of a chunk, D hidden size,
V vocabulary, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .products import rows_times, rows_times_transposed

CHUNK_ROWS = 512


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


def _chunks(rows: int, bounds: Sequence[tuple[int, int, float]]) -> list[tuple[int, int, int]]:
    """Cut `[0, rows)` into `(start, stop, span index or -1)` of at most `CHUNK_ROWS` rows."""
    pieces, position = [], 0
    for index, (start, stop, _) in enumerate(bounds):
        pieces += [(position, start, -1), (start, stop, index)]
        position = stop
    pieces.append((position, rows, -1))
    return [
        (chunk, min(chunk + CHUNK_ROWS, stop), index)
        for start, stop, index in pieces
        for chunk in range(start, stop, CHUNK_ROWS)
    ]


class _TargetLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_ND, rows_M, targets_M, w_VD, bounds, *factors):  # type: ignore[no-untyped-def]
        chunks = _chunks(len(h_ND), bounds)
        starts = torch.tensor([start for start, _, _ in chunks], device=rows_M.device)
        edges = [*torch.searchsorted(rows_M, starts).tolist(), len(rows_M)]
        p_M = torch.empty(len(rows_M), dtype=torch.float32, device=h_ND.device)
        lse_N = torch.empty(len(h_ND), dtype=torch.float32, device=h_ND.device)
        grads = any(ctx.needs_input_grad)
        mean_w_ND = torch.empty_like(h_ND) if grads else None
        mean_b: list[Tensor] = []
        if grads:
            mean_b = [
                torch.empty(stop - start, b.shape[1], dtype=b.dtype, device=b.device)
                for (start, stop, _), b in zip(bounds, factors[1::2], strict=True)
            ]
        for (start, stop, span), first, last in zip(chunks, edges, edges[1:], strict=False):
            logits_CV = _logits(h_ND[start:stop], w_VD, bounds, factors, span)
            # In place: a chunk's logits are by far the largest thing here.
            top_C1 = logits_CV.amax(1, keepdim=True)
            chosen = (rows_M[first:last] - start, targets_M[first:last])
            p_M[first:last] = logits_CV.sub_(top_C1)[chosen].float()
            total_C1 = logits_CV.exp_().sum(1, keepdim=True, dtype=torch.float32)
            lse_C1 = total_C1.log()
            p_M[first:last] -= lse_C1[chosen[0], 0]
            lse_N[start:stop] = (lse_C1 + top_C1)[:, 0]
            if mean_w_ND is not None:
                share_C1 = total_C1.reciprocal().to(logits_CV.dtype)
                mean_w_ND[start:stop] = rows_times_transposed(logits_CV, w_VD).mul_(share_C1)
                if span >= 0:
                    offset = bounds[span][0]
                    b_VR = factors[2 * span + 1].to(logits_CV.dtype)
                    mean_b[span][start - offset : stop - offset] = (logits_CV @ b_VR) * share_C1
        if grads:
            ctx.chunks, ctx.edges, ctx.bounds = chunks, edges, bounds
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
            here = slice(*torch.searchsorted(rows_M, rows_M.new_tensor([start, stop])).tolist())
            rows, targets, dp = rows_M[here] - start, targets_M[here], dp_M[here]
            dxa_SR = mean_b[index] * -dp_N[start:stop, None].to(b_VR.dtype)
            dxa_SR.index_add_(0, rows, b_VR[targets] * dp[:, None].to(b_VR.dtype))
            dxa_SR *= scale
            out.append(dxa_SR.T @ h_ND[start:stop].to(a_RD.dtype))
            dh_ND[start:stop] += (dxa_SR @ a_RD).to(h_ND.dtype)
            out.append(torch.zeros_like(b_VR))
        for (start, stop, span), first, last in zip(
            ctx.chunks, ctx.edges, ctx.edges[1:], strict=False
        ):
            if span < 0:
                continue
            h_CD, a_RD = h_ND[start:stop], factors[2 * span]
            db_VR, scale = out[2 * span + 1], ctx.bounds[span][2]
            assert db_VR is not None
            xa_CR = h_CD.to(a_RD.dtype) @ a_RD.T * scale
            logits_CV = _logits(h_CD, w_VD, ctx.bounds, factors, span)
            softmax_CV = logits_CV.sub_(lse_N[start:stop, None]).exp_()
            weighted_CR = xa_CR * -dp_N[start:stop, None]
            db_VR.addmm_(softmax_CV.T.to(db_VR.dtype), weighted_CR.to(db_VR.dtype))
            db_VR.index_add_(
                0,
                targets_M[first:last],
                xa_CR[rows_M[first:last] - start] * dp_M[first:last, None],
            )
        return dh_ND, None, None, None, None, *out


def _logits(h_CD, w_VD, bounds, factors, span):  # type: ignore[no-untyped-def]
    logits_CV = rows_times(h_CD, w_VD)
    if span >= 0:
        a_RD, b_VR = (factor.to(h_CD.dtype) for factor in factors[2 * span : 2 * span + 2])
        logits_CV.addmm_(h_CD @ a_RD.T, b_VR.T, alpha=bounds[span][2])
    return logits_CV
