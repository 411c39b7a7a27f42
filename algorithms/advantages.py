"""Advantages: how much better an episode was than its peers.

Most estimators compare the G episodes of one group; those of REINFORCE++ normalise over all N
episodes of a batch. `batch_advantages` serves both. Dimension names: G group, P groups of a batch,
N episodes of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ..primitives.errors import InvalidInput, NotFound

Advantage = Callable[[np.ndarray], np.ndarray]
"""Rewards `[G]` to advantages `[G]`, float64."""

BatchAdvantage = Callable[[Sequence[np.ndarray]], list[np.ndarray]]
"""Rewards of P groups, each `[G]`, to their advantages in the same shapes, float64."""


def check_rewards(rewards_G: np.ndarray) -> np.ndarray:
    """The rewards as float64.

    Raises:
        InvalidInput: one of them is NaN or infinite; the message says which.
    """
    rewards_G = np.asarray(rewards_G, np.float64)
    bad = np.flatnonzero(~np.isfinite(rewards_G))
    if len(bad):
        raise InvalidInput(f"the reward of episode {bad[0]} is {rewards_G[bad[0]]}, not finite")
    return rewards_G


def grpo(rewards_G: np.ndarray) -> np.ndarray:
    """Reward minus the group's mean, over its standard deviation (Shao et al., DeepSeekMath,
    2024, eq. 3; population standard deviation, 1e-6 added)."""
    return _standardised(check_rewards(rewards_G))


def dr_grpo(rewards_G: np.ndarray) -> np.ndarray:
    """Reward minus the group's mean (Liu et al., "Understanding R1-Zero-like training", 2025)."""
    rewards_G = check_rewards(rewards_G)
    return rewards_G - rewards_G.mean()


def rloo(rewards_G: np.ndarray) -> np.ndarray:
    """Reward minus the mean of the others (Ahmadian et al., "Back to basics", 2024)."""
    rewards_G, size = check_rewards(rewards_G), len(rewards_G)
    if size < 2:
        return np.zeros(size)
    return (rewards_G - rewards_G.mean()) * size / (size - 1)


def reinforce_pp(rewards_P: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Reward minus the batch's mean, over its standard deviation (Hu et al., "REINFORCE++", 2025,
    eq. 9). Needs no groups: `group_size=1` will do."""
    return _split(_standardised(_joined(rewards_P)), rewards_P)


def reinforce_pp_baseline(rewards_P: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Reward minus the group's mean; these then standardised over the batch (Hu et al., 2025, the
    variant "with baseline", eq. 11): easy and hard tasks weigh alike, without a division by the
    small deviation of a group that nearly agrees."""
    _joined(rewards_P)
    centred = np.concatenate([dr_grpo(rewards_G) for rewards_G in rewards_P])
    return _split(_standardised(centred), rewards_P)


def _standardised(values_N: np.ndarray) -> np.ndarray:
    return (values_N - values_N.mean()) / (values_N.std() + 1e-6)


def _joined(rewards_P: Sequence[np.ndarray]) -> np.ndarray:
    for group, rewards_G in enumerate(rewards_P):
        try:
            check_rewards(rewards_G)
        except InvalidInput as error:
            raise InvalidInput(f"group {group}: {error}") from None
    return np.concatenate([np.asarray(rewards_G, np.float64) for rewards_G in rewards_P])


def _split(values_N: np.ndarray, like_P: Sequence[np.ndarray]) -> list[np.ndarray]:
    return np.split(values_N, np.cumsum([len(like_G) for like_G in like_P])[:-1])


ADVANTAGES: dict[str, Advantage] = {"grpo": grpo, "dr_grpo": dr_grpo, "rloo": rloo}
BATCH_ADVANTAGES: dict[str, BatchAdvantage] = {
    "reinforce_pp": reinforce_pp,
    "reinforce_pp_baseline": reinforce_pp_baseline,
}


def get_advantage(name: str) -> Advantage:
    """The estimator of one group.

    Raises:
        NotFound: no advantage of that name.
    """
    if name in BATCH_ADVANTAGES:
        raise NotFound(f"{name!r} is over a whole batch: get_batch_advantage({name!r})")
    if name not in ADVANTAGES:
        raise NotFound(f"no advantage {name!r}; there are {', '.join(advantage_names())}")
    return ADVANTAGES[name]


def get_batch_advantage(name: str) -> BatchAdvantage:
    """Any estimator, over the groups of a batch; a group's own is taken group by group.

    The estimators raise `InvalidInput`, naming the group and the episode, for a reward that is
    not finite.

    Raises:
        NotFound: no advantage of that name.
    """
    if name in BATCH_ADVANTAGES:
        return BATCH_ADVANTAGES[name]
    estimate = get_advantage(name)

    def by_group(rewards_P: Sequence[np.ndarray]) -> list[np.ndarray]:
        _joined(rewards_P)
        return [estimate(rewards_G) for rewards_G in rewards_P]

    return by_group


def advantage_names() -> list[str]:
    return [*ADVANTAGES, *BATCH_ADVANTAGES]
