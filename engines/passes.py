"""A pass: units of work of any number of runs, through the frozen base together, forward and
backward.

What a unit gives does not depend on the company it is in. Matrix products take rows one by one;
attention, adapter and loss see only the unit's own. (Bitwise on a CPU, whose products are the same
for a row whatever the other rows, but for products of fewer than 16 rows: those are filled up.)

Dimension names: T rows of the pass, D hidden size, N rows with a target, M (row, target) pairs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.profiler import record_function

from ..algorithms.losses import Loss
from ..primitives.errors import InvalidInput
from .backbone import Backbone
from .batch import Unit
from .lora import UNEMBED, Adapter, AdapterLayout, Span
from .malloc import frugal
from .memory import PassShape
from .packing import Pack
from .routing import RouterLoad
from .target_logprobs import UnembedSpan
from .tree_attention import TreeAttention

MIN_ROWS = 16

Leaves = dict[str, tuple[Tensor, Tensor]]  # A and B of each target


@dataclass(frozen=True, eq=False)
class Work:
    """A unit under an adapter (`params`: flat float32, on the base model's device) and a loss."""

    unit: Unit
    layout: AdapterLayout
    params: Tensor
    loss: Loss
    config: Mapping[str, float]
    backward: bool

    def to(self, device: torch.device) -> Work:
        return replace(self, params=self.params.to(device))


@dataclass(frozen=True, eq=False)
class Result:
    """`grad`: flat, like `params`; None without a backward pass, or if the loss is 0 anyway. `load`: of
    a mixture of experts."""

    loss: float
    logprobs_M: np.ndarray
    grad: Tensor | None
    load: RouterLoad | None = None

    def to(self, device: torch.device) -> Result:
        return self if self.grad is None else replace(self, grad=self.grad.to(device))


@dataclass(frozen=True, eq=False)
class Outcome:
    """Per work of a pass its result, or what its loss function raised; the seconds it took. `beside`: where
    experts are spread, the gradients of what this rank's experts use of the adapters of the other parts'
    works, by the `id` of their `params`."""

    results: list[Result | InvalidInput]
    forward_s: float
    backward_s: float
    beside: dict[int, Leaves] = field(default_factory=dict)

    def to(self, device: torch.device) -> Outcome:
        moved = [r.to(device) if isinstance(r, Result) else r for r in self.results]
        return replace(self, results=moved)


PassRunner = Callable[[Sequence[Work]], "Future[Outcome]"]
"""Computes a pass elsewhere; works and outcome are on the CPU."""


class Group(Protocol):
    """What a `LearnerEngine` has its passes computed by.

    Attributes:
        parts: how many passes it computes at once.
    """

    parts: int

    def run(self, passes: Sequence[Sequence[Work]], checkpointing: bool) -> list[Outcome]:
        """At most `parts` passes, of works that are all `backward` or all not. Of the works under
        one adapter (the same `params`), which are one batch's, the first that has a gradient is given the
        sum of all their gradients.

        Raises:
            Unavailable: ranks were lost, or a pass failed on one; what comes next is computed by new
                ones.
        """
        ...


def run_pass(
    backbone: Backbone,
    works: Sequence[Work],
    checkpointing: bool = False,
    *,
    backward: bool | None = None,
    group: Mapping[int, Sequence[Work]] | None = None,
) -> Outcome:
    """Compute all `works` (either all `backward` or none) in one pass; without works, which only a
    backbone in lockstep is given, `backward` says which. `group`: where experts are spread, the works of
    all parts whose ranks have them together."""
    with frugal(checkpointing):
        return _run_pass(
            backbone,
            works,
            checkpointing,
            works[0].backward if backward is None else backward,
            group or {},
        )


def _run_pass(
    backbone: Backbone,
    works: Sequence[Work],
    checkpointing: bool,
    backward: bool,
    group: Mapping[int, Sequence[Work]],
) -> Outcome:
    started = time.perf_counter()
    device = backbone.device
    leaves = [_leaves(work) for work in works]
    bounds = np.cumsum([0, *(len(work.unit.pack.tokens) for work in works)]).tolist()
    beside = _spread(backbone, group, leaves) if backbone.spread is not None else {}
    losses: list[Tensor | InvalidInput] = []
    logprobs: list[Tensor] = []
    with torch.set_grad_enabled(backward), record_function("forward"):
        hidden_TD = _hidden(backbone, works, leaves, bounds, checkpointing)
        own_TD = hidden_TD[: bounds[-1]].split([len(w.unit.pack.tokens) for w in works])
        for work, factors, hidden in zip(works, leaves, own_TD, strict=True):
            p_M = _logprobs(
                backbone, work, factors, hidden[torch.from_numpy(work.unit.rows).to(device)]
            )
            logprobs.append(p_M)
            losses.append(_loss(work, p_M))
        routing = backbone.routing
        loads = [
            None if routing is None else routing.load(start, stop)
            for start, stop in pairwise(bounds)
        ]
        _wait_for(device)
    forwarded = time.perf_counter()
    with record_function("backward"):
        grads: list[Tensor | None] = [None] * len(works)
        given: dict[int, Leaves] = {}
        if backward:
            grads, given = _gradients(backbone, hidden_TD, works, leaves, losses, beside)
        _wait_for(device)
    results: list[Result | InvalidInput] = [
        loss
        if isinstance(loss, InvalidInput)
        else Result(float(loss.detach()), p_M.detach().cpu().numpy(), grad, load)
        for loss, p_M, grad, load in zip(losses, logprobs, grads, loads, strict=True)
    ]
    return Outcome(results, forwarded - started, time.perf_counter() - forwarded, given)


def _spread(
    backbone: Backbone, group: Mapping[int, Sequence[Work]], own: Sequence[Leaves]
) -> dict[int, Leaves]:
    """Tell spread experts of all parts' rows; what they use of the adapters of the other parts' works, as
    leaves by the `id` of their `params`."""
    spread = backbone.spread
    assert spread is not None
    adapters = {id(w.params): w for part, ws in group.items() if part != spread.part for w in ws}
    beside = {
        key: _as_leaves(spread.used(work.layout.views(work.params)), work.backward)
        for key, work in adapters.items()
    }
    parts: dict[int, tuple[int, list[Span]]] = {}
    for part, works in group.items():
        leaves = own if part == spread.part else [beside[id(work.params)] for work in works]
        bounds = np.cumsum([0, *(len(work.unit.pack.tokens) for work in works)]).tolist()
        parts[part] = max(bounds[-1], MIN_ROWS), _spans(works, leaves, bounds)
    spread.prepare(parts)
    return beside


def _spans(works: Sequence[Work], leaves: Sequence[Leaves], bounds: Sequence[int]) -> list[Span]:
    return [
        Span(start, stop, Adapter(work.layout, factors))
        for work, factors, start, stop in zip(works, leaves, bounds, bounds[1:], strict=False)
    ]


def pass_shape(units: Sequence[Unit]) -> PassShape:
    """For the memory that a pass of these takes."""
    return PassShape(*_forest([u.pack for u in units]), sum(len(u.rows) for u in units))


def _forest(packs: Sequence[Pack]) -> tuple[list[int], list[tuple[int, ...]]]:
    """Segments and paths of all packs as those of one."""
    segments: list[int] = []
    paths: list[tuple[int, ...]] = []
    for pack in packs:
        first = len(segments)
        segments += pack.segments
        paths += [tuple(first + i for i in path) for path in pack.paths]
    return segments, paths


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _leaves(work: Work) -> Leaves:
    """The adapter as leaves of this pass's graph: every unit has a gradient of its own."""
    return _as_leaves(work.layout.views(work.params), work.backward)


def _as_leaves(factors: Mapping[str, tuple[Tensor, Tensor]], backward: bool) -> Leaves:
    return {
        name: (a.detach().requires_grad_(backward), b.detach().requires_grad_(backward))
        for name, (a, b) in factors.items()
    }


def _hidden(
    backbone: Backbone,
    works: Sequence[Work],
    leaves: Sequence[Leaves],
    bounds: Sequence[int],
    checkpointing: bool,
) -> Tensor:
    packs = [work.unit.pack for work in works]
    tokens, positions = [p.tokens for p in packs], [p.positions for p in packs]
    segments, paths = _forest(packs)
    missing = MIN_ROWS - bounds[-1]
    if missing > 0:
        tokens.append(np.zeros(missing, np.int64))
        positions.append(np.arange(missing))
        segments.append(missing)
        paths.append(())
    return backbone.hidden(
        torch.from_numpy(np.concatenate(tokens)).to(backbone.device),
        torch.from_numpy(np.concatenate(positions)).to(backbone.device),
        TreeAttention(
            segments,
            paths,
            backbone.num_heads // backbone.num_kv_heads,
            backbone.device,
            backbone.dtype,
        ),
        _spans(works, leaves, bounds),
        checkpointing=checkpointing,
        routed_TLK=_routed(backbone, [work.unit for work in works], max(bounds[-1], MIN_ROWS)),
    )


def _routed(backbone: Backbone, units: Sequence[Unit], rows: int) -> Tensor | None:
    """The experts that a pass's rows are to go through, as `Routing` has them."""
    routing = backbone.routing
    if routing is None or all(unit.routed is None for unit in units):
        return None
    routed_TLK, start = np.full((rows, routing.layers, routing.per_token), -1, np.int64), 0
    for unit in units:
        stop = start + len(unit.pack.tokens)
        if unit.routed is not None:
            routed_TLK[start:stop] = unit.routed
        start = stop
    return torch.from_numpy(routed_TLK).to(backbone.device)


def _logprobs(backbone: Backbone, work: Work, leaves: Leaves, hidden_ND: Tensor) -> Tensor:
    unit, device = work.unit, backbone.device
    spans = []
    if UNEMBED in leaves:
        spans = [UnembedSpan(0, len(hidden_ND), work.layout.scale, *leaves[UNEMBED])]
    return backbone.target_logprobs(
        hidden_ND,
        torch.from_numpy(unit.pair_rows).to(device),
        torch.from_numpy(unit.targets).to(device),
        spans,
    )


def _loss(work: Work, p_M: Tensor) -> Tensor | InvalidInput:
    inputs_M = {name: values.to(p_M.device) for name, values in work.unit.inputs.items()}
    try:
        per_token_M = work.loss.function(p_M, inputs_M, work.config)
        return torch.where(work.unit.needed.to(p_M.device), per_token_M, 0.0).sum()
    except Exception as error:
        failure = InvalidInput(f"loss {work.loss.name!r} raised {type(error).__name__}: {error}")
        failure.__cause__ = error
        return failure


def _gradients(
    backbone: Backbone,
    hidden_TD: Tensor,
    works: Sequence[Work],
    leaves: Sequence[Leaves],
    losses: Sequence[Tensor | InvalidInput],
    beside: Mapping[int, Leaves],
) -> tuple[list[Tensor | None], dict[int, Leaves]]:
    """Per work its flat gradient, and those of what is beside, by one backward pass through all."""
    taking = [
        index
        for index, (work, loss) in enumerate(zip(works, losses, strict=True))
        if isinstance(loss, Tensor) and loss.requires_grad and bool(work.unit.needed.any())
    ]
    grads: list[Tensor | None] = [None] * len(works)
    factors = [[leaf for pair in leaves[i].values() for leaf in pair] for i in taking]
    ends: list[Tensor] = []
    seeds: list[Tensor | None] = []
    others = [leaf for own in beside.values() for pair in own.values() for leaf in pair]
    wanted = [*(leaf for own in factors for leaf in own), *others]
    if taking:
        ends.append(
            torch.stack([loss for i in taking if isinstance(loss := losses[i], Tensor)]).sum()
        )
        seeds.append(None)
    if backbone.lockstep:
        ends.append(hidden_TD)
        seeds.append(torch.zeros_like(hidden_TD))
        wanted.append(backbone.bottom)
    if not ends:
        return grads, {}
    # A rank's share of the targets may leave an adapter of the output layer out.
    parts = iter(torch.autograd.grad(ends, wanted, seeds, materialize_grads=backbone.lockstep))
    for index, own in zip(taking, factors, strict=True):
        # The flat buffer holds A and B of each target in just this order.
        grads[index] = torch.cat([next(parts).reshape(-1) for _ in own])
    given = {key: {name: (next(parts), next(parts)) for name in own} for key, own in beside.items()}
    return grads, given
