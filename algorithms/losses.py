"""The losses: pure torch functions of per-token tensors, summed over tokens, in a registry.

All take `p`, the learner's logprobs of the target tokens, and the datums' other inputs, each a
flat float32 tensor over the tokens of all datums of one batch; `datum` (int64) says whose token it
is. Formulas and defaults are those of the Tinker API (its documentation, "Loss functions"), but
for `stable_reinforce`, which is ours; `r = exp(p - q)` with `q = logprobs`, the sampler's, and
`A = advantages`.

The policy-gradient losses also take `reference_logprobs` and, with `kl_k3_coeff` or `kl_k2_coeff`
above 0, add a penalty on the divergence from that reference policy (`reference_kl`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

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
        optional: names of inputs that may be left out, with what stands in for them in a datum:
            `(its other inputs, config) -> per token`.
        config: keys of `loss_fn_config` with their defaults (`REQUIRED`: none).
        clipped: `(p, inputs, config) -> bool` per token: where the ratio is clipped or capped, for
            the metric `clip_fraction`.
        multi_target: takes several targets per position, `[T, K]`, as well as one.
    """

    name: str
    function: Callable[[Tensor, Inputs, Config], Tensor]
    needed: Callable[[Inputs, Config], Tensor]
    inputs: tuple[str, ...] = POLICY_INPUTS
    optional: Mapping[str, Callable[[Inputs, Config], Tensor]] = field(default_factory=dict)
    config: Config = field(default_factory=dict)
    clipped: Callable[[Tensor, Inputs, Config], Tensor] | None = None
    multi_target: bool = False

    def fill_inputs(self, inputs: Inputs, config: Config) -> dict[str, Tensor]:
        """One datum's `inputs` with what stands in for the optional ones it lacks.

        Raises:
            InvalidInput: the config asks for a reference policy, and the datum has none.
        """
        lacking = {k: default for k, default in self.optional.items() if k not in inputs}
        return {**inputs, **{k: default(inputs, config) for k, default in lacking.items()}}

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


def _ratio(p: Tensor, inputs: Inputs) -> Tensor:
    return torch.exp(p - inputs["logprobs"])


def _clip(r: Tensor, inputs: Inputs) -> Tensor:
    return torch.clamp(r, inputs["clip_low_threshold"], inputs["clip_high_threshold"])


def importance_sampling(p: Tensor, inputs: Inputs, config: Config) -> Tensor:
    """`-r A`."""
    return -_ratio(p, inputs) * inputs["advantages"]


def ppo(p: Tensor, inputs: Inputs, config: Config) -> Tensor:
    """`-min(r A, clip(r, low, high) A)` (Schulman et al., 2017, eq. 7; thresholds are ratios).

    A high threshold further from 1 than the low one is DAPO's "clip-higher" (Yu et al., 2025,
    eq. 10: 0.8 and 1.28). With `dual_clip` = c > 1, where `A < 0` the objective is not let below
    `c A` (Ye et al., "Mastering complex control in MOBA games", 2020, eq. 5); 0: off.
    """
    r, a = _ratio(p, inputs), inputs["advantages"]
    objective = torch.minimum(r * a, _clip(r, inputs) * a)
    if config["dual_clip"] > 0:
        bounded = torch.maximum(objective, config["dual_clip"] * a)
        objective = torch.where(a < 0, bounded, objective)
    return -objective


def cispo(p: Tensor, inputs: Inputs, config: Config) -> Tensor:
    """`-stop_gradient(clip(r, low, high)) p A` (MiniMax-M1, 2025, eq. 4)."""
    return -_clip(_ratio(p.detach(), inputs), inputs) * p * inputs["advantages"]


def _sequence_ratio(p: Tensor, inputs: Inputs) -> Tensor:
    """`s`, the geometric mean of `r` over the masked tokens of the token's datum; 1 where the mask
    marks none. No gradient."""
    datum, masked = inputs["datum"], inputs["sequence_ratio_mask"] != 0
    gap = torch.where(masked, p.detach() - inputs["logprobs"], 0.0)
    totals = gap.new_zeros(2, int(datum.max()) + 1)
    totals[0].index_add_(0, datum, gap)
    totals[1].index_add_(0, datum, masked.to(gap.dtype))
    return torch.exp(totals[0] / totals[1].clamp(min=1))[datum]


def gspo(p: Tensor, inputs: Inputs, config: Config) -> Tensor:
    """`-min(s_t A, clip(s_t, low, high) A)`, `s_t = stop_gradient(s / e^p) e^p`: the token form of
    Zheng et al., "Group Sequence Policy Optimization", 2025. Every token has the value of its
    sequence's ratio `s` and the gradient of its own logprob; where `A` is the same for all of
    them, they add up to the gradient of `-|sequence| min(s A, clip(s, low, high) A)`.

    `s` is taken over the tokens that `sequence_ratio_mask` marks; without it, over those with an
    advantage, for that is how trajectories say which tokens were sampled.
    """
    s = _sequence_ratio(p, inputs) * torch.exp(p - p.detach())
    a = inputs["advantages"]
    return -torch.minimum(s * a, _clip(s, inputs) * a)


def dro(p: Tensor, inputs: Inputs, config: Config) -> Tensor:
    """`-(p A - beta / 2 (p - q)^2)` (Richemond et al., "Offline regularised RL", 2024)."""
    gap = p - inputs["logprobs"]
    return -(p * inputs["advantages"] - 0.5 * config["beta"] * gap * gap)


def stable_reinforce(p: Tensor, inputs: Inputs, config: Config) -> Tensor:
    """`-stop_gradient(clip(r, 1 / c, c) (A - kappa log r)) p`: ours (docs/stable_reinforce.md).

    `E_q[r A] - kappa KL(pi || q)` has the gradient `E_q[r (A - kappa log r) grad p]` (the term
    `-kappa E_pi[grad p]` is 0): that of `importance_sampling`, pulled back as the policy leaves
    the sampler's, and nought at `r = e^(A / kappa)`, where every ratio therefore stops however
    many steps are taken on the same samples. On the sampler's own weights, `r = 1`, it is
    REINFORCE. Truncating the weight moves that point nowhere; from above it bounds the variance,
    from below it keeps the pull on tokens that the policy has all but dropped.

    `kl_coeff` is kappa, `ratio_cap` is c. The pull acts on the tokens that `sampled_mask` marks;
    without it, on those with an advantage.
    """
    gap = p.detach() - inputs["logprobs"]
    pull = torch.where(inputs["sampled_mask"] != 0, config["kl_coeff"] * gap, 0.0)
    weight = gap.exp().clamp(1 / config["ratio_cap"], config["ratio_cap"])
    return -weight * (inputs["advantages"] - pull) * p


def reference_kl(p: Tensor, inputs: Inputs, config: Config) -> Tensor:
    """`w (kl_k3_coeff k3 + kl_k2_coeff k2)` with `d = p_ref - p`, `w = kl_weights`:

    - `k3 = exp(d) - 1 - d`, GRPO's penalty (Shao et al., DeepSeekMath, 2024, eq. 4). Its value is
      an unbiased estimate of KL(pi || ref) on the policy's own samples; its gradient is that of
      the other direction, KL(ref || pi).
    - `k2 = d^2 / 2`, whose gradient on the policy's own samples is that of KL(pi || ref) (Tang &
      Munos, "On a few pitfalls in KL divergence gradient estimation for RL", 2025).

    k1 to k3: Schulman, "Approximating KL divergence", 2020. Without `kl_weights`, tokens with an
    advantage weigh 1, the others 0.
    """
    weight = inputs["kl_weights"]
    gap = torch.where(weight != 0, inputs["reference_logprobs"] - p, 0.0)
    k3, k2 = torch.expm1(gap) - gap, 0.5 * gap * gap
    return weight * (config["kl_k3_coeff"] * k3 + config["kl_k2_coeff"] * k2)


def _where_advantage(inputs: Inputs, config: Config) -> Tensor:
    return inputs["advantages"] != 0


def _where_advantage_or(mask: str) -> Callable[[Inputs, Config], Tensor]:
    return lambda inputs, config: (inputs["advantages"] != 0) | (inputs[mask] != 0)


def _everywhere(inputs: Inputs, config: Config) -> Tensor:
    return torch.ones_like(inputs["advantages"], dtype=torch.bool)


def _advantage_mask(inputs: Inputs, config: Config) -> Tensor:
    return (inputs["advantages"] != 0).to(inputs["advantages"].dtype)


def _from_config(key: str) -> Callable[[Inputs, Config], Tensor]:
    return lambda inputs, config: torch.full_like(inputs["advantages"], config[key])


def _wants_reference(config: Config) -> bool:
    return config["kl_k3_coeff"] != 0 or config["kl_k2_coeff"] != 0


def _no_reference(inputs: Inputs, config: Config) -> Tensor:
    if _wants_reference(config):
        raise InvalidInput(
            "kl_k3_coeff and kl_k2_coeff need loss_fn_inputs['reference_logprobs'] in every datum"
        )
    return torch.zeros_like(inputs["advantages"])


def with_reference_kl(loss: Loss) -> Loss:
    """`loss` plus `reference_kl`, for a policy-gradient loss."""

    def function(p: Tensor, inputs: Inputs, config: Config) -> Tensor:
        value = loss.function(p, inputs, config)
        return value + reference_kl(p, inputs, config) if _wants_reference(config) else value

    def needed(inputs: Inputs, config: Config) -> Tensor:
        own = loss.needed(inputs, config)
        return own | (inputs["kl_weights"] != 0) if _wants_reference(config) else own

    return replace(
        loss,
        function=function,
        needed=needed,
        optional={
            **loss.optional,
            "reference_logprobs": _no_reference,
            "kl_weights": _advantage_mask,
        },
        config={**loss.config, "kl_k3_coeff": 0.0, "kl_k2_coeff": 0.0},
    )


CLIPS = {key: _from_config(key) for key in ("clip_low_threshold", "clip_high_threshold")}


def _clips(low: float, high: float) -> Config:
    return {"clip_low_threshold": low, "clip_high_threshold": high}


def _outside(
    ratio: Callable[[Tensor, Inputs], Tensor],
) -> Callable[[Tensor, Inputs, Config], Tensor]:
    def clipped(p: Tensor, inputs: Inputs, config: Config) -> Tensor:
        r = ratio(p, inputs)
        return (r < inputs["clip_low_threshold"]) | (r > inputs["clip_high_threshold"])

    return clipped


def _capped(p: Tensor, inputs: Inputs, config: Config) -> Tensor:
    r = _ratio(p, inputs)
    return (r < 1 / config["ratio_cap"]) | (r > config["ratio_cap"])


LOSSES: dict[str, Loss] = {}


def register_loss(loss: Loss) -> None:
    """Make `loss` available to `forward_backward(loss_fn=loss.name)` in this process."""
    LOSSES[loss.name] = loss


register_loss(
    Loss(
        "cross_entropy",
        cross_entropy,
        lambda inputs, config: inputs["weights"] != 0,
        inputs=("weights",),
        multi_target=True,
    )
)
register_loss(with_reference_kl(Loss("importance_sampling", importance_sampling, _where_advantage)))
register_loss(
    with_reference_kl(
        Loss(
            "ppo",
            ppo,
            _where_advantage,
            optional=CLIPS,
            config={**_clips(0.8, 1.2), "dual_clip": 0.0},
            clipped=_outside(_ratio),
        )
    )
)
register_loss(
    with_reference_kl(
        Loss(
            "cispo",
            cispo,
            _where_advantage,
            optional=CLIPS,
            config=_clips(0.0, 4.0),
            clipped=_outside(_ratio),
        )
    )
)
register_loss(
    with_reference_kl(
        Loss(
            "gspo",
            gspo,
            _where_advantage_or("sequence_ratio_mask"),
            optional={"sequence_ratio_mask": _advantage_mask, **CLIPS},
            config=_clips(1 - 3e-4, 1 + 4e-4),  # the paper's
            clipped=_outside(_sequence_ratio),
        )
    )
)
register_loss(Loss("dro", dro, _everywhere, config={"beta": REQUIRED}))
register_loss(
    Loss(
        "stable_reinforce",
        stable_reinforce,
        _where_advantage_or("sampled_mask"),
        optional={"sampled_mask": _advantage_mask},
        config={"kl_coeff": 0.3, "ratio_cap": 2.0},
        clipped=_capped,
    )
)


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


def ratio_metrics(
    loss: Loss, p: Tensor, inputs: Inputs, config: Config, needed: Tensor
) -> dict[str, float]:
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
    if loss.clipped is not None:
        clipped = loss.clipped(p, inputs, config)[needed]
        metrics["clip_fraction:mean"] = float(clipped.double().mean())
    return metrics
