"""Advantages of a group: G episodes of the same task, compared with one another."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..primitives.errors import NotFound

Advantage = Callable[[np.ndarray], np.ndarray]
"""Rewards `[G]` to advantages `[G]`, float64."""


def grpo(rewards_G: np.ndarray) -> np.ndarray:
    """Reward minus the group's mean, over its standard deviation (Shao et al., DeepSeekMath,
    2024, eq. 3; population standard deviation, 1e-6 added)."""
    centred = rewards_G - rewards_G.mean()
    return centred / (rewards_G.std() + 1e-6)


def dr_grpo(rewards_G: np.ndarray) -> np.ndarray:
    """Reward minus the group's mean (Liu et al., "Understanding R1-Zero-like training", 2025)."""
    return rewards_G - rewards_G.mean()


def rloo(rewards_G: np.ndarray) -> np.ndarray:
    """Reward minus the mean of the others (Ahmadian et al., "Back to basics", 2024)."""
    size = len(rewards_G)
    if size < 2:
        return np.zeros(size)
    return (rewards_G - rewards_G.mean()) * size / (size - 1)


ADVANTAGES: dict[str, Advantage] = {"grpo": grpo, "dr_grpo": dr_grpo, "rloo": rloo}


def get_advantage(name: str) -> Advantage:
    """
    Raises:
        NotFound: no advantage of that name.
    """
    if name not in ADVANTAGES:
        raise NotFound(f"no advantage {name!r}; there are {', '.join(ADVANTAGES)}")
    return ADVANTAGES[name]
