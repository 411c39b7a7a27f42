"""From trajectories to datums, and what trainer and sampler disagree about.

Dimension names: T tokens of a segment; a datum has T - 1 positions, each predicting the next token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..primitives.errors import InvalidInput, NotFound
from ..primitives.types import (
    ROUTED_EXPERTS,
    Datum,
    ForwardBackwardOutput,
    ModelInput,
    Segment,
    Trajectory,
)


def segment_datum(segment: Segment, advantage: float) -> Datum | None:
    """The datum of one segment for a policy-gradient loss: `advantage` on every sampled token, 0
    elsewhere; with the experts that tokens went through, if the sampler told. What follows the last
    sampled token is cut; None if nothing was sampled."""
    sampled = np.flatnonzero(segment.mask)
    if len(sampled) == 0 or sampled[-1] == 0:
        return None
    stop = int(sampled[-1]) + 1
    mask = segment.mask[1:stop]
    inputs = {
        "target_tokens": segment.tokens[1:stop],
        "logprobs": segment.logprobs[1:stop],
        "advantages": np.where(mask, np.float32(advantage), np.float32(0)),
    }
    if segment.routed_experts is not None:
        inputs[ROUTED_EXPERTS] = segment.routed_experts[: stop - 1]
    return Datum(ModelInput(segment.tokens[: stop - 1]), inputs)


def trajectory_datums(trajectory: Trajectory, advantage: float) -> list[Datum]:
    """One datum for every segment that holds sampled tokens."""
    datums = (segment_datum(segment, advantage) for segment in trajectory.segments)
    return [datum for datum in datums if datum is not None]


def on_policy_masks(trajectory: Trajectory, version: int) -> list[np.ndarray]:
    """Per datum of `trajectory_datums`, bool: the target tokens of turns that `version` sampled
    from their first token to their last.

    A turn that goes on under new weights keeps the keys and values of the old ones, so that its
    later tokens are exactly those of neither.
    """
    masks = []
    for segment in trajectory.segments:
        sampled = np.flatnonzero(segment.mask)
        if len(sampled) == 0 or sampled[-1] == 0:
            continue
        mask = np.zeros(int(sampled[-1]) + 1, bool)
        for turn in np.split(sampled, np.flatnonzero(np.diff(sampled) > 1) + 1):
            mask[turn] = (segment.versions[turn] == version).all()
        masks.append(mask[1:])
    return masks


def sampled_masks(trajectory: Trajectory) -> list[np.ndarray]:
    """Per datum of `trajectory_datums`, bool `[T]`: the targets that the policy sampled."""
    masks = []
    for segment in trajectory.segments:
        sampled = np.flatnonzero(segment.mask)
        if len(sampled) and sampled[-1] > 0:
            masks.append(segment.mask[1 : int(sampled[-1]) + 1])
    return masks


def turn_lengths(trajectory: Trajectory) -> list[int]:
    """Tokens that the policy sampled in each of its turns, in order."""
    lengths = []
    for segment in trajectory.segments:
        edges = np.diff(np.concatenate([[False], segment.mask, [False]]).astype(np.int8))
        lengths += (np.flatnonzero(edges == -1) - np.flatnonzero(edges == 1)).tolist()
    return lengths


NORMALIZATIONS = ("episode", "sequence_mean", "token_mean")


def episode_weights(lengths_N: np.ndarray, normalize: str) -> np.ndarray:
    """What to multiply each of N episodes' advantages by, float64 `[N]`, since losses sum over
    tokens. `lengths_N` counts the sampled tokens of each; one of 0 (filtered out) weighs nothing.

    - `episode`: 1 / N. Every token counts alike, and the scale does not depend on how long the
      others are: Dr. GRPO's normalisation by a constant (Liu et al., 2025), up to that constant.
    - `sequence_mean`: 1 / (N length): GRPO's mean over tokens, then over episodes (Shao et al.,
      2024, eq. 3). In a long episode a token counts less.
    - `token_mean`: 1 / (tokens of all): DAPO's token-level loss (Yu et al., 2025, eq. 12).

    Raises:
        NotFound: no normalisation of that name.
    """
    lengths_N = np.asarray(lengths_N, np.float64)
    counted = lengths_N > 0
    if normalize == "episode":
        return counted / len(lengths_N)
    if normalize == "sequence_mean":
        return counted / (len(lengths_N) * np.maximum(lengths_N, 1))
    if normalize == "token_mean":
        return counted / max(lengths_N.sum(), 1)
    raise NotFound(f"no normalization {normalize!r}; there are {', '.join(NORMALIZATIONS)}")


IMPORTANCE_LEVELS = ("token", "geometric", "sequence")


def importance_weights(
    datums: Sequence[Datum],
    output: ForwardBackwardOutput,
    *,
    cap: float,
    level: str = "token",
    mask: bool = False,
) -> list[np.ndarray]:
    """Per datum, float64 `[T]`: `w = pi_proximal / pi_behaviour`, bounded, on the tokens with an
    advantage; 1 elsewhere. `output` is a forward pass of the learner before its update.

    `level` says of what the ratio is: of each token (Yao et al., "Your efficient RL framework
    secretly brings you off-policy training", 2025: little variance, biased where actions depend
    on earlier ones); `sequence`, of the datum's tokens together, the product of theirs (unbiased
    before it is bounded, and wild for long sequences); `geometric`, the mean of the log ratios of
    the datum's tokens, which does not grow with its length. The last two: Liu et al., "When speed
    kills stability: demystifying RL collapse from the training-inference mismatch", 2025.

    Bounded: `min(w, cap)`, or with `mask` `w` where `1 / cap <= w <= cap` and 0 elsewhere, which
    leaves out what differs too much instead of limiting it (both sides, as in IcePop: Ling team,
    "Every step evolves", 2025).

    Raises:
        InvalidInput: a cap below 1 with `mask`, or not above 0.
        NotFound: no such level.
    """
    if not cap > 0 or (mask and cap < 1):
        raise InvalidInput(f"cap must be above 0, and at least 1 for a mask; got {cap}")
    if level not in IMPORTANCE_LEVELS:
        raise NotFound(f"no level {level!r}; there are {', '.join(IMPORTANCE_LEVELS)}")
    weights = []
    for datum, outputs in zip(datums, output.loss_fn_outputs, strict=True):
        inputs = datum.loss_fn_inputs
        used = inputs["advantages"] != 0
        gap = outputs["logprobs"][used].astype(np.float64) - inputs["logprobs"][used]
        if level == "sequence":
            gap = np.full_like(gap, gap.sum())
        elif level == "geometric" and len(gap):
            gap = np.full_like(gap, gap.mean())
        if mask:
            bounded = np.where(np.abs(gap) <= np.log(cap), np.exp(np.minimum(gap, np.log(cap))), 0)
        else:
            bounded = np.exp(np.minimum(gap, np.log(cap)))
        weight = np.ones(len(used))
        weight[used] = bounded
        weights.append(weight)
    return weights


def weighted(datums: Sequence[Datum], weights: Sequence[np.ndarray]) -> list[Datum]:
    """The datums with their advantages times `weights`, per datum `[T]`."""
    return [
        with_inputs(datum, advantages=datum.loss_fn_inputs["advantages"] * weight)
        for datum, weight in zip(datums, weights, strict=True)
    ]


def around_proximal(datums: Sequence[Datum], output: ForwardBackwardOutput) -> list[Datum]:
    """The datums with the proximal policy's logprobs in place of the behaviour's, where there is
    an advantage: the trust region of `ppo` is then around the proximal policy."""
    moved = []
    for datum, outputs in zip(datums, output.loss_fn_outputs, strict=True):
        inputs = datum.loss_fn_inputs
        used = inputs["advantages"] != 0
        proximal = np.where(used, outputs["logprobs"], inputs["logprobs"])
        moved.append(with_inputs(datum, logprobs=proximal))
    return moved


def truncated_importance_weights(
    datums: Sequence[Datum],
    output: ForwardBackwardOutput,
    cap: float,
    *,
    level: str = "token",
    mask: bool = False,
) -> list[Datum]:
    """The decoupled form: advantages times `importance_weights`, the trust region `around_proximal`
    (Fu et al., AReaL, 2025, eq. 5).

    `output` is a forward pass of the learner before its update, which makes its policy the
    proximal one: the weight corrects for stale weights and for numerical differences between
    trainer and sampler alike.
    """
    weights = importance_weights(datums, output, cap=cap, level=level, mask=mask)
    return weighted(around_proximal(datums, output), weights)


def with_inputs(datum: Datum, **inputs: np.ndarray) -> Datum:
    """The datum with these `loss_fn_inputs`, float32, added or in place of its own."""
    new = {name: np.asarray(values, np.float32) for name, values in inputs.items()}
    return Datum(datum.model_input, {**datum.loss_fn_inputs, **new})


def mismatch_metrics(
    datums: Sequence[Datum], output: ForwardBackwardOutput, on_policy: Sequence[np.ndarray]
) -> dict[str, float]:
    """How far the learner's logprobs are from those recorded at sampling.

    `on_policy[i]` marks datum i's tokens that the very version the learner holds sampled
    (`on_policy_masks`): there any difference is numerical (`mismatch_max`, `mismatch_mean`, in nats). Over all tokens
    that the loss used, `policy_kl` estimates KL(sampler || learner) by
    `mean(exp(d) - 1 - d)`, d = learner - sampler (Schulman's k3).
    """
    differences, fresh = [np.zeros(0)], [np.zeros(0, bool)]
    for datum, outputs, current in zip(datums, output.loss_fn_outputs, on_policy, strict=True):
        used = datum.loss_fn_inputs["advantages"] != 0
        difference = outputs["logprobs"][used] - datum.loss_fn_inputs["logprobs"][used]
        differences.append(difference.astype(np.float64))
        fresh.append(current[used])
    d, same = np.concatenate(differences), np.concatenate(fresh)
    metrics = {"policy_kl": float(np.mean(np.expm1(d) - d)) if len(d) else 0.0}
    if same.any():
        metrics["mismatch_max"] = float(np.abs(d[same]).max())
        metrics["mismatch_mean"] = float(np.abs(d[same]).mean())
    return metrics
