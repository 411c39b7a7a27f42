"""Adam on flat parameter buffers (Kingma & Ba, 2015; decoupled weight decay: Loshchilov & Hutter,
2019): `torch.optim.AdamW` after `clip_grad_norm_`, every run under its own settings."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

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


@dataclass(frozen=True, eq=False)
class Due:
    """A run that is due for a step; `grad` is clipped in place."""

    params: Tensor
    grad: Tensor
    state: AdamState
    adam: AdamParams


def adam_steps(due: Sequence[Due]) -> list[float]:
    """Update every run's parameters and state in place: one fused pass over the memory of all
    that have the same settings.

    Returns:
        Each gradient's global L2 norm before clipping.
    """
    norms = [float(norm) for norm in torch._foreach_norm([one.grad for one in due])]
    alike: dict[AdamParams, list[Due]] = defaultdict(list)
    for one, norm in zip(due, norms, strict=True):
        if one.adam.grad_clip_norm > 0:
            one.grad.mul_(min(1.0, one.adam.grad_clip_norm / (norm + 1e-6)))
        one.state.step += 1
        alike[one.adam].append(one)
    for adam, group in alike.items():
        adamw(
            [one.params for one in group],
            [one.grad for one in group],
            [one.state.exp_avg for one in group],
            [one.state.exp_avg_sq for one in group],
            [],
            # The kernel counts by itself, from what was taken before.
            [torch.tensor(one.state.step - 1.0, device=one.params.device) for one in group],
            fused=True,
            amsgrad=False,
            beta1=adam.beta1,
            beta2=adam.beta2,
            lr=adam.learning_rate,
            weight_decay=adam.weight_decay,
            eps=adam.eps,
            maximize=False,
        )
    return norms
