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


def cuts(rows: int, device: str) -> list[tuple[int, int]]:
    """Pieces `[start, stop)` of a segment without ancestors, of which each is attended to for itself:
    torch's kernel for CPUs computes all pairs of the rows with a block of 512 keys, also those that are
    not asked for."""
    count = min(4, rows // 64) if device == "cpu" and rows <= 512 else 1
    return list(pairwise(row_edges(rows, max(count, 1))))


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
        dtype: torch.dtype,
        own: tuple[int, int] | None = None,
    ) -> None:
        self.segments = list(segments)
        self.paths = list(paths)
        self.queries_per_key, self.dtype = queries_per_key, dtype
        self.alike = alike(self.segments, self.paths, own)
        # Keys and values are cut where the next to be attended to together begin: each is then in one
        # piece, and its gradient is not added up from some as large as all of them.
        first, last = own or (0, len(self.segments))
        groups = [
            *((index, 1) for index in range(first)),
            *self.alike,
            *((index, 1) for index in range(last, len(self.segments))),
        ]
        self.sizes = [count * self.segments[index] for index, count in groups]
        self.places = {
            index + i: (piece, i if count > 1 else None)
            for piece, (index, count) in enumerate(groups)
            for i in range(count)
        }
        self.masks: dict[tuple[int, int], Tensor] = {}
        self.cuts: dict[int, list[tuple[int, int, Tensor | None]]] = {}
        for index, _ in self.alike:
            rows, before = self.segments[index], sum(self.segments[i] for i in self.paths[index])
            self.cuts[index] = [
                (start, stop, self._mask(stop - start, before + start, device))
                for start, stop in ([(0, rows)] if before else cuts(rows, device.type))
            ]

    def _mask(self, rows: int, before: int, device: torch.device) -> Tensor | None:
        """`[(H / G) S, K]`, for queries of one key/value head folded into rows: what is added to their
        scores, so that every layer's backward pass needs this one. None where the first row sees
        only itself."""
        if not before:
            return None
        if (rows, before) not in self.masks:
            mask = torch.full(
                (rows, before + rows), -torch.inf, dtype=self.dtype, device=device
            ).triu_(before + 1)
            self.masks[rows, before] = mask.repeat(self.queries_per_key, 1)
        return self.masks[rows, before]

    def __call__(
        self, layer: int, q_HTE: Tensor, k_GTE: Tensor, v_GTE: Tensor, scale: float
    ) -> Tensor:
        own_sizes = [count * self.segments[index] for index, count in self.alike]
        queries = q_HTE.split(own_sizes, dim=1)
        keys, values = (x.split(self.sizes, dim=1) for x in (k_GTE, v_GTE))
        out = []
        for (index, count), query in zip(self.alike, queries, strict=True):
            piece, _ = self.places[index]
            q_BHLE, k_BGLE, v_BGLE = (
                x.unflatten(1, (count, -1)).transpose(0, 1)
                for x in (query, keys[piece], values[piece])
            )
            if path := self.paths[index]:
                k_BGLE = _after([self._segment(keys, i) for i in path], k_BGLE)
                v_BGLE = _after([self._segment(values, i) for i in path], v_BGLE)
            out_BHLE = self._attend(index, q_BHLE, k_BGLE, v_BGLE, scale)
            out.append(out_BHLE.transpose(1, 2).flatten(0, 1))
        return torch.cat(out)

    def _attend(
        self, index: int, q_BHLE: Tensor, k_BGKE: Tensor, v_BGKE: Tensor, scale: float
    ) -> Tensor:
        cut, rows = self.cuts[index], q_BHLE.shape[2]
        before = k_BGKE.shape[2] - rows
        queries = q_BHLE.split([stop - start for start, stop, _ in cut], dim=2)
        out = []
        for q, (_, stop, mask) in zip(queries, cut, strict=True):
            k, v = (x if stop == rows else x[:, :, : before + stop] for x in (k_BGKE, v_BGKE))
            if mask is None:
                gqa = self.queries_per_key > 1
                out.append(
                    scaled_dot_product_attention(
                        q, k, v, is_causal=True, scale=scale, enable_gqa=gqa
                    )
                )
            else:
                folded = q.reshape(len(k), k.shape[1], -1, k.shape[3])
                attended = scaled_dot_product_attention(folded, k, v, attn_mask=mask, scale=scale)
                out.append(attended.view(q.shape))
        return torch.cat(out, 2) if len(out) > 1 else out[0]

    def _segment(self, pieces: Sequence[Tensor], index: int) -> Tensor:
        """`[G, S, E]` of one."""
        piece, place = self.places[index]
        if place is None:
            return pieces[piece]
        rows = self.segments[index]
        return pieces[piece][:, place * rows : (place + 1) * rows]


def _after(ancestors: Sequence[Tensor], own_BGLE: Tensor) -> Tensor:
    """Each `own` behind the ancestors' `[G, S, E]`."""
    return torch.cat([*(x.expand(len(own_BGLE), -1, -1, -1) for x in ancestors), own_BGLE], 2)
