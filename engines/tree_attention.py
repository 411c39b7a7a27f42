"""Causal attention over a packed forest of segments (`packing.Pack`): every token sees its
ancestors and itself, and a prefix's keys and values are used where they lie, by all its branches.

Dimension names: T packed rows, S rows of a segment (or of several alike), B of them, L of
each, K keys it sees, H query heads, G key/value heads, E size of a head.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def alike(segments: Sequence[int], paths: Sequence[tuple[int, ...]]) -> list[tuple[int, int]]:
    """`(segment, how many)`: neighbours of one length and with the same ancestors, which are
    attended to together."""
    groups: list[tuple[int, int]] = []
    for index, (length, path) in enumerate(zip(segments, paths, strict=True)):
        first, count = groups[-1] if groups else (0, 0)
        if count and segments[first] == length and paths[first] == path:
            groups[-1] = (first, count + 1)
        else:
            groups.append((index, 1))
    return groups


class TreeAttention:
    """An `Attention` for one pack; the masks are made once and serve every layer."""

    def __init__(
        self,
        segments: Sequence[int],
        paths: Sequence[tuple[int, ...]],
        queries_per_key: int,
        device: torch.device,
    ) -> None:
        self.segments = list(segments)
        self.paths = list(paths)
        self.queries_per_key = queries_per_key
        self.alike = alike(self.segments, self.paths)
        self.masks = {
            index: self._mask(self.segments[index], sum(self.segments[i] for i in path), device)
            for index, _ in self.alike
            if (path := self.paths[index])
        }

    def _mask(self, length: int, before: int, device: torch.device) -> Tensor:
        """Bool `[(H / G) S, K]`, for queries of one key/value head folded into rows."""
        mask_SK = torch.ones(length, before + length, dtype=torch.bool, device=device)
        return mask_SK.tril_(before).repeat(self.queries_per_key, 1)

    def __call__(
        self, layer: int, q_HTE: Tensor, k_GTE: Tensor, v_GTE: Tensor, scale: float
    ) -> Tensor:
        k, v = (x.split(self.segments, dim=1) for x in (k_GTE, v_GTE))
        starts = [0, *itertools.accumulate(self.segments)]
        out = []
        for index, count in self.alike:
            path, mask = self.paths[index], self.masks.get(index)
            here = slice(starts[index], starts[index + count])
            q_BHLE, k_BGLE, v_BGLE = (
                x[:, here].unflatten(1, (count, -1)).transpose(0, 1) for x in (q_HTE, k_GTE, v_GTE)
            )
            if mask is None:
                out_BHLE = scaled_dot_product_attention(
                    q_BHLE,
                    k_BGLE,
                    v_BGLE,
                    is_causal=True,
                    scale=scale,
                    enable_gqa=self.queries_per_key > 1,
                )
            else:
                folded = q_BHLE.reshape(count, k_GTE.shape[0], -1, q_HTE.shape[2])
                out_BHLE = scaled_dot_product_attention(
                    folded,
                    _after([k[i] for i in path], k_BGLE),
                    _after([v[i] for i in path], v_BGLE),
                    attn_mask=mask,
                    scale=scale,
                ).view(q_BHLE.shape)
            out.append(out_BHLE.transpose(0, 1).flatten(1, 2))
        return torch.cat(out, 1).transpose(0, 1)


def _after(ancestors: Sequence[Tensor], own_BGLE: Tensor) -> Tensor:
    """Each `own` behind the ancestors' `[G, S, E]`."""
    return torch.cat([*(x.expand(len(own_BGLE), -1, -1, -1) for x in ancestors), own_BGLE], 2)
