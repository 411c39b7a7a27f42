from __future__ import annotations

import numpy as np
import pytest

import tinsmith
from tinsmith.algorithms.advantages import get_advantage


@pytest.mark.parametrize("size", [1, 2, 5, 16])
def test_advantages_equal_their_definitions(size):
    rewards = np.random.default_rng(size).normal(size=size)
    grpo, dr_grpo, rloo = (get_advantage(n)(rewards) for n in ("grpo", "dr_grpo", "rloo"))
    for i in range(size):
        centred = rewards[i] - sum(rewards) / size
        assert dr_grpo[i] == pytest.approx(centred)
        assert grpo[i] == pytest.approx(
            centred / (np.sqrt(np.mean((rewards - rewards.mean()) ** 2)) + 1e-6)
        )
        others = [r for j, r in enumerate(rewards) if j != i]
        expected = rewards[i] - sum(others) / len(others) if others else 0.0
        assert rloo[i] == pytest.approx(expected)


def test_equal_rewards_have_no_advantage():
    for name in ("grpo", "dr_grpo", "rloo"):
        assert not get_advantage(name)(np.ones(8)).any()


def test_an_unknown_advantage_is_refused():
    with pytest.raises(tinsmith.NotFound, match="no advantage 'gae'"):
        get_advantage("gae")
