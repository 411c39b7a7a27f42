"""Answers that run out of tokens: punished softly, or left out (Yu et al., DAPO, 2025, 3.4)."""

from __future__ import annotations

import numpy as np

from ..primitives.errors import InvalidInput
from ..primitives.types import Trajectory
from .datums import turn_lengths


def soft_overlong_punishment(lengths: np.ndarray, max_length: int, buffer: int) -> np.ndarray:
    """What to add to the reward of answers of these lengths (tokens), float64 in their shape:
    0 up to `max_length - buffer`, then falling linearly to -1 at `max_length`, and -1 beyond
    (DAPO, eq. 13).

    Raises:
        InvalidInput: `buffer` is not from 1 to `max_length`.
    """
    if not 1 <= buffer <= max_length:
        raise InvalidInput(f"buffer must be from 1 to max_length {max_length}, got {buffer}")
    return np.clip((max_length - buffer - np.asarray(lengths, np.float64)) / buffer, -1.0, 0.0)


def longest_turn(trajectory: Trajectory) -> int:
    """Tokens of the policy's longest turn; 0 if it had none."""
    return max(turn_lengths(trajectory), default=0)


def ran_out(trajectory: Trajectory, max_tokens: int) -> bool:
    """Whether the episode was cut off, or one of its turns took all the tokens a turn may have:
    what over-long filtering leaves out, for its reward says little about what was written."""
    return trajectory.truncated or longest_turn(trajectory) >= max_tokens
