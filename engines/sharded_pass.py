"""A pass by a group of ranks. Rank 0 holds the runs, their queue and their optimizers; it tells the others
what to compute, and gets losses, logprobs and summed gradients. The others keep nothing but the base.

Every rank goes through the same layers in every pass, forward and backward, because they gather
layers and sum products together: one that has no part in it computes padding.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import cloudpickle
import torch
from torch import Tensor

from ..algorithms.losses import Loss
from ..primitives.errors import InvalidInput
from .batch import Unit
from .lora import AdapterLayout
from .passes import Outcome, Result, Work, run_pass
from .ranks import Ranks
from .sharded_backbone import ShardedBackbone


@dataclass(frozen=True)
class _Item:
    unit: Unit
    adapter: int  # index among the order's
    loss: Loss
    config: Mapping[str, float]


@dataclass(frozen=True)
class _Order:
    """What rank 0 wants computed: items by part."""

    layouts: list[AdapterLayout]
    parts: list[list[_Item]]
    backward: bool
    checkpointing: bool


def _order(
    passes: Sequence[Sequence[Work]], parts: int, checkpointing: bool
) -> tuple[_Order, list[Tensor]]:
    """And the adapters' parameters."""
    adapters: dict[int, int] = {}
    layouts: list[AdapterLayout] = []
    params: list[Tensor] = []
    items: list[list[_Item]] = [[] for _ in range(parts)]
    for part, works in zip(items, passes, strict=False):
        for work in works:
            index = adapters.setdefault(id(work.params), len(adapters))
            if index == len(layouts):
                layouts.append(work.layout)
                params.append(work.params)
            part.append(_Item(work.unit, index, work.loss, work.config))
    backward = next(work.backward for works in passes for work in works)
    return _Order(layouts, items, backward, checkpointing), params


def _compute(
    ranks: Ranks, backbone: ShardedBackbone, order: _Order, params: list[Tensor]
) -> tuple[list[Outcome] | None, list[Tensor]]:
    """This rank's part. On rank 0: what came of every part on its first rank, without gradients; and
    by adapter their sum."""
    for values in params:
        ranks.share_out(values)
    # The parts of the ranks that this one has experts together with.
    parts = dict.fromkeys(part for part, _ in ranks.expert_members)
    group = {
        part: [
            Work(
                i.unit,
                order.layouts[i.adapter],
                params[i.adapter],
                i.loss,
                i.config,
                order.backward,
            )
            for i in order.parts[part]
        ]
        for part in parts
    }
    works = group[ranks.part]
    outcome = run_pass(backbone, works, order.checkpointing, backward=order.backward, group=group)
    grads: list[Tensor] = []
    if order.backward:
        own: dict[int, Tensor] = {}
        for item, result in zip(order.parts[ranks.part], outcome.results, strict=True):
            if isinstance(result, Result) and result.grad is not None:
                before = own.get(item.adapter)
                own[item.adapter] = result.grad if before is None else before.add_(result.grad)
        for index, (layout, values) in enumerate(zip(order.layouts, params, strict=True)):
            grad = own.pop(index, None)
            grad = torch.zeros_like(values) if grad is None else grad
            beside = outcome.beside.pop(id(values), {})
            if beside:
                assert backbone.spread is not None
                here = backbone.spread.used(layout.views(grad))
                for name, terms in beside.items():
                    for total, term in zip(here[name], terms, strict=True):
                        total.add_(term)
            grads.append(ranks.add_up(grad))
    told = ranks.collect(_told(outcome))
    if ranks.rank:
        grads = []
    return None if told is None else told[:: ranks.layout.together], grads


def _told(outcome: Outcome) -> Outcome:
    """For rank 0, which needs to know of a gradient only whether there is one."""
    mark = torch.empty(0)
    results = [
        replace(r, grad=None if r.grad is None else mark) if isinstance(r, Result) else r
        for r in outcome.results
    ]
    return replace(outcome, results=results, beside={})


class Leader:
    """Rank 0's side: a `passes.Group` for as long as all its ranks live."""

    def __init__(self, ranks: Ranks, backbone: ShardedBackbone) -> None:
        self.ranks, self.backbone = ranks, backbone
        self.parts = ranks.layout.parts

    def run(self, passes: Sequence[Sequence[Work]], checkpointing: bool) -> list[Outcome]:
        order, params = _order(passes, self.parts, checkpointing)
        self.ranks.tell(cloudpickle.dumps(order))
        outcomes, grads = _compute(self.ranks, self.backbone, order, params)
        assert outcomes is not None
        left: list[Tensor | None] = list(grads)
        given: list[Outcome] = []
        for items, outcome in zip(order.parts, outcomes, strict=True):
            results: list[Result | InvalidInput] = []
            for item, result in zip(items, outcome.results, strict=True):
                if isinstance(result, Result) and result.grad is not None:
                    result, left[item.adapter] = replace(result, grad=left[item.adapter]), None
                results.append(result)
            given.append(replace(outcome, results=results))
        return given[: len(passes)]

    def dismiss(self) -> None:
        """The others' `serve` ends."""
        self.ranks.tell(None)


def serve(ranks: Ranks, backbone: ShardedBackbone) -> None:
    """Compute what rank 0 says until it dismisses this rank.

    Raises:
        RuntimeError: torch's, when another rank is gone.
    """
    while (message := ranks.tell()) is not None:
        order: _Order = pickle.loads(message)
        params = [torch.empty(layout.size, device=ranks.device) for layout in order.layouts]
        _compute(ranks, backbone, order, params)
