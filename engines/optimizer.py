"""Adam on one flat parameter buffer (Kingma & Ba, 2015; decoupled weight decay: Loshchilov &
Hutter, 2019), step for step `torch.optim.AdamW` after `clip_grad_norm_`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..primitives.types import AdamParams


@dataclass(eq=False)
class AdamState:
    """First and second moments, float32 in the shape of the parameters, and steps taken."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: int = 0

    @classmethod
    def zeros(cls, like: Tensor) -> AdamState:
        return cls(torch.zeros_like(like), torch.zeros_like(like))


def adam_step(params: Tensor, grad: Tensor, state: AdamState, adam: AdamParams) -> float:
    """Update `params` and `state` in place; `grad` is clipped in place.

    Returns:
        The gradient's global L2 norm before clipping.
    """
    norm = float(torch.linalg.vector_norm(grad))
    if adam.grad_clip_norm > 0:
        grad.mul_(min(1.0, adam.grad_clip_norm / (norm + 1e-6)))
    state.step += 1
    params.mul_(1 - adam.learning_rate * adam.weight_decay)
    state.exp_avg.lerp_(grad, 1 - adam.beta1)
    state.exp_avg_sq.mul_(adam.beta2).addcmul_(grad, grad, value=1 - adam.beta2)
    correction1 = 1 - adam.beta1**state.step
    correction2 = math.sqrt(1 - adam.beta2**state.step)
    denominator = state.exp_avg_sq.sqrt().div_(correction2).add_(adam.eps)
    params.addcdiv_(state.exp_avg, denominator, value=-adam.learning_rate / correction1)
    return norm
