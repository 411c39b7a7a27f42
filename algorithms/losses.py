"""The losses: pure torch functions of per-token tensors, summed over tokens, in a registry.

All take `p`, the learner's logprobs of the target tokens, and the datums' other inputs, each a
flat float32 tensor over the tokens of all datums of one batch. Formulas and defaults are those of
the Tinker API (its documentation, "Loss functions"); `r = exp(p - q)` with `q = logprobs`,
the sampler's, and `A = advantages`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..primitives.errors import InvalidInput, NotFound

Inputs = Mapping[str, Tensor]
Config = Mapping[str, float]
POLICY_INPUTS = ("logprobs", "advantages")
REQUIRED = float("nan")  # a config key without a default


@dataclass(frozen=True)
class Loss:
    """A loss and what it needs.

    Attributes:
        name: what `forward_backward(loss_fn=…)` calls it.
        function: `(p, inputs, config) -> loss per token`, to be summed.
        needed: `(inputs, config) -> bool` per token: false where the loss is 0 whatever `p` is.
        inputs: names of the per-token inputs besides `target_tokens`.
        config: keys of `loss_fn_config` with their defaults (`REQUIRED`: none).
    """

    name: str
    function: Callable[[Tensor, Inputs, Config], Tensor]
    needed: Callable[[Inputs, Config], Tensor]
    inputs: tuple[str, ...] = POLICY_INPUTS
    config: Config = field(default_factory=dict)

    def fill_config(self, config: Mapping[str, float] | None) -> dict[str, float]:
        """`config` with defaults.

        Raises:
            InvalidInput: an unknown key, a missing one without default, or a value that is not a
                finite number.
        """
        given = dict(config or {})
        for key, value in given.items():
            if key not in self.config:
                known = ", ".join(self.config) or "none"
                raise InvalidInput(f"loss {self.name!r} has no setting {key!r} (it has: {known})")
            if not isinstance(value, int | float) or not torch.isfinite(torch.tensor(value)):
                raise InvalidInput(f"loss_fn_config[{key!r}] must be a finite number: {value!r}")
        filled = {**self.config, **given}
        missing = [key for key, value in filled.items() if value != value]
        if missing:
            raise InvalidInput(f"loss {self.name!r} needs loss_fn_config[{missing[0]!r}]")
        return {key: float(value) for key, value in filled.items()}


def cross_entropy(p: Tensor, inputs: Inputs, config: Config) -> Tensor:
    """`-w p`."""
    return -inputs["weights"] * p


def importance_sampling(p: Tensor, inputs: Inputs, config: Config) -> Tensor:
    """`-r A`."""
    return -torch.exp(p - inputs["logprobs"]) * inputs["advantages"]


def ppo(p: Tensor, inputs: Inputs, config: Config) -> Tensor:
    """`-min(r A, clip(r, low, high) A)` (Schulman et al., 2017, eq. 7; thresholds are ratios)."""
    r, a = torch.exp(p - inputs["logprobs"]), inputs["advantages"]
    clipped = r.clamp(config["clip_low_threshold"], config["clip_high_threshold"])
    return -torch.minimum(r * a, clipped * a)


def cispo(p: Tensor, inputs: Inputs, config: Config) -> Tensor:
    """`-stop_gradient(clip(r, low, high)) p A` (MiniMax-M1, 2025, eq. 4)."""
    r = torch.exp(p.detach() - inputs["logprobs"])
    clipped = r.clamp(config["clip_low_threshold"], config["clip_high_threshold"])
    return -clipped * p * inputs["advantages"]


def dro(p: Tensor, inputs: Inputs, config: Config) -> Tensor:
    """`-(p A - beta / 2 (p - q)^2)` (Richemond et al., "Offline regularised RL", 2024)."""
    gap = p - inputs["logprobs"]
    return -(p * inputs["advantages"] - 0.5 * config["beta"] * gap * gap)


def _where_advantage(inputs: Inputs, config: Config) -> Tensor:
    return inputs["advantages"] != 0


def _everywhere(inputs: Inputs, config: Config) -> Tensor:
    return torch.ones_like(inputs["advantages"], dtype=torch.bool)


LOSSES: dict[str, Loss] = {}


def register_loss(loss: Loss) -> None:
    """Make `loss` available to `forward_backward(loss_fn=loss.name)` in this process."""
    LOSSES[loss.name] = loss


register_loss(
    Loss("cross_entropy", cross_entropy, lambda i, c: i["weights"] != 0, inputs=("weights",))
)
register_loss(Loss("importance_sampling", importance_sampling, _where_advantage))
register_loss(
    Loss(
        "ppo",
        ppo,
        _where_advantage,
        config={"clip_low_threshold": 0.8, "clip_high_threshold": 1.2},
    )
)
register_loss(
    Loss(
        "cispo",
        cispo,
        _where_advantage,
        config={"clip_low_threshold": 0.0, "clip_high_threshold": 4.0},
    )
)
register_loss(Loss("dro", dro, _everywhere, config={"beta": REQUIRED}))


def loss_names() -> list[str]:
    return sorted(LOSSES)


def get_loss(name: str) -> Loss:
    """
    Raises:
        NotFound: no loss of that name.
    """
    if name not in LOSSES:
        raise NotFound(f"no loss {name!r}; there are {', '.join(loss_names())}")
    return LOSSES[name]


def ratio_metrics(p: Tensor, inputs: Inputs, config: Config, needed: Tensor) -> dict[str, float]:
    """What off-policy training wants to know, over the tokens that the loss uses."""
    if "logprobs" not in inputs or not bool(needed.any()):
        return {}
    gap = (p - inputs["logprobs"])[needed].double()
    ratio = gap.exp()
    metrics = {
        "ratio:mean": float(ratio.mean()),
        "ratio:max": float(ratio.max()),
        "policy_kl:mean": float((ratio - 1 - gap).mean()),
    }
    if "clip_high_threshold" in config:
        low, high = config["clip_low_threshold"], config["clip_high_threshold"]
        outside = (ratio < low) | (ratio > high)
        metrics["clip_fraction:mean"] = float(outside.double().mean())
    return metrics
