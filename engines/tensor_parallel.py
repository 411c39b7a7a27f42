"""Products cut over ranks, for a frozen base and adapters that are whole on every rank.

A column-parallel layer has the rows of its weight (`[O, I]`) that make its share of the outputs, and uses as
many of B's; a row-parallel layer has its share of the inputs, and uses as many of A's columns. All
that a rank then gives is its term of a sum: a row-parallel layer's output, base and adapter alike,
the gradient of what goes into column-parallel layers, and every gradient of A and B, which is zero
outside of what the rank uses. Outputs and inputs' gradients are summed at once, once each for attention
and for the MLP (Megatron-LM, https://arxiv.org/abs/1909.08053); those of A and B when the pass is over.

Dimension names: I and O a linear layer's inputs and outputs, R rank, M (row, target) pairs.
"""

from __future__ import annotations

import re
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..primitives.errors import InvalidInput
from .lora import LoraContext, LoraLinear
from .ranks import Ranks

Style = Literal["colwise", "rowwise"]


def share(size: int, rank: int, ranks: int) -> slice:
    """Of `size` that rank's, in chunks as torch makes them: the last ones may be smaller, or empty."""
    chunk = -(-size // ranks)
    return slice(min(rank * chunk, size), min((rank + 1) * chunk, size))


def styles(config: Any, names: list[str]) -> dict[str, Style]:
    """How transformers' plan for the model cuts each of these linear layers.

    Raises:
        InvalidInput: the plan leaves one out.
    """
    plan = getattr(config, "base_model_tp_plan", None) or {}
    found: dict[str, Style] = {}
    for name in names:
        inside = re.sub(r"\.\d+\.", ".*.", name.removeprefix("model."))
        style = plan.get(inside)
        if style not in ("colwise", "rowwise"):
            raise InvalidInput(
                f"transformers has no tensor-parallel plan for {name} of {config.model_type} "
                f"({style}); take a layout with tensor=1"
            )
        found[name] = style
    return found


class _Sum(torch.autograd.Function):
    """The sum over ranks, all of which then go on alike."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        total = values.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Copy(torch.autograd.Function):
    """To ranks that go on differently; their gradients are summed."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _Concatenation(torch.autograd.Function):
    """Of ranks' own values `[own]`, of which rank r has `sizes[r]`."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, sizes: list[int], rank: int, group: Any) -> Tensor:
        start = sum(sizes[:rank])
        ctx.own = slice(start, start + sizes[rank])
        total = own.new_zeros(sum(sizes))
        total[ctx.own] = own
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return grads[0][ctx.own], None, None, None


def copied(values: Tensor, ranks: Ranks) -> Tensor:
    return _Copy.apply(values, ranks.tensor)


def concatenated(own: Tensor, sizes: list[int], ranks: Ranks) -> Tensor:
    return _Concatenation.apply(own, sizes, ranks.tensor_rank, ranks.tensor)


def _narrowed(base: nn.Linear, inputs: int, outputs: int) -> nn.Linear:
    """A layer like `base`, without values."""
    narrow = nn.Linear(inputs, outputs, base.bias is not None, "meta", base.weight.dtype)
    return narrow.requires_grad_(False)


class ColumnParallel(LoraLinear):
    """Its share of the outputs."""

    def __init__(self, base: nn.Linear, name: str, context: LoraContext, ranks: Ranks) -> None:
        self.own = share(base.out_features, ranks.tensor_rank, ranks.layout.tensor)
        outputs = self.own.stop - self.own.start
        super().__init__(_narrowed(base, base.in_features, outputs), name, context)

    def used(self, a_RI: Tensor, b_OR: Tensor) -> tuple[Tensor, Tensor]:
        return a_RI, b_OR[self.own]

    def stored(self, parameter: str) -> tuple[slice, ...]:
        """What of the file's tensor the layer's own is."""
        return (self.own,)


class RowParallel(LoraLinear):
    """Its share of the inputs. The bias is rank 0's alone: elsewhere it is zero."""

    def __init__(self, base: nn.Linear, name: str, context: LoraContext, ranks: Ranks) -> None:
        self.own = share(base.in_features, ranks.tensor_rank, ranks.layout.tensor)
        inputs = self.own.stop - self.own.start
        super().__init__(_narrowed(base, inputs, base.out_features), name, context)
        self.ranks = ranks

    def used(self, a_RI: Tensor, b_OR: Tensor) -> tuple[Tensor, Tensor]:
        return a_RI[:, self.own].contiguous(), b_OR

    def stored(self, parameter: str) -> tuple[slice, ...] | None:
        if parameter == "bias":
            return (slice(None),) if self.ranks.tensor_rank == 0 else None
        return (slice(None), self.own)

    def forward(self, x: Tensor) -> Tensor:
        return _Sum.apply(super().forward(x), self.ranks.tensor)


def copy_inputs(module: nn.Module, ranks: Ranks) -> None:
    """What goes into `module`, whose column-parallel layers all read it, is `copied` once for all."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (copied(args[0], ranks), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": copied(kwargs["hidden_states"], ranks)}

    module.register_forward_pre_hook(hook, with_kwargs=True)
