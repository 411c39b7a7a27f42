"""Expert iteration: sample, keep the good episodes, imitate them with `cross_entropy`.

Known as rejection sampling or RFT (Yuan et al., "Scaling relationship on learning mathematical
reasoning", 2023; best of a group: Dong et al., RAFT, 2023) and as ReST-EM (Singh et al., "Beyond
human data", 2024: all that succeed). The idea: Anthony et al., "Thinking fast and slow with deep
learning and tree search", 2017.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ..primitives.errors import NotFound
from ..primitives.types import Datum, ModelInput, Trajectory
from .datums import sampled_masks, trajectory_datums
from .evaluate import is_success

Selection = Callable[[Sequence[Trajectory]], np.ndarray]
"""Trajectories of one group `[G]` to bool `[G]`: which to imitate."""


def successful(trajectories_G: Sequence[Trajectory]) -> np.ndarray:
    """Those that succeed (`is_success`), as in RFT and ReST-EM."""
    return np.array([is_success(t) for t in trajectories_G], bool)


def best(trajectories_G: Sequence[Trajectory]) -> np.ndarray:
    """The one with the highest reward, as in RAFT; of equals the first. None where all rewards are
    equal: there is nothing to prefer."""
    rewards = np.array([t.reward for t in trajectories_G])
    if len(rewards) < 2 or np.ptp(rewards) == 0:
        return np.zeros(len(rewards), bool)
    return np.arange(len(rewards)) == rewards.argmax()


SELECTIONS: dict[str, Selection] = {"successful": successful, "best": best}


def get_selection(name: str) -> Selection:
    """
    Raises:
        NotFound: no selection of that name.
    """
    if name not in SELECTIONS:
        raise NotFound(f"no selection {name!r}; there are {', '.join(SELECTIONS)}")
    return SELECTIONS[name]


def imitation_datums(trajectory: Trajectory, weight: float = 1.0) -> list[Datum]:
    """Datums for `cross_entropy`, one per segment: `weight` on every sampled token, 0 elsewhere."""
    masks = sampled_masks(trajectory)
    return [
        Datum(
            ModelInput(datum.model_input.tokens),
            {
                "target_tokens": datum.loss_fn_inputs["target_tokens"],
                "weights": np.where(mask, np.float32(weight), np.float32(0)),
            },
        )
        for datum, mask in zip(trajectory_datums(trajectory, 1.0), masks, strict=True)
    ]
