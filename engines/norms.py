"""Root mean square norms with a frozen weight, in few passes over memory (Zhang & Sennrich, 2019).

transformers' own modules compute each step of the formula for itself, and autograd goes back through
each: on two CPU cores, 2,048 rows, forward and backward take six times as long.

Dimension names: D what is normed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _RmsNorm(torch.autograd.Function):
    """`y = w x r` with `r = 1 / sqrt(mean(x x) + epsilon)`, and
    `dx = r (w dy - x r mean(w dy x r))`, in float32."""

    @staticmethod
    def forward(ctx: Any, x, weight_D, epsilon):  # type: ignore[no-untyped-def]
        wide = x.float()
        root = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = root.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        normed = (wide * scale).to(x.dtype)
        ctx.save_for_backward(normed, weight_D, scale)
        return normed * weight_D

    @staticmethod
    def backward(ctx: Any, *grads):  # type: ignore[no-untyped-def]
        normed, weight_D, scale = ctx.saved_tensors
        weighted, wide = (grads[0] * weight_D).float(), normed.float()
        common = torch.linalg.vecdot(weighted, wide).div_(wide.shape[-1]).unsqueeze(-1)
        dx = weighted.addcmul_(wide, common, value=-1).mul_(scale)
        return dx.to(normed.dtype), None, None


class RmsNorm(nn.Module):
    """In the place of one of transformers', `theirs`, whose weight it takes."""

    def __init__(self, theirs: Any) -> None:
        super().__init__()
        self.weight, self.epsilon = theirs.weight, theirs.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_inference_mode_enabled():
            return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.epsilon)
        return _RmsNorm.apply(x, self.weight, self.epsilon)


def is_rms_norm(module: nn.Module) -> bool:
    """Whether it is one of those that transformers' Llama-like families share the formula of."""
    return type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")
