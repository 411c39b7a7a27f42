"""Drawing tokens: one uniform number per token, by its place in its own stream, and the inverse of
the distribution function, so that a seeded request draws the same whatever else is in the batch.

Dimension names: N rows, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_BUCKET = 256


def uniforms(seeds: np.ndarray, samples: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """One number in [0, 1) per row from (seed, sample index, position), float64 `[N]`.

    SplitMix64's output function (Steele, Lea & Flood, 2014) chained over the three.
    """
    with np.errstate(over="ignore"):
        state = np.zeros(len(seeds), np.uint64)
        for word in (seeds, samples, positions):
            state = _mix(state + np.asarray(word, np.uint64) + np.uint64(0x9E3779B97F4A7C15))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def draw(
    logits_NV: Tensor,
    temperatures: np.ndarray,
    top_ks: np.ndarray,
    top_ps: np.ndarray,
    uniforms_N: np.ndarray,
) -> tuple[Tensor, Tensor]:
    """Tokens int64 `[N]` and their logprobs float32 `[N]`; `logits_NV` is overwritten.

    Logprobs are those of `softmax(logits / temperature)` before `top_k` (-1: off) and `top_p`
    (1: off). Temperature 0 takes the likeliest token, with its logprob at temperature 1.
    """
    device = logits_NV.device
    logits_NV = logits_NV.float()
    greedy = temperatures == 0
    scale = torch.from_numpy(np.where(greedy, 1.0, temperatures).astype(np.float32)).to(device)
    if (temperatures != 1).any():
        logits_NV /= scale[:, None]
    best_N = logits_NV.argmax(-1) if greedy.any() else None
    # In place: for memory as large as this the allocator asks the system anew every time.
    weights_NV = logits_NV.sub_(logits_NV.amax(-1, keepdim=True)).exp_()
    lse_N1 = weights_NV.sum(-1, keepdim=True).log_()
    restricted = ((top_ks > 0) | (top_ps < 1)) & ~greedy
    for row in np.flatnonzero(restricted):
        _restrict(weights_NV[row], int(top_ks[row]), float(top_ps[row]))
    chosen = _invert(weights_NV, torch.from_numpy(uniforms_N).to(device))
    if best_N is not None:
        chosen = torch.where(torch.from_numpy(greedy).to(device), best_N, chosen)
    return chosen, (weights_NV.gather(1, chosen[:, None]).log_() - lse_N1)[:, 0]


def likeliest(logits_NV: Tensor, temperatures: np.ndarray, k: int) -> tuple[Tensor, Tensor]:
    """The `k` likeliest tokens of each row, likeliest first: ids int64 and logprobs float32
    `[N, k]` of the distribution that `draw` gives logprobs of."""
    scale = np.where(temperatures == 0, 1.0, temperatures).astype(np.float32)
    scaled_NV = logits_NV.float() / torch.from_numpy(scale).to(logits_NV.device)[:, None]
    values, ids = scaled_NV.log_softmax(-1).topk(k)
    return ids, values


def _restrict(weights_V: Tensor, top_k: int, top_p: float) -> None:
    """Zero what is outside the `top_k` likeliest, then outside the smallest set of the likeliest
    with probability of at least `top_p` of what is left."""
    ordered = weights_V.sort(descending=True).values
    if 0 < top_k < len(ordered):
        ordered = ordered[:top_k]
    if top_p < 1:
        before = ordered.cumsum(0, dtype=torch.float64) - ordered
        ordered = ordered[: max(int((before < top_p * ordered.sum()).sum()), 1)]
    weights_V[weights_V < ordered[-1]] = 0


def _invert(weights_NV: Tensor, uniforms_N: Tensor) -> Tensor:
    """Index where the running sum, in vocabulary order, passes the uniform's share of the total.

    By buckets, in float64, which is both quicker and more exact than one long running sum.
    """
    rows, vocab = weights_NV.shape
    padding = -vocab % _BUCKET
    if padding:
        weights_NV = torch.nn.functional.pad(weights_NV, (0, padding))
    buckets = weights_NV.view(rows, -1, _BUCKET)
    ends_NK = buckets.sum(-1).double().cumsum_(-1)
    total_N1 = ends_NK[:, -1:].contiguous()
    target_N1 = uniforms_N[:, None] * total_N1
    bucket_N1 = torch.minimum(
        torch.searchsorted(ends_NK, target_N1, right=True),
        torch.searchsorted(ends_NK, total_N1),  # the last bucket with any weight
    )
    start_N1 = torch.where(bucket_N1 > 0, ends_NK.gather(1, (bucket_N1 - 1).clamp(min=0)), 0.0)
    inside = buckets.gather(1, bucket_N1[:, :, None].expand(-1, 1, _BUCKET))[:, 0].double()
    offset_N1 = torch.searchsorted(inside.cumsum(-1), target_N1 - start_N1, right=True)
    # Rounding may point past the last weight of the bucket: step back onto it.
    last_N1 = _BUCKET - 1 - (inside.flip(-1) > 0).int().argmax(-1, keepdim=True)
    offset_N1 = torch.minimum(offset_N1, last_N1)
    return (bucket_N1 * _BUCKET + offset_N1)[:, 0]
