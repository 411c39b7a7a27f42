"""Packing without padding, as forests: tokens that datums share as a prefix are packed once.

The datums of one run are sorted by their tokens; each then shares with its neighbour the longest
prefix it shares with any. Walking down the sorted list, every datum adds only the tokens after
that prefix: the rows of a trie in depth-first order. Rows between two branching points form a
segment, and a segment attends to its ancestors and causally to itself.

A GRPO group's prompt is therefore computed once, as are equal sampled prefixes and the turns of a
multi-turn conversation. Dimension names: T packed rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Pack:
    """Rows of one pass.

    Attributes:
        tokens: int64 `[T]`.
        positions: int64 `[T]`, each token's position in its sequence.
        segments: lengths of the segments, in row order; they sum to T.
        paths: per segment, its ancestors' indices from the root down (itself not included).
        members: indices of the datums packed here.
        rows: per member, the rows of its tokens, int64 `[length]`.
    """

    tokens: np.ndarray
    positions: np.ndarray
    segments: list[int]
    paths: list[tuple[int, ...]]
    members: list[int]
    rows: list[np.ndarray]


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the longest common prefix."""
    n = min(len(a), len(b))
    differs = a[:n] != b[:n]
    return int(differs.argmax()) if differs.any() else n


def pack_sequences(
    sequences: Sequence[np.ndarray], max_rows: int, keys: Sequence[np.ndarray] | None = None
) -> list[Pack]:
    """Pack non-empty int64 sequences `[length]` into passes of at most `max_rows` rows each
    (a longer sequence gets a pass of its own).

    Args:
        keys: int64 `[length]` each, equal where tokens may be computed once (None: the tokens).
    """
    keys = sequences if keys is None else keys
    order = sorted(range(len(keys)), key=lambda i: tuple(keys[i].tolist()))
    packs, current, rows = [], [order[0]], len(sequences[order[0]])
    shared = [0]
    for previous, index in itertools.pairwise(order):
        prefix = common_prefix(keys[previous], keys[index])
        added = len(sequences[index]) - prefix
        if rows + added > max_rows:
            packs.append(_pack(sequences, current, shared))
            current, shared, rows = [], [], 0
            prefix, added = 0, len(sequences[index])
        current.append(index)
        shared.append(prefix)
        rows += added
    packs.append(_pack(sequences, current, shared))
    return packs


def _pack(sequences: Sequence[np.ndarray], members: list[int], shared: list[int]) -> Pack:
    """`shared[i]` is the length of the prefix that member i shares with member i - 1."""
    rows: list[np.ndarray] = []
    tokens, positions, starts = [], [], {0}
    total = 0
    for index, prefix in zip(members, shared, strict=True):
        sequence = sequences[index]
        added = len(sequence) - prefix
        fresh = np.arange(total, total + added)
        inherited = rows[-1][:prefix] if prefix else fresh[:0]
        if added and prefix:
            starts.add(total)
            # The branch point splits the segment that it leaves.
            starts.add(int(inherited[-1]) + 1)
        elif added:
            starts.add(total)
        rows.append(np.concatenate([inherited, fresh]))
        tokens.append(sequence[prefix:])
        positions.append(np.arange(prefix, len(sequence)))
        total += added
    starts.discard(total)
    bounds = np.array([*sorted(starts), total])
    segment_of_row = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
    paths: list[tuple[int, ...]] = [()] * (len(bounds) - 1)
    for member_rows in rows:
        chain = segment_of_row[member_rows]
        chain = chain[np.flatnonzero(np.diff(chain, prepend=-1))].tolist()
        for depth, segment in enumerate(chain):
            paths[segment] = tuple(chain[:depth])
    return Pack(
        np.concatenate(tokens),
        np.concatenate(positions),
        np.diff(bounds).tolist(),
        paths,
        members,
        rows,
    )
