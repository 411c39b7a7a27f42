"""What a step of `train` trains on: from the groups of a batch to weighted datums.

Dimension names: P groups, G episodes of one, N episodes of the batch, D datums of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..primitives.client import SamplingClient
from ..primitives.errors import InvalidInput
from ..primitives.types import Datum, Trajectory
from .advantages import get_batch_advantage
from .config import TrainConfig
from .datums import episode_weights, on_policy_masks, sampled_masks, trajectory_datums
from .imitation import get_selection, imitation_datums
from .overlong import longest_turn, ran_out, soft_overlong_punishment
from .reference import penalise_kl, reference_logprobs, reference_metrics, with_reference
from .rollout import Group, has_signal


@dataclass(frozen=True, eq=False)
class Batch:
    """D datums and, of each: which targets were sampled (bool `[T]`), which by the learner's very
    version (bool `[T]`), and the weight of its episode, in its advantages already."""

    datums_D: list[Datum]
    sampled_D: list[np.ndarray]
    fresh_D: list[np.ndarray]
    weights_D: list[float]


def make_batch(groups: Sequence[Group], config: TrainConfig, version: int) -> Batch:
    """
    Raises:
        InvalidInput: a reward that is not finite; the message names the environment and episode.
    """
    episodes_N = [t for group in groups for t in group.trajectories]
    batch = Batch([], [], [], [])
    if not episodes_N:
        return batch
    scores_N = np.concatenate(_scores(groups, config))
    lengths_N = [0 if _left_out(t, config) else t.num_sampled_tokens for t in episodes_N]
    if config.imitates:
        lengths_N = [length * bool(s) for length, s in zip(lengths_N, scores_N, strict=True)]
    weights_N = episode_weights(np.array(lengths_N), config.normalize)
    for trajectory, score, weight in zip(episodes_N, scores_N, weights_N, strict=True):
        if config.imitates and not weight:
            continue
        make = imitation_datums if config.imitates else trajectory_datums
        batch.datums_D.extend(make(trajectory, float(score * weight)))
        batch.sampled_D.extend(sampled_masks(trajectory))
        batch.fresh_D.extend(on_policy_masks(trajectory, version))
        batch.weights_D.extend([float(weight)] * (len(batch.datums_D) - len(batch.weights_D)))
    return batch


def _scores(groups: Sequence[Group], config: TrainConfig) -> list[np.ndarray]:
    """Per group `[G]`: advantages, or 1 for the episodes to imitate and 0 for the others."""
    for group in groups:
        for member, trajectory in enumerate(group.trajectories):
            if not np.isfinite(trajectory.reward):
                raise InvalidInput(
                    f"environment {config.env!r}: the reward of episode {member} of group "
                    f"{group.index} (seed {trajectory.seed}) is {trajectory.reward}"
                )
    if config.imitates:
        select = get_selection(config.imitate)
        return [select(group.trajectories).astype(np.float64) for group in groups]
    rewards_P = [group.rewards + _punishments(group.trajectories, config) for group in groups]
    return get_batch_advantage(config.advantage)(rewards_P)


def _punishments(trajectories_G: Sequence[Trajectory], config: TrainConfig) -> np.ndarray:
    if not config.overlong_buffer:
        return np.zeros(len(trajectories_G))
    lengths_G = np.array([longest_turn(t) for t in trajectories_G])
    return soft_overlong_punishment(lengths_G, config.max_tokens, config.overlong_buffer)


def _left_out(trajectory: Trajectory, config: TrainConfig) -> bool:
    return config.overlong_filter and ran_out(trajectory, config.max_tokens)


async def hold_near(
    batch: Batch, reference: SamplingClient, config: TrainConfig
) -> tuple[Batch, dict[str, float]]:
    """The batch with the penalty on the divergence from the reference, and how large that is."""
    logprobs_D = await reference_logprobs(reference, batch.datums_D, batch.sampled_D)
    metrics = reference_metrics(batch.datums_D, logprobs_D, batch.sampled_D)
    if config.kl_form == "reward":
        coeffs_D = [config.kl_coeff * weight for weight in batch.weights_D]
        held_D = penalise_kl(batch.datums_D, logprobs_D, batch.sampled_D, coeffs_D)
    else:
        pairs = zip(batch.sampled_D, batch.weights_D, strict=True)
        weights_D = [np.where(mask, weight, 0.0) for mask, weight in pairs]
        held_D = with_reference(batch.datums_D, logprobs_D, weights_D)
    return replace(batch, datums_D=held_D), metrics


def loss_config(config: TrainConfig) -> dict[str, float]:
    """The loss's settings, the penalty's coefficient included where it is in the loss."""
    if config.kl_coeff > 0 and config.kl_form != "reward":
        return {**config.loss_fn_config, f"kl_{config.kl_form}_coeff": config.kl_coeff}
    return dict(config.loss_fn_config)


def worth_training_on(group: Group, config: TrainConfig) -> bool:
    """Whether a group moves the policy (DAPO's dynamic sampling replaces those that do not).

    `reinforce_pp` compares with the whole batch, so that every group counts.
    """
    if config.imitates:
        return bool(get_selection(config.imitate)(group.trajectories).any())
    return config.advantage == "reinforce_pp" or has_signal(group)
