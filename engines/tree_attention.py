"""Causal attention over a packed forest of segments (`packing.Pack`): every token sees its
ancestors and itself, and a prefix's keys and values are used where they lie, by all its branches.

Dimension names: T packed rows, S rows of a segment (or of several alike), B of them, L of
each, K keys it sees, H query heads, G key/value heads, E size of a head.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def alike(
    segments: Sequence[int], paths: Sequence[tuple[int, ...]], own: tuple[int, int] | None = None
) -> list[tuple[int, int]]:
    """`(segment, how many)`: neighbours of one length and with the same ancestors, which are
    attended to together. `own`: of segments `[first, last)` alone."""
    groups: list[tuple[int, int]] = []
    for index in range(*(own or (0, len(segments)))):
        first, count = groups[-1] if groups else (0, 0)
        if count and segments[first] == segments[index] and paths[first] == paths[index]:
            groups[-1] = (first, count + 1)
        else:
            groups.append((index, 1))
    return groups


def row_edges(rows: int, ranks: int) -> list[int]:
    """Rank r computes rows `[edges[r], edges[r + 1])`: none if there are fewer rows than ranks."""
    return [rows * rank // ranks for rank in range(ranks + 1)]


def cut_forest(
    segments: Sequence[int], paths: Sequence[tuple[int, ...]], edges: Sequence[int]
) -> tuple[list[int], list[tuple[int, ...]]]:
    """The same forest in segments that do not reach over any edge (rows): of one that did, each piece
    has those before it for ancestors."""
    pieces: list[list[int]] = []  # by segment: the new ones
    cut_segments: list[int] = []
    cut_paths: list[tuple[int, ...]] = []
    for (start, stop), path in zip(pairwise([0, *accumulate(segments)]), paths, strict=True):
        within = [edge for edge in edges if start < edge < stop]
        own: list[int] = []
        above = [piece for ancestor in path for piece in pieces[ancestor]]
        for first, last in pairwise([start, *within, stop]):
            cut_paths.append((*above, *own))
            own.append(len(cut_segments))
            cut_segments.append(last - first)
        pieces.append(own)
    return cut_segments, cut_paths


def own_segments(segments: Sequence[int], edges: Sequence[int], rank: int) -> tuple[int, int]:
    """Of a forest so cut, the segments `[first, last)` with that rank's rows."""
    starts = [0, *accumulate(segments)]
    return bisect_left(starts, edges[rank]), bisect_left(starts, edges[rank + 1])


class TreeAttention:
    """An `Attention` for one pack; the masks are made once and serve every layer.

    Args:
        own: segments `[first, last)` whose queries it is called with; keys and values are always all.
    """

    def __init__(
        self,
        segments: Sequence[int],
        paths: Sequence[tuple[int, ...]],
        queries_per_key: int,
        device: torch.device,
        own: tuple[int, int] | None = None,
    ) -> None:
        self.segments = list(segments)
        self.paths = list(paths)
        self.queries_per_key = queries_per_key
        self.before = sum(self.segments[: own[0] if own else 0])  # rows
        self.alike = alike(self.segments, self.paths, own)
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
        starts = [0, *accumulate(self.segments)]
        out = []
        for index, count in self.alike:
            path, mask = self.paths[index], self.masks.get(index)
            here = slice(starts[index], starts[index + count])
            asking = slice(here.start - self.before, here.stop - self.before)
            q_BHLE, k_BGLE, v_BGLE = (
                x[:, rows].unflatten(1, (count, -1)).transpose(0, 1)
                for x, rows in ((q_HTE, asking), (k_GTE, here), (v_GTE, here))
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
