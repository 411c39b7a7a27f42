"""Products cut over ranks, for a frozen base and adapters that are whole on every rank.

A column-parallel layer has the rows of its weight (`[O, I]`) that make its share of the outputs, and uses as
many of B's; a row-parallel layer has its share of the inputs, and uses as many of A's columns. All
that a rank then gives is its term of a sum: a row-parallel layer's output, base and adapter alike,
the gradient of what goes into column-parallel layers, and every gradient of A and B, which is zero
outside of what the rank uses. Outputs and inputs' gradients are summed at once, once each for attention
and for the MLP (Megatron-LM, https://arxiv.org/abs/1909.08053); those of A and B when the pass is over.

Dimension names: I and O a linear layer's inputs and outputs, R rank.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from torch import Tensor, nn

from ..primitives.errors import InvalidInput
from .exchange import copied, summed
from .lora import LoraContext, LoraLinear
from .ranks import Ranks

Style = Literal["colwise", "rowwise"]


def share(size: int, rank: int, ranks: int) -> slice:
    """Of `size` that rank's, in chunks as torch makes them: the last ones may be smaller, or empty."""
    chunk = -(-size // ranks)
    return slice(min(rank * chunk, size), min((rank + 1) * chunk, size))


def style_of(config: Any, name: str) -> Style:
    """How transformers' plan for the model cuts that linear layer.

    Raises:
        InvalidInput: the plan leaves it out.
    """
    plan = getattr(config, "base_model_tp_plan", None) or {}
    style = plan.get(re.sub(r"\.\d+\.", ".*.", name.removeprefix("model.")))
    if style not in ("colwise", "rowwise"):
        raise InvalidInput(
            f"transformers has no tensor-parallel plan for {name} of {config.model_type} "
            f"({style}); take a layout with tensor=1"
        )
    return style


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
        return summed(super().forward(x), self.ranks.tensor)


class Replicated(LoraLinear):
    """Whole on every rank, which all compute alike: of A and B the first alone has a gradient, which is
    already that of all."""

    def __init__(self, whole: LoraLinear, ranks: Ranks) -> None:
        base = nn.Linear(whole.in_features, whole.out_features, False, "meta")
        assert whole.weight is not None
        base.weight = whole.weight
        super().__init__(base, whole.name, whole.context)
        self.ranks = ranks

    def used(self, a_RI: Tensor, b_OR: Tensor) -> tuple[Tensor, Tensor]:
        if self.ranks.tensor_rank == 0:
            return a_RI, b_OR
        return a_RI.detach(), b_OR.detach()


def copy_inputs(module: nn.Module, ranks: Ranks) -> None:
    """What goes into `module`, whose column-parallel layers all read it, is `copied` once for all."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (copied(args[0], ranks.tensor), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": copied(kwargs["hidden_states"], ranks.tensor)}

    module.register_forward_pre_hook(hook, with_kwargs=True)
