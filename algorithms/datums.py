"""From trajectories to datums, and what trainer and sampler disagree about.

Dimension names: T tokens of a segment; a datum has T - 1 positions, each predicting the next token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..primitives.types import Datum, ForwardBackwardOutput, ModelInput, Segment, Trajectory


def segment_datum(segment: Segment, advantage: float) -> Datum | None:
    """The datum of one segment for a policy-gradient loss: `advantage` on every sampled token, 0
    elsewhere. What follows the last sampled token is cut; None if nothing was sampled."""
    sampled = np.flatnonzero(segment.mask)
    if len(sampled) == 0 or sampled[-1] == 0:
        return None
    stop = int(sampled[-1]) + 1
    mask = segment.mask[1:stop]
    return Datum(
        ModelInput(segment.tokens[: stop - 1]),
        {
            "target_tokens": segment.tokens[1:stop],
            "logprobs": segment.logprobs[1:stop],
            "advantages": np.where(mask, np.float32(advantage), np.float32(0)),
        },
    )


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


def truncated_importance_weights(
    datums: Sequence[Datum], output: ForwardBackwardOutput, cap: float
) -> list[Datum]:
    """The decoupled form: advantages times `min(pi_proximal / pi_behaviour, cap)`, and the
    proximal policy's logprobs in place of the behaviour's.

    `output` is a forward pass of the learner before its update, which makes its policy the
    proximal one: the trust region of `ppo` is then around it, and the weight corrects for stale
    weights and for numerical differences between trainer and sampler alike (Fu et al., AReaL,
    2025, eq. 5; truncation: Yao et al., "Your efficient RL framework secretly brings you
    off-policy training", 2025).
    """
    corrected = []
    for datum, outputs in zip(datums, output.loss_fn_outputs, strict=True):
        inputs = dict(datum.loss_fn_inputs)
        used = inputs["advantages"] != 0
        proximal = np.where(used, outputs["logprobs"], inputs["logprobs"])
        weight = np.minimum(np.exp(proximal - inputs["logprobs"]), cap)
        inputs["advantages"] = (inputs["advantages"] * weight).astype(np.float32)
        inputs["logprobs"] = proximal.astype(np.float32)
        corrected.append(Datum(datum.model_input, inputs))
    return corrected


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
