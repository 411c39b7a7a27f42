"""A reference policy: its logprobs, and the penalty for leaving it, in the reward or in the loss.

The reference is any `SamplingClient`: the base model's (`create_sampling_client(base_model=…)`), a
checkpoint's, or a pinned version. Dimension name: T positions of a datum.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np

from ..primitives.client import SamplingClient
from ..primitives.types import Datum
from .datums import with_inputs


async def reference_logprobs(
    reference: SamplingClient, datums: Sequence[Datum], masks: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """Per datum, float32 `[T]`: the reference's logprob of each target that its mask (bool `[T]`,
    `sampled_masks`) marks, 0 elsewhere. A datum must leave room for two more tokens in the model's
    context.

    Raises:
        InvalidInput: a datum is too long.
    """

    async def score(datum: Datum, mask: np.ndarray) -> np.ndarray:
        targets = datum.loss_fn_inputs["target_tokens"]
        if not mask.any():
            return np.zeros(len(targets), np.float32)
        tokens = np.concatenate([datum.model_input.tokens, targets[-1:]])
        wanted = len(targets) - int(np.argmax(mask))
        logprobs = await reference.compute_logprobs(tokens, prompt_logprobs_last_n=wanted)
        return np.where(mask, logprobs[1:], np.float32(0))

    return await asyncio.gather(*map(score, datums, masks))


def penalise_kl(
    datums: Sequence[Datum],
    reference: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
    coeff: float | Sequence[float],
    *,
    discount: float = 0.0,
) -> list[Datum]:
    """The KL penalty in the reward: `-coeff k1` on every sampled token, `k1 = q - q_ref` with the
    sampler's logprob `q` (Schulman, "Approximating KL divergence", 2020; in the reward: Ouyang et
    al., InstructGPT, 2022, eq. 2).

    A baseline, the mean of k1 over the batch's sampled tokens, is taken off, which changes no
    expectation. With `discount` above 0 a token also answers for the penalties that follow it in
    its datum, the n-th one times `discount ** n` (1: the whole gradient of the sequence's KL).
    The coefficient, one for all datums or one for each, counts per token as advantages do: weigh
    both alike (`episode_weights`).
    """
    k1s = [
        np.where(mask, datum.loss_fn_inputs["logprobs"].astype(np.float64) - q_ref, 0.0)
        for datum, q_ref, mask in zip(datums, reference, masks, strict=True)
    ]
    baseline = sum(k1.sum() for k1 in k1s) / max(sum(int(mask.sum()) for mask in masks), 1)
    penalised = []
    coeffs = np.broadcast_to(np.asarray(coeff, np.float64), len(datums))
    for datum, k1, mask, own in zip(datums, k1s, masks, coeffs, strict=True):
        costs = np.where(mask, k1 - baseline, 0.0)
        costs[mask] = discounted_sums(costs[mask], discount)
        advantages = datum.loss_fn_inputs["advantages"] - own * costs
        penalised.append(with_inputs(datum, advantages=advantages))
    return penalised


def discounted_sums(values: np.ndarray, discount: float) -> np.ndarray:
    """`sum over n >= 0 of discount^n values[t + n]`, `[T]`."""
    sums, following = np.zeros(len(values)), 0.0
    for t in reversed(range(len(values))):
        sums[t] = following = values[t] + discount * following
    return sums


def with_reference(
    datums: Sequence[Datum],
    reference: Sequence[np.ndarray],
    weights: Sequence[np.ndarray],
) -> list[Datum]:
    """The KL penalty in the loss: the datums with the inputs that `kl_k2_coeff` and `kl_k3_coeff`
    of the policy-gradient losses need (`losses.reference_kl`). `weights`, `[T]`, says how much
    each token's penalty counts: 0 where nothing was sampled."""
    return [
        with_inputs(datum, reference_logprobs=q_ref, kl_weights=weight)
        for datum, q_ref, weight in zip(datums, reference, weights, strict=True)
    ]


def reference_metrics(
    datums: Sequence[Datum], reference: Sequence[np.ndarray], masks: Sequence[np.ndarray]
) -> dict[str, float]:
    """`reference_kl`: the sampler's KL from the reference, in nats per token, by k1's mean."""
    gaps = [
        (datum.loss_fn_inputs["logprobs"] - q_ref)[mask]
        for datum, q_ref, mask in zip(datums, reference, masks, strict=True)
    ]
    gap = np.concatenate(gaps) if gaps else np.zeros(0)
    return {"reference_kl": float(gap.mean(dtype=np.float64)) if len(gap) else 0.0}
