from __future__ import annotations

import numpy as np
import pytest

import tinsmith
from tinsmith.algorithms.advantages import advantage_names, get_advantage, get_batch_advantage


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


def test_reinforce_pp_compares_with_the_whole_batch():
    rng = np.random.default_rng(0)
    groups = [rng.normal(size=size) for size in (3, 1, 4)]
    flat = np.concatenate(groups)
    mean, deviation = sum(flat) / 8, np.sqrt(sum((flat - sum(flat) / 8) ** 2) / 8)
    got = get_batch_advantage("reinforce_pp")(groups)
    for rewards, advantages in zip(groups, got, strict=True):
        for reward, advantage in zip(rewards, advantages, strict=True):
            assert advantage == pytest.approx((reward - mean) / (deviation + 1e-6))


def test_reinforce_pp_with_a_baseline_centres_by_group_and_scales_by_batch():
    rng = np.random.default_rng(1)
    groups = [rng.normal(loc, scale, 5) for loc, scale in ((0, 1), (7, 0.1), (-3, 2))]
    centred = [[r - sum(g) / 5 for r in g] for g in groups]
    deviation = np.sqrt(sum(c * c for g in centred for c in g) / 15)  # their mean is 0
    got = get_batch_advantage("reinforce_pp_baseline")(groups)
    np.testing.assert_allclose(got, np.array(centred) / (deviation + 1e-6), rtol=1e-9)


def test_a_groups_estimator_serves_a_batch():
    groups = [np.array([1.0, 0.0]), np.array([3.0, 2.0, 1.0])]
    got = get_batch_advantage("dr_grpo")(groups)
    assert [g.tolist() for g in got] == [[0.5, -0.5], [1.0, 0.0, -1.0]]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "reinforce_pp_baseline"])
def test_a_reward_that_is_not_finite_is_refused_by_group_and_episode(name, value):
    batch = [np.zeros(2), np.array([0.0, 1.0, value])]
    message = f"group 1: the reward of episode 2 is {value}, not finite"
    with pytest.raises(tinsmith.InvalidInput, match=message):
        get_batch_advantage(name)(batch)
    if name != "reinforce_pp_baseline":
        with pytest.raises(tinsmith.InvalidInput, match="the reward of episode 2 is"):
            get_advantage(name)(batch[1])


def test_an_unknown_advantage_is_refused():
    with pytest.raises(tinsmith.NotFound, match="no advantage 'gae'"):
        get_advantage("gae")
    with pytest.raises(tinsmith.NotFound, match="no advantage 'gae'"):
        get_batch_advantage("gae")
    with pytest.raises(tinsmith.NotFound, match="over a whole batch"):
        get_advantage("reinforce_pp")
    assert all(get_batch_advantage(name) for name in advantage_names())
