"""What ranks that compute a pass together tell each other, forward and backward.

They all go on with the loss alike, so the gradient of what they all have is the same on all of them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        return _added(values, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _added(grads[0], ctx.group), None


class _Concatenation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, own: Tensor, sizes: list[int], dim: int, alike: bool, group: Any
    ) -> Tensor:
        start = sum(sizes[: dist.get_rank(group)])
        ctx.own, ctx.dim, ctx.alike, ctx.group = (start, own.shape[dim]), dim, alike, group
        total = own.new_zeros([*own.shape[:dim], sum(sizes), *own.shape[dim + 1 :]])
        total.narrow(dim, *ctx.own).copy_(own)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        total = grads[0] if ctx.alike else _added(grads[0], ctx.group)
        return total.narrow(ctx.dim, *ctx.own), None, None, None, None


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, terms: Tensor, sizes: list[int], group: Any) -> Tensor:
        start = sum(sizes[: dist.get_rank(group)])
        ctx.own, ctx.group, ctx.total = (start, sizes[dist.get_rank(group)]), group, sum(sizes)
        return _added(terms, group).narrow(0, *ctx.own)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (own,) = grads
        total = own.new_zeros(ctx.total, *own.shape[1:])
        total.narrow(0, *ctx.own).copy_(own)
        dist.all_reduce(total, group=ctx.group)
        return total, None, None


def _added(values: Tensor, group: Any) -> Tensor:
    total = values.contiguous().clone()
    dist.all_reduce(total, group=group)
    return total


def summed(values: Tensor, group: Any) -> Tensor:
    """The sum over ranks, all of which then go on alike."""
    return _Sum.apply(values, group)


def copied(values: Tensor, group: Any) -> Tensor:
    """To ranks that go on differently: their gradients are summed."""
    return _Copy.apply(values, group)


def shared_out(terms: Tensor, sizes: list[int], group: Any) -> Tensor:
    """This rank's rows of the sum over ranks, of which rank r of the group has `sizes[r]`."""
    return _Share.apply(terms, sizes, group)


def concatenated(
    own: Tensor, sizes: list[int], group: Any, *, dim: int = 0, alike: bool = True
) -> Tensor:
    """Of ranks' own values, of which rank r of the group has `sizes[r]` along `dim`.

    Args:
        alike: whether ranks go on alike, or differently, so that their gradients are summed.
    """
    return _Concatenation.apply(own, sizes, dim, alike, group)
