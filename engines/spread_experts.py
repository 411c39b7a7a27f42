"""A layer's experts on several ranks, each of which keeps some, whole.

Tensor ranks have the same rows: each computes what its experts give for them, and their sum is every
rank's. Expert ranks have rows of their own: each sends a row to those ranks that have an expert of it,
once to each, and gets back what they give. With both, a rank sends rows to those of its own
tensor rank, for their experts.

An adapter's gradient from the rows of other ranks comes about where the expert is, so that each rank's pass
has what its own experts use of the adapters of all ranks that it has experts together with.

Dimension names as in `experts.py`; S rows that are sent, U received.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .context_parallel import own_spans
from .exchange import copied, exchanged, exchanged_counts, summed
from .experts import RoutedExperts
from .lora import Span
from .ranks import Ranks
from .tree_attention import row_edges


class Spread:
    """What a rank knows of the pass under way.

    Attributes:
        starts: of the rows of each rank of the group, among all; and where they end.
        spans: over all their rows.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.group, self.part = ranks, ranks.experts, ranks.part
        self.starts: list[int] = [0]
        self.spans: list[Span] = []

    def own(self, experts: int) -> slice:
        """Of that many of a layer those that this rank keeps."""
        layout = self.ranks.layout
        count = experts // (layout.expert * layout.tensor)
        first = (self.ranks.expert_rank * layout.tensor + self.ranks.tensor_rank) * count
        return slice(first, first + count)

    def here(self, factor: Tensor) -> Tensor:
        """A view of what those use of an adapter's A or B; of what all experts share, of all of it."""
        return factor if len(factor) == 1 else factor[self.own(len(factor))]

    def used(
        self, factors: Mapping[str, tuple[Tensor, Tensor]]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Of an adapter's A and B those of routed experts, as far as they are used here."""
        return {
            name: (self.here(a), self.here(b)) for name, (a, b) in factors.items() if a.dim() == 3
        }

    def prepare(self, parts: Mapping[int, tuple[int, Sequence[Span]]]) -> None:
        """For a pass in which these parts have that many rows, under those spans."""
        self.starts, self.spans = [0], []
        for part, context_rank in self.ranks.expert_members:
            rows, spans = parts[part]
            start, stop = row_edges(rows, self.ranks.layout.context)[context_rank:][:2]
            first = self.starts[-1]
            self.spans += [
                Span(first + span.start, first + span.stop, span.adapter)
                for span in own_spans(spans, start, stop)
            ]
            self.starts.append(first + stop - start)


class SpreadExperts(RoutedExperts):
    """This rank's share of a layer's experts."""

    def __init__(self, whole: RoutedExperts, spread: Spread) -> None:
        ranks = spread.ranks
        self.spread, self.tensor, self.tensor_rank = spread, ranks.layout.tensor, ranks.tensor_rank
        own = spread.own(len(whole.down_proj))
        self.count = own.stop - own.start
        gate_up, down = (_narrowed(p, self.count) for p in (whole.gate_up_proj, whole.down_proj))
        super().__init__(gate_up, down, whole.name, whole.context)
        self.first = own.start

    def used(self, factor: Tensor) -> Tensor:
        # Of other parts' adapters there is no more than that.
        return factor if len(factor) == self.count else self.spread.here(factor)

    def forward(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        group = self.spread.ranks.tensor
        if self.tensor > 1:
            x_TD, weights_TK = copied(x_TD, group), copied(weights_TK, group)
        if self.spread.ranks.layout.expert > 1:
            y_TD = self._by_all(x_TD, ids_TK, weights_TK)
        else:
            y_TD = self._here(x_TD, ids_TK, weights_TK, self.context.spans)
        return summed(y_TD, group) if self.tensor > 1 else y_TD

    def _here(
        self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, spans: Sequence[Span]
    ) -> Tensor:
        """What the experts of this rank give."""
        ids_TK = ids_TK - self.first
        here = (ids_TK >= 0) & (ids_TK < self.count)
        return self.computed(x_TD, ids_TK.where(here, self.count), weights_TK, spans)

    def _by_all(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """What the experts of all ranks of the group give."""
        group, starts = self.spread.group, self.spread.starts
        place_TK = ids_TK // self.count
        rank_TK = (place_TK // self.tensor).where(place_TK % self.tensor == self.tensor_rank, -1)
        wanted = [(rank_TK == rank).any(1).nonzero()[:, 0] for rank in range(len(starts) - 1)]
        rows_S, sent = torch.cat(wanted), [len(rows) for rows in wanted]
        received = exchanged_counts(ids_TK.new_tensor(sent), group).tolist()
        # Rows by their places among those of all ranks, in whose order they arrive.
        place_S1 = rows_S[:, None] + starts[self.spread.ranks.expert_rank]
        told = exchanged(torch.cat((ids_TK[rows_S], place_S1), 1), sent, received, group)
        ids_UK, place_U = told[:, :-1], told[:, -1].contiguous()
        edges = [edge for span in self.spread.spans for edge in (span.start, span.stop)]
        found = iter(torch.searchsorted(place_U, place_U.new_tensor(edges)).tolist())
        spans = [Span(next(found), next(found), span.adapter) for span in self.spread.spans]
        x_UD, weights_UK = (
            exchanged(own.index_select(0, rows_S), sent, received, group)
            for own in (x_TD, weights_TK)
        )
        y_SD = exchanged(self._here(x_UD, ids_UK, weights_UK, spans), received, sent, group)
        y_TD = torch.zeros_like(x_TD)
        for rows, y in zip(wanted, y_SD.split(sent), strict=True):  # ranks in order, for equal bits
            y_TD = y_TD.index_add_(0, rows, y)
        return y_TD


def _narrowed(parameter: nn.Parameter, count: int) -> nn.Parameter:
    return nn.Parameter(parameter.new_empty(count, *parameter.shape[1:]), requires_grad=False)
