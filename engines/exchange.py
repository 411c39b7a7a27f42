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
        ctx.sizes, ctx.dim, ctx.alike, ctx.group = sizes, dim, alike, group
        return _gathered(own, sizes, dim, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.alike:
            own = grads[0].narrow(ctx.dim, *_place(ctx.sizes, ctx.group))
        else:
            own = _summed_share(grads[0], ctx.sizes, ctx.dim, ctx.group)
        return own, None, None, None, None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, sent: list[int], received: list[int], group: Any
    ) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _exchanged(values, sent, received, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchanged(grads[0], ctx.received, ctx.sent, ctx.group), None, None, None


def _place(sizes: list[int], group: Any) -> tuple[int, int]:
    """Where this rank's part of all begins, and its size."""
    rank = dist.get_rank(group)
    return sum(sizes[:rank]), sizes[rank]


def _filled(part: Tensor, size: int) -> Tensor:
    """Contiguous, and as long as the longest rank's: what ranks tell each other is of one size."""
    if len(part) == size:
        return part.contiguous()
    filled = part.new_zeros(size, *part.shape[1:])
    filled[: len(part)] = part
    return filled


def _gathered(own: Tensor, sizes: list[int], dim: int, group: Any) -> Tensor:
    most = max(sizes)
    filled = _filled(own.transpose(0, dim), most)
    parts = filled.new_empty(len(sizes), *filled.shape)
    dist.all_gather(list(parts.unbind()), filled, group=group)
    if most == min(sizes):
        return parts.flatten(0, 1).transpose(0, dim)
    told = [part[:size] for part, size in zip(parts, sizes, strict=True)]
    return torch.cat(told).transpose(0, dim)


def _summed_share(total: Tensor, sizes: list[int], dim: int, group: Any) -> Tensor:
    most = max(sizes)
    parts = [_filled(part, most) for part in total.transpose(0, dim).split(sizes)]
    own = torch.empty_like(parts[0])
    dist.reduce_scatter(own, parts, group=group)
    return own[: sizes[dist.get_rank(group)]].transpose(0, dim)


def _exchanged(values: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
    told = values.new_empty(sum(received), *values.shape[1:])
    dist.all_to_all_single(told, values.contiguous(), received, sent, group=group)
    return told


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


def exchanged(values: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
    """Values of all ranks for this one, rank by rank: `sent[r]` of these are for rank r of the group, and
    `received[r]` of its own for this rank."""
    return _Exchange.apply(values, sent, received, group)


def exchanged_counts(sent_R: Tensor, group: Any) -> Tensor:
    """How many each rank has for this one, which has that many for each of them."""
    return _exchanged(sent_R, [1] * len(sent_R), [1] * len(sent_R), group)


def concatenated(
    own: Tensor, sizes: list[int], group: Any, *, dim: int = 0, alike: bool = True
) -> Tensor:
    """Of ranks' own values, of which rank r of the group has `sizes[r]` along `dim`.

    Args:
        alike: whether ranks go on alike, or differently, so that their gradients are summed.
    """
    return _Concatenation.apply(own, sizes, dim, alike, group)
