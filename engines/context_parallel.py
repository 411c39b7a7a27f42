"""A pass whose rows are shared out among ranks, so that a sequence may be longer than one could hold.

Each rank computes a run of neighbouring rows. In every layer it gathers the keys and values of all rows,
which are few numbers beside what it keeps of its own, and attends to them with its own queries. (All-gathered
keys, as in Llama 3's training, https://arxiv.org/abs/2407.21783, section 3.3.2.)

Dimension names: T rows of the pass, S this rank's, H query heads, G key/value heads, E size of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from .exchange import concatenated
from .lora import Span
from .ranks import Ranks
from .tree_attention import TreeAttention, cut_forest, own_segments


def own_spans(spans: Sequence[Span], start: int, stop: int) -> list[Span]:
    """Of those over all rows, what is over rows `[start, stop)`, counted from `start`."""
    cut = [Span(max(s.start, start) - start, min(s.stop, stop) - start, s.adapter) for s in spans]
    return [span for span in cut if span.start < span.stop]


class ContextAttention:
    """An `Attention` for this rank's rows of a pass."""

    def __init__(self, whole: TreeAttention, edges: list[int], ranks: Ranks) -> None:
        self.sizes = [stop - start for start, stop in pairwise(edges)]
        self.group = ranks.context
        segments, paths = cut_forest(whole.segments, whole.paths, edges)
        own = own_segments(segments, edges, ranks.context_rank)
        self.inner = TreeAttention(
            segments, paths, whole.queries_per_key, ranks.device, whole.dtype, own
        )

    def __call__(
        self, layer: int, q_HSE: Tensor, k_GSE: Tensor, v_GSE: Tensor, scale: float
    ) -> Tensor:
        k_GTE, v_GTE = (
            concatenated(x, self.sizes, self.group, dim=1, alike=False) for x in (k_GSE, v_GSE)
        )
        return self.inner(layer, q_HSE, k_GTE, v_GTE, scale)
