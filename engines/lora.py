"""Batched LoRA: one frozen base, many adapters, each row of a packed batch under its own.

An adapter's parameters live in one flat float32 buffer, so that Adam, gradient clipping,
publishing and saving are each a handful of operations on one tensor, and adapters of different
ranks and targets stand side by side without padding.

Dimension names: T packed tokens, R rank, I and O a linear layer's inputs and outputs, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from ..primitives.errors import InvalidInput
from ..primitives.types import LoraConfig
from .products import Reordered, many, rows_times, rows_times_transposed, step_times
from .quantized import PackedWeight

ATTN_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_TARGETS = ("gate_proj", "up_proj", "down_proj")
ROUTER_TARGETS = ("gate",)
UNEMBED = "lm_head"

Shape = tuple[int, ...]
"""Of what an adapter may train: `(I, O)`, or `(I, O, E)` of a layer's routed experts."""


def target_suffixes(config: LoraConfig) -> tuple[str, ...]:
    """Last parts of the names of the linear layers that `config` trains."""
    return (
        (ATTN_TARGETS if config.train_attn else ())
        + (MLP_TARGETS if config.train_mlp else ())
        + (ROUTER_TARGETS if config.train_router else ())
        + ((UNEMBED,) if config.train_unembed else ())
    )


@dataclass(frozen=True)
class AdapterLayout:
    """Where each target's A and B lie in the flat buffer: `[R, I]` and `[O, R]`, of routed experts
    `[E, R, I]` and `[E, O, R]` (E is 1 if a layer's experts share them)."""

    config: LoraConfig
    targets: dict[str, Shape]  # by module name
    offsets: dict[str, tuple[int, int]] = field(init=False)  # module name -> (A, B) starts
    size: int = field(init=False)

    def __post_init__(self) -> None:
        offsets, position = {}, 0
        for name, (a, b) in self.shapes.items():
            offsets[name] = (position, position + math.prod(a))
            position += math.prod(a) + math.prod(b)
        object.__setattr__(self, "offsets", offsets)
        object.__setattr__(self, "size", position)

    @classmethod
    def of(cls, config: LoraConfig, targets: Mapping[str, Shape]) -> AdapterLayout:
        """Of those among a model's `targets` that `config` trains.

        Raises:
            InvalidInput: it trains routers, and the model has none.
        """
        suffixes = target_suffixes(config)
        trained = {n: shape for n, shape in targets.items() if n.rpartition(".")[2] in suffixes}
        if config.train_router and not any(n.rpartition(".")[2] in ROUTER_TARGETS for n in trained):
            raise InvalidInput(
                "train_router is for mixture-of-experts models, this one has no routers: leave it out"
            )
        return cls(config, trained)

    @cached_property
    def scale(self) -> float:
        return self.config.alpha / self.config.rank

    @property
    def shapes(self) -> dict[str, tuple[Shape, Shape]]:
        """Of every target's A and B, in the order in which they lie in the flat buffer."""
        shapes, rank = {}, self.config.rank
        for name, (inputs, outputs, *experts) in self.targets.items():
            stack = (1,) if experts and self.config.experts == "shared" else tuple(experts)
            shapes[name] = ((*stack, rank, inputs), (*stack, outputs, rank))
        return shapes

    def views(self, flat: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """A and B of every target as views of `flat` (`[size]`, any dtype)."""
        views = {}
        for name, (a, b) in self.shapes.items():
            start, middle = self.offsets[name]
            views[name] = (
                flat[start:middle].view(a),
                flat[middle : middle + math.prod(b)].view(b),
            )
        return views

    def initial(self) -> Tensor:
        """A as PEFT draws it (Kaiming uniform, a = sqrt 5), B zero; seeded by `config.seed`."""
        generator = torch.Generator()
        if self.config.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.config.seed)
        flat = torch.zeros(self.size)
        for a, _ in self.views(flat).values():
            bound = 1 / math.sqrt(a.shape[-1])
            a.uniform_(-bound, bound, generator=generator)
        return flat


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter as the layers use it: A and B by module name, shaped as `AdapterLayout` says."""

    layout: AdapterLayout
    weights: Mapping[str, tuple[Tensor, Tensor]]

    @classmethod
    def from_flat(cls, layout: AdapterLayout, flat: Tensor) -> Adapter:
        return cls(layout, layout.views(flat))

    def same_as(self, other: Adapter) -> bool:
        return self.layout.config == other.layout.config and all(
            torch.equal(x, y)
            for name, pair in self.weights.items()
            for x, y in zip(pair, other.weights[name], strict=True)
        )


@dataclass(frozen=True, eq=False)
class Span:
    """Rows `[start, stop)` of the packed batch run under `adapter`."""

    start: int
    stop: int
    adapter: Adapter


class LoraContext:
    """Which adapter each row of the current pass runs under; shared by a model's layers.

    Spans are disjoint and in order; rows outside every span see the bare base model.
    """

    def __init__(self) -> None:
        self.spans: Sequence[Span] = ()


class _LoraLinear(torch.autograd.Function):
    """`y = x W' + scale x A' B'` by spans; the frozen base saves nothing of its own, and is asked
    for its weight again in the backward pass."""

    @staticmethod
    def forward(ctx, x_TI, weight, bias_O, spans, *factors):  # type: ignore[no-untyped-def]
        y_TO = rows_times(x_TI, weight(), bias_O)
        projected = []
        for (start, stop, scale), a_RI, b_OR in zip(
            spans, factors[::2], factors[1::2], strict=True
        ):
            xa_SR = rows_times(x_TI[start:stop], a_RI.to(x_TI.dtype))
            y_TO[start:stop].addmm_(xa_SR, b_OR.to(x_TI.dtype).T, alpha=scale)
            projected.append(xa_SR)
        ctx.weight, ctx.spans = weight, spans
        ctx.save_for_backward(x_TI if spans else None, *factors, *projected)
        return y_TO

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        (dy_TO,) = grads
        x_TI, *rest = ctx.saved_tensors
        count = len(ctx.spans)
        factors, projected = rest[: 2 * count], rest[2 * count :]
        dx_TI = rows_times_transposed(dy_TO, ctx.weight()) if ctx.needs_input_grad[0] else None
        out: list[Tensor | None] = []
        for (start, stop, scale), a_RI, b_OR, xa_SR in zip(
            ctx.spans, factors[::2], factors[1::2], projected, strict=True
        ):
            dy_SO = dy_TO[start:stop]
            dxa_SR = rows_times_transposed(dy_SO, b_OR.to(dy_SO.dtype)).mul_(scale)
            if dx_TI is not None:
                dx_TI[start:stop].addmm_(dxa_SR, a_RI.to(dy_SO.dtype))
            # The wide side first: MKL is quicker so.
            da_IR = rows_times_transposed(x_TI[start:stop].T, dxa_SR)
            out.append(da_IR.T.to(a_RI.dtype))
            db_OR = rows_times_transposed(dy_SO.T, xa_SR).mul_(scale)
            out.append(db_OR.to(b_OR.dtype))
        return dx_TI, None, None, None, *out


class LoraLinear(nn.Module):
    """A frozen linear layer plus the adapters of the pass under way.

    Args:
        packed: the layer's weight in fewer bits, which then takes its place.
    """

    def __init__(
        self,
        base: nn.Linear,
        name: str,
        context: LoraContext,
        packed: PackedWeight | None = None,
    ) -> None:
        super().__init__()
        self.weight = None if packed else base.weight
        self.packed, self.bias = packed, base.bias
        self.in_features, self.out_features = base.in_features, base.out_features
        self.name, self.context = name, context
        self.reordered: tuple[Reordered, int] | None = None  # and which of its layers this is

    def dense(self) -> Tensor:
        """The frozen weight `[O, I]`, in the dtype that the model computes in."""
        if self.packed is not None:
            return self.packed.dense()
        assert self.weight is not None
        return self.weight

    def used(self, a_RI: Tensor, b_OR: Tensor) -> tuple[Tensor, Tensor]:
        """What of an adapter's A and B this layer computes with."""
        return a_RI, b_OR

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.in_features)
        # A sampler's passes are in inference mode; a learner's without gradient are not.
        sampling = torch.is_inference_mode_enabled()
        y = self._sampling(x, flat) if sampling else self._learning(flat)
        return y.view(*x.shape[:-1], self.out_features)

    def _learning(self, x_TI: Tensor) -> Tensor:
        spans: list[tuple[int, int, float]] = []
        factors: list[Tensor] = []
        for span in self.context.spans:
            weights = span.adapter.weights.get(self.name)
            if weights is not None:
                spans.append((span.start, span.stop, span.adapter.layout.scale))
                factors.extend(self.used(*weights))
        return _LoraLinear.apply(x_TI, self.dense, self.bias, spans, *factors)

    def _sampling(self, x: Tensor, flat_TI: Tensor) -> Tensor:
        """Without what a gradient needs, and with few steps of Python: of a few rows, they take time."""
        if self.reordered is None or many(len(flat_TI)):
            y_TO = step_times(flat_TI, self.dense(), self.bias)
        else:
            reordered, place = self.reordered
            y_TO = reordered.times(x, place)
        for span in self.context.spans:
            weights = span.adapter.weights.get(self.name)
            if weights is not None:
                here, (a_RI, b_OR) = slice(span.start, span.stop), self.used(*weights)
                xa_SR = torch.mm(flat_TI[here], a_RI.T)
                y_TO[here].addmm_(xa_SR, b_OR.T, alpha=span.adapter.layout.scale)
        return y_TO


def reorder(layers: Sequence[LoraLinear]) -> None:
    """Keep a second copy of the weights of layers that are given the same rows one after the other, with
    which a sampler's steps are quicker (see `Reordered`)."""
    if any(layer.reordered or layer.packed for layer in layers):
        return
    weights = [layer.dense() for layer in layers]
    if not Reordered.possible(weights[0]):
        return
    together = Reordered(weights, [layer.bias for layer in layers if layer.bias is not None])
    for place, layer in enumerate(layers):
        layer.reordered = together, place
