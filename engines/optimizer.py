"""Adam on flat parameter buffers (Kingma & Ba, 2015; decoupled weight decay: Loshchilov & Hutter,
2019): `torch.optim.AdamW` after `clip_grad_norm_`, every run under its own settings."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ..primitives.errors import InvalidInput
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


def check_state(state: Mapping[str, Tensor], like: Tensor, where: str) -> None:
    """That it is such a state, for parameters like these: `exp_avg`, `exp_avg_sq` and `step`.

    Raises:
        InvalidInput: it is not.
    """
    for name in ("exp_avg", "exp_avg_sq"):
        moment = state.get(name)
        if moment is None or moment.shape != like.shape or not moment.is_floating_point():
            raise InvalidInput(
                f"{where} holds no {name} of {like.numel():,} numbers for the optimizer"
            )
        if not torch.isfinite(moment).all() or (name == "exp_avg_sq" and (moment < 0).any()):
            raise InvalidInput(f"{where} holds an {name} that no optimizer can have")
    step = state.get("step")
    if step is None or step.numel() != 1 or not 0 <= float(step) < 2**53 or float(step) % 1:
        raise InvalidInput(f"{where} does not say how many steps the optimizer has taken")


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
