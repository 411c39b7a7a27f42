"""Attention of one sampling step over the paged cache.

Sequences that draw one token each are treated together. Blocks that several of them share (a
common prompt) are attended to once, as one matrix product for all of them (Juravsky et al.,
"Hydragen", 2024); what is each sequence's own is gathered side by side; one softmax goes over the
scores of both. Prompt chunks attend each for itself.

Dimension names: T rows of the step, B decoding sequences, P shared pieces of equal shape, S rows
of a chunk, L cached tokens, H query heads, G key/value heads, Q = H / G, E size of a head.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .kv_cache import KVCache

MIN_BLOCKS_SAVED = 16


@dataclass(frozen=True, eq=False)
class Chunk:
    """Rows `[start, stop)` of the step go on a sequence with these blocks; `length` tokens of it
    are cached once they are written."""

    start: int
    stop: int
    blocks: Sequence[int]
    length: int


@dataclass(frozen=True, eq=False)
class _Slab:
    """Neighbouring pieces of equal shape. Decoding sequences `[start, stop)`, in `pieces` equal
    parts, see the shared blocks gathered by `rows`, whose scores stand at `columns`."""

    start: int
    stop: int
    pieces: int
    columns: slice
    rows: Tensor


def shared_prefixes(
    tables: Sequence[Sequence[int]], full: Sequence[int]
) -> tuple[list[tuple[int, int, int, int]], list[int]]:
    """Where neighbouring block tables (sorted) share blocks worth treating together.

    Only the first `full[i]` blocks of table i may be shared. Returns `(start, stop, first block,
    last block + 1)` per shared piece, and per table how many leading blocks the pieces cover.
    """
    pieces: list[tuple[int, int, int, int]] = []
    covered = [0] * len(tables)
    todo = [(0, len(tables), 0)]
    while todo:
        start, stop, depth = todo.pop()
        groups: dict[int, list[int]] = defaultdict(list)
        for i in range(start, stop):
            if depth < full[i]:
                groups[tables[i][depth]].append(i)
        for members in groups.values():
            first, last = members[0], members[-1]
            if len(members) < 2 or last - first + 1 != len(members):
                continue
            end, limit = depth + 1, min(full[i] for i in members)
            # Sorted tables agree where the first and the last do.
            while end < limit and tables[first][end] == tables[last][end]:
                end += 1
            if (len(members) - 1) * (end - depth) >= MIN_BLOCKS_SAVED:
                pieces.append((first, last + 1, depth, end))
                covered[first : last + 1] = [end] * len(members)
                todo.append((first, last + 1, end))
    return pieces, covered


class StepAttention:
    """An `Attention` for one step.

    Args:
        cache: where keys and values are.
        slots: per row of the step, the cache slot (block * block_size + offset) of its token.
        decode_rows: the step's rows that belong to decoding sequences.
        tables, lengths: their blocks and cached tokens (this step's included), tables sorted.
        chunks: the prompt chunks.
    """

    def __init__(
        self,
        cache: KVCache,
        slots: np.ndarray,
        decode_rows: np.ndarray,
        tables: Sequence[Sequence[int]],
        lengths: Sequence[int],
        chunks: Sequence[Chunk],
        queries_per_key: int,
    ) -> None:
        self.cache, self.queries_per_key = cache, queries_per_key
        self.write_rows = cache.slot_rows(slots)
        # None: all the step's rows, in order.
        self.decode_rows = torch.from_numpy(decode_rows).to(cache.device) if chunks else None
        self.num_decoding = len(tables)
        if tables:
            self._plan_decoding(tables, lengths)
        self.chunks = [
            (
                chunk,
                cache.block_rows(np.array(chunk.blocks)),
                None if chunk.stop - chunk.start == chunk.length else self._mask(chunk),
            )
            for chunk in chunks
        ]

    def _plan_decoding(self, tables: Sequence[Sequence[int]], lengths: Sequence[int]) -> None:
        size, device = self.cache.block_size, self.cache.device
        full = [(length - 1) // size for length in lengths]
        pieces, covered = shared_prefixes(tables, full)
        self.slabs = self._slabs(tables, pieces)
        own = [table[skip:] for table, skip in zip(tables, covered, strict=True)]
        width = max(map(len, own))
        padded = np.zeros((len(own), width), np.int64)
        for i, blocks in enumerate(own):
            padded[i, : len(blocks)] = blocks
        self.own_rows = self.cache.block_rows(padded)
        self.own_room = self.cache.room(self.own_rows)
        own_lengths = np.array(lengths) - size * np.array(covered)
        hidden = np.arange(width * size)[None] >= own_lengths[:, None]
        bias = torch.zeros(hidden.shape, dtype=self.cache.dtype).masked_fill_(
            torch.from_numpy(hidden), -torch.inf
        )
        # [G B, 1, L], added to the scores of what is each sequence's own.
        self.own_bias = bias[:, None].repeat(self.cache.num_kv_heads, 1, 1).to(device)
        if not self.slabs:
            return
        self.shared_width = size * max(covered)
        # Scores of shared blocks at their positions, then the own. Where a sequence shares
        # nothing its scores stay at -inf.
        self.scores = torch.full(
            (
                self.cache.num_kv_heads,
                len(tables),
                self.queries_per_key,
                self.shared_width + width * size,
            ),
            -torch.inf,
            device=device,
            dtype=self.cache.dtype,
        )

    def _slabs(
        self, tables: Sequence[Sequence[int]], pieces: list[tuple[int, int, int, int]]
    ) -> list[_Slab]:
        slabs, size = [], self.cache.block_size
        todo = sorted(pieces, key=lambda piece: (piece[2:], piece[:2]))
        while todo:
            start, stop, a, b = todo.pop(0)
            blocks, members = [tables[start][a:b]], stop - start
            while todo and todo[0] == (stop, stop + members, a, b):
                todo.pop(0)
                blocks.append(tables[stop][a:b])
                stop += members
            rows = self.cache.block_rows(np.array(blocks))
            slabs.append(_Slab(start, stop, len(blocks), slice(a * size, b * size), rows))
        return slabs

    def _mask(self, chunk: Chunk) -> Tensor:
        """Bool `[Q S, L]`."""
        rows = chunk.stop - chunk.start
        mask = torch.ones(rows, chunk.length, dtype=torch.bool, device=self.cache.device)
        return mask.tril_(chunk.length - rows).repeat(self.queries_per_key, 1)

    def __call__(
        self, layer: int, q_HTE: Tensor, k_GTE: Tensor, v_GTE: Tensor, scale: float
    ) -> Tensor:
        self.cache.write(layer, self.write_rows, k_GTE, v_GTE)
        if self.decode_rows is None:
            return self._decode(layer, q_HTE, scale)
        heads, total, size = q_HTE.shape
        out_THE = q_HTE.new_empty(total, heads, size)
        if self.num_decoding:
            out_THE[self.decode_rows] = self._decode(layer, q_HTE[:, self.decode_rows], scale)
        for chunk, rows, mask in self.chunks:
            q_HSE = q_HTE[:, chunk.start : chunk.stop]
            out_HSE = self._prompt(layer, q_HSE, chunk, rows, mask, scale)
            out_THE[chunk.start : chunk.stop] = out_HSE.transpose(0, 1)
        return out_THE

    def _decode(self, layer: int, q_HBE: Tensor, scale: float) -> Tensor:
        """`[B, H, E]`."""
        heads, batch, size = q_HBE.shape
        per_key, groups = self.queries_per_key, heads // self.queries_per_key
        q_GBQE = (q_HBE * scale).view(groups, per_key, batch, size).transpose(1, 2).contiguous()
        k, own_v = (
            x.view(groups * batch, -1, size)
            for x in self.cache.gather(layer, self.own_rows, self.own_room)
        )
        own = torch.baddbmm(self.own_bias, q_GBQE.view(-1, per_key, size), k.transpose(1, 2))
        if not self.slabs:
            out_GBQE = (own.softmax(-1) @ own_v).view(q_GBQE.shape)
            return out_GBQE.transpose(0, 1).reshape(batch, heads, size)
        scores = self.scores
        scores[..., self.shared_width :] = own.view(groups, batch, per_key, -1)
        values = []
        for slab in self.slabs:
            here = slice(slab.start, slab.stop)
            k, v = (
                x.view(groups * slab.pieces, -1, size) for x in self.cache.gather(layer, slab.rows)
            )
            values.append(v)
            q = q_GBQE[:, here].reshape(len(k), -1, size)
            shared = q @ k.transpose(1, 2)
            scores[:, here, :, slab.columns] = shared.view(groups, -1, per_key, k.shape[1])
        weights = scores.softmax(-1)
        out = weights[..., self.shared_width :].view(groups * batch, per_key, -1) @ own_v
        out_GBQE = out.view(q_GBQE.shape)
        for slab, v in zip(self.slabs, values, strict=True):
            here = slice(slab.start, slab.stop)
            shared = weights[:, here, :, slab.columns].reshape(len(v), -1, v.shape[1]) @ v
            out_GBQE[:, here] += shared.view(groups, -1, per_key, size)
        return out_GBQE.transpose(0, 1).reshape(batch, heads, size)

    def _prompt(
        self,
        layer: int,
        q_HSE: Tensor,
        chunk: Chunk,
        rows: Tensor,
        mask: Tensor | None,
        scale: float,
    ) -> Tensor:
        groups, size = self.cache.num_kv_heads, self.cache.head_dim
        k, v = (
            x.view(1, groups, -1, size)[:, :, : chunk.length]
            for x in self.cache.gather(layer, rows)
        )
        if mask is None:
            return scaled_dot_product_attention(
                q_HSE[None], k, v, is_causal=True, scale=scale, enable_gqa=self.queries_per_key > 1
            )[0]
        folded = q_HSE.reshape(1, groups, -1, size)
        out = scaled_dot_product_attention(folded, k, v, attn_mask=mask, scale=scale)
        return out.view(q_HSE.shape)
