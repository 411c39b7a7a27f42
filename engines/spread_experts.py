"""A layer's experts spread over ranks: each keeps some of them, and computes what they give for the rows of
all ranks of its group, whose sum goes back to each row's own rank.

Rows are few numbers beside experts' weights: they are gathered by all, and not sent to the experts that they
go to alone. An adapter's gradient from the rows of other ranks comes about where the expert is, so that each
rank's pass has the adapters of the whole group.

Dimension names as in `experts.py`; U rows of all ranks of the group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .exchange import concatenated, shared_out
from .experts import RoutedExperts
from .lora import Span
from .tensor_parallel import share


@dataclass(eq=False)
class Spread:
    """What ranks that have experts together know of the pass under way.

    Attributes:
        rank, ranks: this one's place in the group, of how many.
        sizes: rows of each of them.
        spans: over all their rows, one rank's after another's.
    """

    group: Any
    rank: int
    ranks: int
    sizes: list[int] = field(default_factory=list)
    spans: Sequence[Span] = ()


class SpreadExperts(RoutedExperts):
    """This rank's share of a layer's experts."""

    def __init__(self, whole: RoutedExperts, spread: Spread) -> None:
        own = share(len(whole.down_proj), spread.rank, spread.ranks)
        gate_up, down = (_narrowed(p, own) for p in (whole.gate_up_proj, whole.down_proj))
        super().__init__(gate_up, down, whole.name, whole.context)
        self.own, self.first, self.spread = own, own.start, spread

    def used(self, factor: Tensor) -> Tensor:
        return factor if len(factor) == 1 else factor[self.own]

    def forward(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        sizes, group = self.spread.sizes, self.spread.group
        x_UD, ids_UK, weights_UK = (
            concatenated(own, sizes, group, alike=False) for own in (x_TD, ids_TK, weights_TK)
        )
        here = (ids_UK >= self.own.start) & (ids_UK < self.own.stop)
        ids_UK = torch.where(here, ids_UK - self.own.start, self.own.stop - self.own.start)
        y_UD = self.computed(x_UD, ids_UK, weights_UK, self.spread.spans)
        return shared_out(y_UD, sizes, group)


def _narrowed(parameter: nn.Parameter, own: slice) -> nn.Parameter:
    shape = (own.stop - own.start, *parameter.shape[1:])
    return nn.Parameter(parameter.new_empty(shape), requires_grad=False)
