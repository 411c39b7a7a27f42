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
        ctx.own, ctx.dim, ctx.alike, ctx.group = _place(sizes, group), dim, alike, group
        return _gathered(own, sizes, dim, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        total = grads[0] if ctx.alike else _added(grads[0], ctx.group)
        return total.narrow(ctx.dim, *ctx.own), None, None, None, None


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, terms: Tensor, sizes: list[int], group: Any) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        return _added(terms, group).narrow(0, *_place(sizes, group))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _gathered(grads[0], ctx.sizes, 0, ctx.group), None, None


def _place(sizes: list[int], group: Any) -> tuple[int, int]:
    """Where this rank's part of all begins, and its size."""
    rank = dist.get_rank(group)
    return sum(sizes[:rank]), sizes[rank]


def _gathered(own: Tensor, sizes: list[int], dim: int, group: Any) -> Tensor:
    total = own.new_zeros([*own.shape[:dim], sum(sizes), *own.shape[dim + 1 :]])
    total.narrow(dim, *_place(sizes, group)).copy_(own)
    dist.all_reduce(total, group=group)
    return total


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
