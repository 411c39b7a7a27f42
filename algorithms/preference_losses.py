"""Preference losses: pure torch functions of whole answers' logprobs and a reference policy's.

All take float tensors `[B]` of summed logprobs: `chosen` and `rejected` of the policy, and the same
under the reference. `beta` (the papers' beta; IPO's tau) says how dear it is to leave the
reference. Each returns the loss per pair (or answer), `[B]`, to be averaged.

Dimension names: B pairs, or answers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def dpo(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """`-log sigmoid(beta h)`, with `h` the policy's log ratio of chosen to rejected minus the
    reference's (Rafailov et al., "Direct preference optimization", 2023, eq. 7).

    `label_smoothing` is the share of labels taken to be swapped (Mitchell, "A note on DPO with
    noisy preferences", 2023).
    """
    h = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    return -(1 - label_smoothing) * logsigmoid(h) - label_smoothing * logsigmoid(-h)


def ipo(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float = 0.1
) -> Tensor:
    """`(h - 1 / (2 beta))^2`, `h` as in DPO: the log ratio is drawn to a margin instead of pushed
    on for ever (Azar et al., "A general theoretical paradigm to understand learning from human
    preferences", 2023, eq. 17)."""
    h = (chosen - ref_chosen) - (rejected - ref_rejected)
    return (h - 1 / (2 * beta)) ** 2


def kto(
    answer: Tensor,
    ref_answer: Tensor,
    desirable: Tensor,
    mismatched: Tensor,
    ref_mismatched: Tensor,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """`w (1 - sigmoid(+-beta (r - z)))`, + where `desirable` (bool `[B]`), with `r` the answer's
    log ratio to the reference (Ethayarajh et al., "KTO: model alignment as prospect theoretic
    optimization", 2024, eq. 8).

    `z` estimates the policy's KL from the reference: the mean log ratio of answers to other
    prompts (`mismatched` `[M]`), at least 0, without gradient.
    """
    z = (mismatched - ref_mismatched).mean().clamp(min=0).detach()
    h = beta * ((answer - ref_answer) - z)
    return torch.where(
        desirable,
        desirable_weight * (1 - torch.sigmoid(h)),
        undesirable_weight * (1 - torch.sigmoid(-h)),
    )


def bradley_terry(better: Tensor, worse: Tensor) -> Tensor:
    """`-log sigmoid(better - worse)` of two scalar rewards (Bradley & Terry, 1952; Ouyang et al.,
    2022, eq. 1)."""
    return -logsigmoid(better - worse)
