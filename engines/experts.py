"""Routed experts: each row goes through the few experts that its router chooses, and no others.

The (row, choice) pairs are sorted by expert, so that each expert's are one block; nothing is padded to
a capacity and no pair is dropped. The frozen experts multiply the pairs of all runs of a pass; an
adapter multiplies its own run's, expert by expert, at its own rank. A block goes through all of the MLP
before the next one, so that it stays in a CPU's cache and never lies in memory for all pairs at once;
on a GPU all experts are one block, by `grouped_mm`.

A pair's result does not depend on what else is in its block: bitwise on a CPU, whose products are the
same for a row whatever the other rows are, if they are not too few. Blocks are filled up for that, and
as oneDNN makes code for every number of rows that it meets.

What autograd keeps is `x`, the gate's and up projection's outputs, and `x A'`. The weighted sum over a
row's experts needs no copy of what they gave: with `dh` the gradient of an expert's inner activation
`h` before its routing weight, the weight's own gradient is `dh . h`.

Dimension names: T packed rows, K experts of a row, P = T K pairs sorted by expert, B pairs of a block,
S of a span, E experts, D hidden size, I an expert's inner size, J = 2 I, R rank; X and Y whatever a
product takes and gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import grouped_mm, silu

from ..primitives.errors import InvalidInput
from .lora import ROUTER_TARGETS, LoraContext, LoraLinear, Shape, Span
from .products import rows_times
from .routing import Routing

EXPERTS, ROUTER = "experts", ROUTER_TARGETS[0]
GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"
FILLED = 8  # rows


def is_routed(module: nn.Module) -> bool:
    """Whether a module is an MLP of routed experts as transformers has it: a router `gate` of
    weight `[E, D]`, and fused `experts.gate_up_proj` `[E, 2 I, D]` and `experts.down_proj`
    `[E, D, I]`."""
    experts = getattr(module, EXPERTS, None)
    return (
        isinstance(getattr(experts, "gate_up_proj", None), nn.Parameter)
        and getattr(module, ROUTER, None) is not None
    )


def routed_targets(name: str, module: Any) -> dict[str, Shape]:
    """What an adapter may train of such a module, whose name is given."""
    experts, inner, hidden = module.experts.gate_up_proj.shape
    inner //= 2
    return {
        f"{name}.{ROUTER}": (hidden, experts),
        f"{name}.{EXPERTS}.{GATE}": (hidden, inner, experts),
        f"{name}.{EXPERTS}.{UP}": (hidden, inner, experts),
        f"{name}.{EXPERTS}.{DOWN}": (inner, hidden, experts),
    }


def replace_routed(model: nn.Module, config: Any, lora: LoraContext, routing: Routing) -> None:
    """Put `Router` and `RoutedExperts` into a model's routed MLPs.

    Raises:
        InvalidInput: an activation other than SiLU.
    """
    routed: list[tuple[str, Any]] = [(n, m) for n, m in model.named_modules() if is_routed(m)]
    if routed and config.hidden_act != "silu":
        raise InvalidInput(f"experts with activation {config.hidden_act!r}: only silu is supported")
    for index, (name, module) in enumerate(routed):
        experts, gate = module.experts, module.gate
        module.gate = Router(gate, f"{name}.{ROUTER}", index, lora, routing)
        module.experts = RoutedExperts(
            experts.gate_up_proj, experts.down_proj, f"{name}.{EXPERTS}", lora
        )


class Router(nn.Module):
    """Chooses K experts a row, by the softmax of a linear layer that adapters may train.

    Args:
        base: of transformers, with `weight` `[E, D]`, `top_k` and `norm_topk_prob`.
        layer: among those with routers.
    """

    def __init__(
        self, base: Any, name: str, layer: int, lora: LoraContext, routing: Routing
    ) -> None:
        super().__init__()
        experts, hidden = base.weight.shape
        linear = nn.Linear(hidden, experts, bias=False, device="meta")
        linear.weight = base.weight
        self.linear = LoraLinear(linear, name, lora)
        self.top_k, self.normed = base.top_k, base.norm_topk_prob
        self.layer, self.routing = layer, routing

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits `[T, E]`; weights `[T, K]`, from the router also where the choice is replayed; the
        experts chosen, int64 `[T, K]`."""
        logits_TE = self.linear(x_TD)
        p_TE = logits_TE.softmax(-1, dtype=torch.float32)
        ids_TK = self.routing.chosen(self.layer, p_TE.detach(), self.top_k)
        weights_TK = p_TE.gather(1, ids_TK)
        if self.normed:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        return logits_TE, weights_TK.to(x_TD.dtype), ids_TK


@dataclass(frozen=True)
class Cell:
    """Pairs `[start, stop)` of a block, which one span's rows have with one expert: that span's from
    `place` on."""

    span: int
    expert: int
    start: int
    stop: int
    place: int


@dataclass(frozen=True, eq=False)
class Block:
    """Pairs `[start, stop)`, which are computed together: an expert's, or (`expert` None) all."""

    start: int
    stop: int
    expert: int | None
    cells: list[Cell]


@dataclass(frozen=True, eq=False)
class Pairs:
    """(Row, choice) pairs, sorted by expert and then by row.

    Attributes:
        rows_P: int64, each pair's row.
        order_P: int64, its place in `[T, K]`.
        places_TK: int64, where each row's pairs are.
        ends_E: int32, where each expert's pairs end.
        blocks: of one expert each, if it has pairs; or one of all.
        sizes: how many pairs each span has.
        count: how many there are with experts of this rank; the others come after them.
    """

    rows_P: Tensor
    order_P: Tensor
    places_TK: Tensor
    ends_E: Tensor
    blocks: list[Block]
    sizes: list[int]
    count: int

    @classmethod
    def of(
        cls, ids_TK: Tensor, experts: int, spans: Sequence[tuple[int, int]], whole: bool = False
    ) -> Pairs:
        """
        Args:
            ids_TK: experts; those from `experts` on are elsewhere.
            spans: `[start, stop)` of rows, disjoint and in order.
            whole: one block of all.
        """
        rows, k = ids_TK.shape
        order_P = ids_TK.reshape(-1).sort(stable=True).indices
        places_TK = torch.empty_like(order_P)
        places_TK[order_P] = torch.arange(len(order_P), device=order_P.device)
        # Rows before, in and after each span, in turn: 2 S + 1 pieces.
        bounds = [0, *(edge for span in spans for edge in span), rows]
        lengths = torch.tensor([b - a for a, b in pairwise(bounds)])
        pieces, device = len(lengths), ids_TK.device
        piece_T = torch.repeat_interleave(torch.arange(pieces), lengths).to(device)
        cell_P = (ids_TK * pieces + piece_T[:, None]).reshape(-1)
        ends_C = torch.bincount(cell_P, minlength=experts * pieces)[: experts * pieces].cumsum(0)
        ends = [0, *ends_C.tolist()]
        count = ends[-1]
        blocks: list[Block] = [Block(0, count, None, [])] if whole and count else []
        sizes = [0] * len(spans)
        for expert in range(experts):
            first = expert * pieces
            start, stop = ends[first], ends[first + pieces]
            if start == stop:
                continue
            if not whole:
                blocks.append(Block(start, stop, expert, []))
            block = blocks[-1]
            for span in range(len(spans)):
                a, b = ends[first + 2 * span + 1 : first + 2 * span + 3]
                if b > a:
                    cell = Cell(span, expert, a - block.start, b - block.start, sizes[span])
                    block.cells.append(cell)
                    sizes[span] += b - a
        ends_E = ends_C[pieces - 1 :: pieces].int()
        return cls(order_P // k, order_P, places_TK.view(rows, k), ends_E, blocks, sizes, count)

    def rows_of(self, x_TX: Tensor, block: Block) -> Tensor:
        """The rows of a block's pairs, `[B, X]`; of an expert, filled up by zeros to a multiple of
        `FILLED`."""
        rows_B = self.rows_P[block.start : block.stop]
        if block.expert is None:
            return x_TX.index_select(0, rows_B)
        x_BX = x_TX.new_empty(-(-len(rows_B) // FILLED) * FILLED, x_TX.shape[1])
        torch.index_select(x_TX, 0, rows_B, out=x_BX[: len(rows_B)])
        x_BX[len(rows_B) :] = 0
        return x_BX

    def times(self, x_BX: Tensor, weight_EYX: Tensor, block: Block) -> Tensor:
        """A block's pairs, each times its expert's matrix: `[B, Y]`. No gradient goes through it."""
        if block.expert is None:
            return grouped_mm(x_BX, weight_EYX.transpose(1, 2), offs=self.ends_E)
        return rows_times(x_BX, weight_EYX[block.expert])

    def add(self, total_TX: Tensor, y_BX: Tensor, block: Block) -> None:
        """Add what a block's pairs give to their rows; in the same order every time, if all experts are
        here."""
        if block.expert is not None or self.count < len(self.rows_P):
            rows_B = self.rows_P[block.start : block.stop]
            total_TX.index_add_(0, rows_B, y_BX[: len(rows_B)])
            return
        for places_T in self.places_TK.T:
            total_TX += y_BX[places_T]


class Projection:
    """One run's adapter of a projection, or of several of the same `x`: `y += scale x A' B'`.

    Args:
        factors: A `[E, R, X]` and B `[E, Y, R]` of each, whose `y` stand side by side; of one expert if
            all share them.
        xa_SR: to hold, in the dtype that is computed in, `x A'` of the span's pairs, of all projections side by side.
        gradients: whether `add_gradients` is to be called.
    """

    def __init__(
        self,
        factors: Sequence[tuple[Tensor, Tensor]],
        scale: float,
        xa_SR: Tensor,
        gradients: bool = False,
    ) -> None:
        self.a_ERX = torch.cat([a for a, _ in factors], 1).to(xa_SR.dtype)
        self.b = [b.to(xa_SR.dtype) for _, b in factors]
        self.scale, self.xa_SR, self.shared = scale, xa_SR, len(self.a_ERX) == 1
        rank = factors[0][0].shape[1]
        self.ranks = [slice(i * rank, (i + 1) * rank) for i in range(len(factors))]
        ends = [0, *accumulate(b.shape[1] for _, b in factors)]
        self.columns = [slice(start, stop) for start, stop in pairwise(ends)]
        self.da_ERX, self.db = None, []
        if gradients:
            like = factors[0][0]
            self.da_ERX = like.new_zeros(self.a_ERX.shape)
            # The wide side last: products are faster so.
            self.db = [torch.zeros_like(b).view(len(b), rank, -1) for _, b in factors]

    def gradients(self) -> list[Tensor]:
        """Of A and B of each projection."""
        assert self.da_ERX is not None
        return [
            grad
            for ranks, db_ERY in zip(self.ranks, self.db, strict=True)
            for grad in (self.da_ERX[:, ranks], db_ERY.transpose(1, 2))
        ]

    def _at(self, cell: Cell) -> tuple[int, slice, Tensor]:
        """A cell's expert, its pairs in the block, and their `x A'`."""
        xa = self.xa_SR[cell.place : cell.place + cell.stop - cell.start]
        return 0 if self.shared else cell.expert, slice(cell.start, cell.stop), xa

    def add(self, y_BY: Tensor, x_BX: Tensor, cell: Cell) -> None:
        expert, here, xa = self._at(cell)
        torch.mm(x_BX[here], self.a_ERX[expert].T, out=xa)
        for b_EYR, ranks, columns in zip(self.b, self.ranks, self.columns, strict=True):
            y_BY[here, columns].addmm_(xa[:, ranks], b_EYR[expert].T, alpha=self.scale)

    def add_gradients(
        self,
        dy_BY: Tensor,
        x_BX: Tensor,
        dx_BX: Tensor | None,
        cell: Cell,
        weights_B: Tensor | None = None,
    ) -> None:
        """Add to the gradients of A and B, and to `dx`. With weights, those of a pair's part in the
        gradients of A and B, but not in `dx`."""
        expert, here, xa = self._at(cell)
        dy, x, dxa = dy_BY[here], x_BX[here], torch.empty_like(xa)
        for b_EYR, ranks, columns in zip(self.b, self.ranks, self.columns, strict=True):
            torch.mm(dy[:, columns], b_EYR[expert], out=dxa[:, ranks])
        dxa *= self.scale
        if dx_BX is not None:
            dx_BX[here].addmm_(dxa, self.a_ERX[expert])
        if weights_B is not None:
            weights = weights_B[here, None]
            dxa, xa = dxa.mul_(weights), xa * weights
        assert self.da_ERX is not None
        _add_product(self.da_ERX[expert], dxa.T, x)
        for db_ERY, ranks, columns in zip(self.db, self.ranks, self.columns, strict=True):
            _add_product(db_ERY[expert], xa[:, ranks].T, dy[:, columns], self.scale)


def _add_product(total: Tensor, x: Tensor, y: Tensor, scale: float = 1.0) -> None:
    """To a float32 total."""
    if x.dtype == total.dtype:
        total.addmm_(x, y, alpha=scale)
    else:
        total.add_(x @ y, alpha=scale)


@dataclass(frozen=True, eq=False)
class Adapter:
    """One run's of a layer's experts; its factors are A and B of gate, up and down projection."""

    gate_up: Projection
    down: Projection

    @classmethod
    def all(
        cls,
        factors: Sequence[Tensor],
        scales: Sequence[float],
        projected: Sequence[Tensor],
        gradients: bool = False,
    ) -> list[Adapter]:
        """`projected`: of each, `x A'` of gate and up, and of down."""
        pairs = list(zip(factors[::2], factors[1::2], strict=True))
        return [
            cls(
                Projection(pairs[3 * i : 3 * i + 2], scale, projected[2 * i], gradients),
                Projection(pairs[3 * i + 2 : 3 * i + 3], scale, projected[2 * i + 1], gradients),
            )
            for i, scale in enumerate(scales)
        ]


def _forward(x_TD, weights_TK, pairs, base, scales, keep, *factors):  # type: ignore[no-untyped-def]
    gate_up_EJD, down_EDI = base
    inner = down_EDI.shape[2]
    projected = [
        x_TD.new_empty(size, wide * a.shape[1])
        for size, a in zip(pairs.sizes, factors[::6], strict=True)
        for wide in (2, 1)
    ]
    adapters = Adapter.all(factors, scales, projected)
    weights_P = weights_TK.reshape(-1)[pairs.order_P]
    kept_PJ = x_TD.new_empty(pairs.count, 2 * inner) if keep else None
    y_TD = torch.zeros_like(x_TD)
    for block in pairs.blocks:
        x_BD = pairs.rows_of(x_TD, block)
        y_BJ = pairs.times(x_BD, gate_up_EJD, block)
        for cell in block.cells:
            adapters[cell.span].gate_up.add(y_BJ, x_BD, cell)
        here, size = slice(block.start, block.stop), block.stop - block.start
        if kept_PJ is not None:
            kept_PJ[here] = y_BJ[:size]
        h_BI = silu(y_BJ[:, :inner]).mul_(y_BJ[:, inner:])
        y_BD = pairs.times(h_BI, down_EDI, block)
        for cell in block.cells:
            adapters[cell.span].down.add(y_BD, h_BI, cell)
        pairs.add(y_TD, y_BD[:size].mul_(weights_P[here, None]), block)
    return y_TD, kept_PJ, projected


def _without_gradient(x_TD, weights_TK, pairs, base, scales, *factors):  # type: ignore[no-untyped-def]
    return _forward(x_TD, weights_TK, pairs, base, scales, False, *factors)[0]


class _RoutedMLP(torch.autograd.Function):
    """`sum over a row's experts of weight * down(silu(gate(x)) * up(x))`, each projection with the
    adapters of the pass."""

    @staticmethod
    def forward(ctx, x_TD, weights_TK, pairs, base, scales, *factors):  # type: ignore[no-untyped-def]
        y_TD, y_PJ, projected = _forward(x_TD, weights_TK, pairs, base, scales, True, *factors)
        ctx.pairs, ctx.base, ctx.scales = pairs, base, scales
        ctx.save_for_backward(x_TD, weights_TK, y_PJ, *factors, *projected)
        return y_TD

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        (dy_TD,) = grads
        pairs, scales = ctx.pairs, ctx.scales
        x_TD, weights_TK, y_PJ, *rest = ctx.saved_tensors
        factors, projected = rest[: 6 * len(scales)], rest[6 * len(scales) :]
        adapters = Adapter.all(factors, scales, projected, gradients=True)
        gate_up_EJD, down_EDI = ctx.base
        inner = down_EDI.shape[2]
        weights_P = weights_TK.reshape(-1)[pairs.order_P]
        dx_TD = torch.zeros_like(x_TD) if ctx.needs_input_grad[0] else None
        dweights_P = torch.zeros_like(weights_P)
        for block in pairs.blocks:
            here = slice(block.start, block.stop)
            gate_BI, up_BI = y_PJ[here, :inner], y_PJ[here, inner:]
            weights_B = weights_P[here]
            # Through the down projection: `dh` without the routing weights.
            dy_BD = pairs.rows_of(dy_TD, block)
            dh_BI = pairs.times(dy_BD, down_EDI.transpose(1, 2), block)[: len(gate_BI)]
            silu_BI = silu(gate_BI)
            h_BI = silu_BI * up_BI
            for cell in block.cells:
                adapters[cell.span].down.add_gradients(dy_BD, h_BI, dh_BI, cell, weights_B)
            dweights_P[here] = h_BI.mul_(dh_BI).sum(-1)
            dh_BI *= weights_B[:, None]
            # Through the activation, and the projections before it.
            dy_BJ = dh_BI.new_empty(len(dy_BD), 2 * inner)
            size = len(dh_BI)
            torch.mul(dh_BI, silu_BI, out=dy_BJ[:size, inner:])
            dy_BJ[size:] = 0
            dy_BJ[:size, :inner] = torch.ops.aten.silu_backward(dh_BI.mul_(up_BI), gate_BI)
            dx_BD = None
            if dx_TD is not None:
                dx_BD = pairs.times(dy_BJ, gate_up_EJD.transpose(1, 2), block)
            x_BD = pairs.rows_of(x_TD, block) if block.cells else None
            for cell in block.cells:
                adapters[cell.span].gate_up.add_gradients(dy_BJ, x_BD, dx_BD, cell)
            if dx_TD is not None:
                pairs.add(dx_TD, dx_BD, block)
        out = [g for a in adapters for p in (a.gate_up, a.down) for g in p.gradients()]
        return dx_TD, dweights_P[pairs.places_TK], None, None, None, *out


def _grouped(x_TD: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether all experts' products are to be one `grouped_mm`: on a GPU in bfloat16, where rows are
    of whole 16 bytes."""
    return (
        x_TD.device.type == "cuda"
        and x_TD.dtype == torch.bfloat16
        and all(size % 8 == 0 for weight in weights for size in weight.shape[1:])
    )


class RoutedExperts(nn.Module):
    """A layer's frozen experts plus the adapters of the pass under way.

    Args:
        gate_up: `[E, 2 I, D]`, the gate projection before the up projection.
        down: `[E, D, I]`.

    Attributes:
        first: which of the layer's experts is the first here.
    """

    def __init__(
        self, gate_up: nn.Parameter, down: nn.Parameter, name: str, context: LoraContext
    ) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = gate_up, down
        self.name, self.first = name, 0
        self.names = [f"{name}.{projection}" for projection in (GATE, UP, DOWN)]
        self.context = context

    def stored(self, parameter: str, expert: int, matrix: Tensor) -> list[tuple[str, Tensor]]:
        """What an expert's matrix consists of in a model's files: names, after the module's own, and
        views."""
        if parameter == "down_proj":
            return [(f"{expert}.{DOWN}.weight", matrix)]
        gate, up = matrix.chunk(2)
        return [(f"{expert}.{GATE}.weight", gate), (f"{expert}.{UP}.weight", up)]

    def forward(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        return self.computed(x_TD, ids_TK, weights_TK, self.context.spans)

    def used(self, factor: Tensor) -> Tensor:
        """What of an adapter's A or B these experts compute with."""
        return factor

    def computed(
        self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, spans: Sequence[Span]
    ) -> Tensor:
        """Of the experts that are here, of which `ids_TK` counts from 0; those beyond give nothing."""
        spans = [s for s in spans if self.names[0] in s.adapter.weights]
        factors = [
            self.used(f) for s in spans for name in self.names for f in s.adapter.weights[name]
        ]
        base = (self.gate_up_proj, self.down_proj)
        bounds = [(span.start, span.stop) for span in spans]
        pairs = Pairs.of(ids_TK, len(self.down_proj), bounds, _grouped(x_TD, base))
        scales = [span.adapter.layout.scale for span in spans]
        apply = _RoutedMLP.apply if torch.is_grad_enabled() else _without_gradient
        return apply(x_TD, weights_TK, pairs, base, scales, *factors)
