"""Routed experts: each row goes through the few experts that its router chooses, and no others.

The (row, choice) pairs are sorted by expert, so that each expert's are one block; nothing is padded to
a capacity and no pair is dropped. The frozen experts multiply the pairs of all runs of a pass; an
adapter multiplies its own run's, expert by expert, at its own rank.

A pair's result does not depend on what else is in its block: bitwise on a CPU, whose products are the
same for a row whatever the other rows are, but for one row alone, which gets a second one.

What autograd keeps is `x`, the gate's and up projection's outputs, and `x A'`. The weighted sum over a
row's experts needs no copy of what they gave: with `dh` the gradient of an expert's inner activation
`h` before its routing weight, the weight's own gradient is `dh . h`.

Dimension names: T packed rows, K experts of a row, P = T K pairs sorted by expert, E experts, D hidden
size, I an expert's inner size, R rank; X and Y whatever a product takes and gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import grouped_mm, silu

from ..primitives.errors import InvalidInput
from .lora import ROUTER_TARGETS, LoraContext, LoraLinear, Shape
from .products import rows_times
from .routing import Routing

EXPERTS, ROUTER = "experts", ROUTER_TARGETS[0]
GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"

Block = tuple[int, int, int]
"""`(expert, start, stop)`: pairs `[start, stop)` are an expert's."""


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


@dataclass(frozen=True, eq=False)
class Pairs:
    """(Row, choice) pairs, sorted by expert and then by row.

    Attributes:
        rows_P: int64, each pair's row.
        order_P: int64, its place in `[T, K]`.
        places_TK: int64, where each row's pairs are.
        blocks: of experts that have pairs.
        parts: the same, cut by spans: those of each span's rows.
        ends_E: int32, where each expert's pairs end.
    """

    rows_P: Tensor
    order_P: Tensor
    places_TK: Tensor
    blocks: list[Block]
    parts: list[list[Block]]
    ends_E: Tensor

    @classmethod
    def of(cls, ids_TK: Tensor, experts: int, spans: Sequence[tuple[int, int]]) -> Pairs:
        """
        Args:
            spans: `[start, stop)` of rows, disjoint and in order.
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
        counts_C = torch.bincount(cell_P, minlength=experts * pieces)
        ends_C = counts_C.cumsum(0)
        ends = [0, *ends_C.tolist()]
        parts: list[list[Block]] = [[] for _ in spans]
        blocks: list[Block] = []
        for expert in range(experts):
            first = expert * pieces
            if ends[first + pieces] > ends[first]:
                blocks.append((expert, ends[first], ends[first + pieces]))
            for span, part in enumerate(parts):
                cell = first + 2 * span + 1
                if ends[cell + 1] > ends[cell]:
                    part.append((expert, ends[cell], ends[cell + 1]))
        ends_E = ends_C[pieces - 1 :: pieces].int()
        return cls(order_P // k, order_P, places_TK.view(rows, k), blocks, parts, ends_E)

    def summed(self, y_PX: Tensor, weights_TK: Tensor | None = None) -> Tensor:
        """Per row the sum of its pairs, `[T, X]`, in the order of choice."""
        total_TX = None
        for choice, places_T in enumerate(self.places_TK.T):
            part_TX = y_PX[places_T]
            if weights_TK is not None:
                part_TX *= weights_TK[:, choice, None]
            total_TX = part_TX if total_TX is None else total_TX.add_(part_TX)
        assert total_TX is not None
        return total_TX


def grouped_times(x_PX: Tensor, weight_EYX: Tensor, pairs: Pairs) -> Tensor:
    """Each pair times its expert's matrix, `[P, Y]`. No gradient goes through it."""
    if x_PX.device.type == "cuda" and _aligned(x_PX) and _aligned(weight_EYX):
        return grouped_mm(x_PX, weight_EYX.transpose(1, 2), offs=pairs.ends_E)
    y_PY = x_PX.new_empty(len(x_PX), weight_EYX.shape[1])
    for expert, start, stop in pairs.blocks:
        x_BX = x_PX[start:stop]
        if stop - start == 1:  # computed in another way by itself
            x_BX = torch.cat([x_BX, torch.zeros_like(x_BX)])
        y_PY[start:stop] = rows_times(x_BX, weight_EYX[expert])[: stop - start]
    return y_PY


def _aligned(x: Tensor) -> bool:
    """Whether `grouped_mm` takes it: rows of whole 16 bytes, of bfloat16."""
    steps = [step * x.itemsize for step in x.stride() if step != 1]
    return x.dtype == torch.bfloat16 and all(step % 16 == 0 for step in steps)


@dataclass(frozen=True, eq=False)
class _Part:
    """One run's pairs in a product: `y += scale x A' B'`, A `[E, R, X]` and B `[E, Y, R]`; of one
    expert if all share them."""

    blocks: list[Block]
    scale: float

    @property
    def size(self) -> int:
        return sum(stop - start for _, start, stop in self.blocks)

    def add(self, y_PY: Tensor, x_PX: Tensor, a_ERX: Tensor, b_EYR: Tensor) -> Tensor:
        """Adds to `y`, and returns `x A'` of these pairs, `[S, R]`."""
        a, b, shared = a_ERX.to(x_PX.dtype), b_EYR.to(x_PX.dtype), len(a_ERX) == 1
        xa_SR, place = x_PX.new_empty(self.size, a.shape[1]), 0
        for expert, start, stop in self.blocks:
            index = 0 if shared else expert
            xa = xa_SR[place : (place := place + stop - start)]
            torch.mm(x_PX[start:stop], a[index].T, out=xa)
            y_PY[start:stop].addmm_(xa, b[index].T, alpha=self.scale)
        return xa_SR

    def add_gradients(
        self,
        dy_PY: Tensor,
        x_PX: Tensor,
        xa_SR: Tensor,
        a_ERX: Tensor,
        b_EYR: Tensor,
        dx_PX: Tensor | None,
        weights_P: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The gradients of A and B; adds to `dx`. With weights, those of a pair's part in the
        gradients of A and B, but not in `dx`."""
        a, b, shared = a_ERX.to(x_PX.dtype), b_EYR.to(x_PX.dtype), len(a_ERX) == 1
        da_ERX, db_EYR, place = torch.zeros_like(a_ERX), torch.zeros_like(b_EYR), 0
        for expert, start, stop in self.blocks:
            index = 0 if shared else expert
            dy, x = dy_PY[start:stop], x_PX[start:stop]
            xa = xa_SR[place : (place := place + stop - start)]
            dxa = (dy @ b[index]).mul_(self.scale)
            if dx_PX is not None:
                dx_PX[start:stop].addmm_(dxa, a[index])
            if weights_P is not None:
                weights = weights_P[start:stop, None]
                dxa, xa = dxa.mul_(weights), xa * weights
            _add_product(da_ERX[index], dxa.T, x)
            _add_product(db_EYR[index], dy.T, xa, self.scale)
        return da_ERX, db_EYR


def _add_product(total: Tensor, x: Tensor, y: Tensor, scale: float = 1.0) -> None:
    """To a float32 total."""
    if x.dtype == total.dtype:
        total.addmm_(x, y, alpha=scale)
    else:
        total.add_(x @ y, alpha=scale)


def _forward(x_TD, weights_TK, pairs, base, parts, *factors):  # type: ignore[no-untyped-def]
    gate_up_EJD, down_EDI = base
    inner = down_EDI.shape[2]
    x_PD = x_TD[pairs.rows_P]
    y_PJ = grouped_times(x_PD, gate_up_EJD, pairs)
    gate_PI, up_PI = y_PJ[:, :inner], y_PJ[:, inner:]
    projected = []
    for i, part in enumerate(parts):
        gate_a, gate_b, up_a, up_b, _, _ = factors[6 * i : 6 * i + 6]
        projected.append(part.add(gate_PI, x_PD, gate_a, gate_b))
        projected.append(part.add(up_PI, x_PD, up_a, up_b))
    del x_PD
    h_PI = silu(gate_PI).mul_(up_PI)
    y_PD = grouped_times(h_PI, down_EDI, pairs)
    for i, part in enumerate(parts):
        projected.insert(3 * i + 2, part.add(y_PD, h_PI, *factors[6 * i + 4 : 6 * i + 6]))
    return pairs.summed(y_PD, weights_TK), y_PJ, projected


def _without_gradient(*args: Any) -> Tensor:
    return _forward(*args)[0]


class _RoutedMLP(torch.autograd.Function):
    """`sum over a row's experts of weight * down(silu(gate(x)) * up(x))`, each projection with the
    adapters of the pass."""

    @staticmethod
    def forward(ctx, x_TD, weights_TK, pairs, base, parts, *factors):  # type: ignore[no-untyped-def]
        y_TD, y_PJ, projected = _forward(x_TD, weights_TK, pairs, base, parts, *factors)
        ctx.pairs, ctx.base, ctx.parts = pairs, base, parts
        ctx.save_for_backward(x_TD, weights_TK, y_PJ, *factors, *projected)
        return y_TD

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        (dy_TD,) = grads
        pairs, parts = ctx.pairs, ctx.parts
        x_TD, weights_TK, y_PJ, *rest = ctx.saved_tensors
        factors, projected = rest[: 6 * len(parts)], rest[6 * len(parts) :]
        gate_up_EJD, down_EDI = ctx.base
        inner = down_EDI.shape[2]
        gate_PI, up_PI = y_PJ[:, :inner], y_PJ[:, inner:]
        weights_P = weights_TK.reshape(-1)[pairs.order_P]
        out: list[Tensor | None] = [None] * len(factors)

        # Through the down projection: `dh` without the routing weights.
        dy_PD = dy_TD[pairs.rows_P]
        dh_PI = grouped_times(dy_PD, down_EDI.transpose(1, 2), pairs)
        silu_PI = silu(gate_PI)
        h_PI = silu_PI * up_PI
        for i, part in enumerate(parts):
            out[6 * i + 4 : 6 * i + 6] = part.add_gradients(
                dy_PD,
                h_PI,
                projected[3 * i + 2],
                *factors[6 * i + 4 : 6 * i + 6],
                dh_PI,
                weights_P,
            )
        del dy_PD
        dweights_TK = None
        if ctx.needs_input_grad[1]:
            dweights_TK = h_PI.mul_(dh_PI).sum(-1)[pairs.places_TK]
        del h_PI
        dh_PI *= weights_P[:, None]

        # Through the activation and the projections before it.
        dy_PJ = torch.empty_like(y_PJ)
        torch.mul(dh_PI, silu_PI, out=dy_PJ[:, inner:])
        del silu_PI
        dy_PJ[:, :inner] = torch.ops.aten.silu_backward(dh_PI.mul_(up_PI), gate_PI)
        del dh_PI
        x_PD = x_TD[pairs.rows_P] if parts else None
        dx_PD = None
        if ctx.needs_input_grad[0]:
            dx_PD = grouped_times(dy_PJ, gate_up_EJD.transpose(1, 2), pairs)
        for i, part in enumerate(parts):
            for j, dy_PI in enumerate((dy_PJ[:, :inner], dy_PJ[:, inner:])):
                here = slice(6 * i + 2 * j, 6 * i + 2 * j + 2)
                out[here] = part.add_gradients(
                    dy_PI, x_PD, projected[3 * i + j], *factors[here], dx_PD
                )
        dx_TD = None if dx_PD is None else pairs.summed(dx_PD)
        return dx_TD, dweights_TK, None, None, None, *out


class RoutedExperts(nn.Module):
    """A layer's frozen experts plus the adapters of the pass under way.

    Args:
        gate_up: `[E, 2 I, D]`, the gate projection before the up projection.
        down: `[E, D, I]`.
    """

    def __init__(
        self, gate_up: nn.Parameter, down: nn.Parameter, name: str, context: LoraContext
    ) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = gate_up, down
        self.names = [f"{name}.{projection}" for projection in (GATE, UP, DOWN)]
        self.context = context

    def forward(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        spans = [s for s in self.context.spans if self.names[0] in s.adapter.weights]
        factors = [f for s in spans for name in self.names for f in s.adapter.weights[name]]
        bounds = [(span.start, span.stop) for span in spans]
        pairs = Pairs.of(ids_TK, len(self.down_proj), bounds)
        parts = [
            _Part(blocks, span.adapter.layout.scale)
            for blocks, span in zip(pairs.parts, spans, strict=True)
        ]
        apply = _RoutedMLP.apply if torch.is_grad_enabled() else _without_gradient
        base = (self.gate_up_proj, self.down_proj)
        return apply(x_TD, weights_TK, pairs, base, parts, *factors)
