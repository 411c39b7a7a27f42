from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tinsmith.engines.packing import pack_sequences

sequences_strategy = st.lists(
    st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=12
)


@settings(max_examples=300, deadline=None)
@given(sequences_strategy, st.integers(1, 60))
def test_every_row_sees_exactly_its_sequences_prefix(lists, max_rows):
    sequences = [np.array(s) for s in lists]
    packs = pack_sequences(sequences, max_rows)
    assert sorted(m for p in packs for m in p.members) == list(range(len(sequences)))
    for pack in packs:
        assert sum(pack.segments) == len(pack.tokens) == len(pack.positions)
        assert len(pack.members) == 1 or len(pack.tokens) <= max_rows
        bounds = np.cumsum([0, *pack.segments])
        segment_rows = [list(range(a, b)) for a, b in itertools.pairwise(bounds)]
        sees = {}
        for index, path in enumerate(pack.paths):
            before = [row for ancestor in path for row in segment_rows[ancestor]]
            for depth, row in enumerate(segment_rows[index]):
                sees[row] = before + segment_rows[index][: depth + 1]
        for member, rows in zip(pack.members, pack.rows, strict=True):
            assert pack.tokens[rows].tolist() == sequences[member].tolist()
            assert pack.positions[rows].tolist() == list(range(len(rows)))
            for position, row in enumerate(rows):
                assert sees[row] == rows[: position + 1].tolist()


@settings(max_examples=100, deadline=None)
@given(sequences_strategy)
def test_a_pack_holds_each_distinct_prefix_once(lists):
    (pack,) = pack_sequences([np.array(s) for s in lists], 10_000)
    prefixes = {tuple(s[: i + 1]) for s in lists for i in range(len(s))}
    assert len(pack.tokens) == len(prefixes)
