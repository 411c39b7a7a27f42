"""Causal attention over a packed forest of segments (`packing.Pack`): every token sees its
ancestors and itself, and a prefix's keys and values are used where they lie, by all its branches.

Dimension names: T packed rows, S rows of a segment, K keys it sees, H query heads, G key/value
heads, E size of a head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


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
        self.masks = [
            self._mask(length, sum(self.segments[i] for i in path), device) if path else None
            for length, path in zip(segments, paths, strict=True)
        ]

    def _mask(self, length: int, before: int, device: torch.device) -> Tensor:
        """Bool `[(H / G) S, K]`, for queries of one key/value head folded into rows."""
        mask_SK = torch.ones(length, before + length, dtype=torch.bool, device=device)
        return mask_SK.tril_(before).repeat(self.queries_per_key, 1)

    def __call__(
        self, layer: int, q_HTE: Tensor, k_GTE: Tensor, v_GTE: Tensor, scale: float
    ) -> Tensor:
        q, k, v = (x.split(self.segments, dim=1) for x in (q_HTE, k_GTE, v_GTE))
        out = []
        for index, (path, mask) in enumerate(zip(self.paths, self.masks, strict=True)):
            if mask is None:
                out_HSE = scaled_dot_product_attention(
                    q[index][None],
                    k[index][None],
                    v[index][None],
                    is_causal=True,
                    scale=scale,
                    enable_gqa=self.queries_per_key > 1,
                )[0]
            else:
                chain = (*path, index)
                folded = q[index].reshape(k_GTE.shape[0], -1, q_HTE.shape[2])
                out_HSE = scaled_dot_product_attention(
                    folded[None],
                    torch.cat([k[i] for i in chain], 1)[None],
                    torch.cat([v[i] for i in chain], 1)[None],
                    attn_mask=mask,
                    scale=scale,
                )[0].view(q[index].shape)
            out.append(out_HSE)
        return torch.cat(out, 1).transpose(0, 1)
