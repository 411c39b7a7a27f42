from __future__ import annotations

import numpy as np
import pytest

import tinsmith
from tinsmith.algorithms.overlong import longest_turn, ran_out, soft_overlong_punishment
from tinsmith.primitives.types import Segment, Trajectory


def played(mask: str, truncated: bool = False) -> Trajectory:
    sampled = np.array([c == "x" for c in mask])
    n = len(sampled)
    segment = Segment(np.arange(n), sampled, np.zeros(n, np.float32), np.zeros(n, np.int32))
    return Trajectory([segment], [1.0], not truncated, truncated, [])


def test_the_soft_punishment_is_dapos_by_cases():
    """Eq. 13, with L_max = 20480 - 4096 + 4096 as in the paper, and small ones."""
    for longest, buffer in ((20480, 4096), (10, 3), (5, 5)):
        lengths = np.arange(0, longest + 40, max(longest // 200, 1))
        for length, got in zip(
            lengths, soft_overlong_punishment(lengths, longest, buffer), strict=True
        ):
            if length <= longest - buffer:
                assert got == 0
            elif length <= longest:
                assert got == pytest.approx(((longest - buffer) - length) / buffer)
            else:
                assert got == -1


@pytest.mark.parametrize("buffer", [0, 11])
def test_a_buffer_that_does_not_fit_is_refused(buffer):
    with pytest.raises(tinsmith.InvalidInput, match="buffer must be from 1 to max_length 10"):
        soft_overlong_punishment(np.array([3]), 10, buffer)


def test_an_episode_ran_out_if_a_turn_did_or_it_was_cut_off():
    assert longest_turn(played("..xx..xxx.x")) == 3
    assert longest_turn(played("...")) == 0
    assert not ran_out(played("..xx..xxx.x"), 4)
    assert ran_out(played("..xx..xxx.x"), 3)
    assert ran_out(played("..x", truncated=True), 4)
