"""From groups to weighted datums, by the settings of `TrainConfig`."""

from __future__ import annotations

import numpy as np
import pytest

import tinsmith
from tinsmith.algorithms.batch import loss_config, make_batch, worth_training_on
from tinsmith.algorithms.imitation import best, imitation_datums, successful
from tinsmith.algorithms.rollout import Group

Config = tinsmith.TrainConfig


def episode(reward: float, tokens: int = 2, truncated: bool = False) -> tinsmith.Trajectory:
    n = tokens + 2
    mask = np.arange(n) >= 2
    segment = tinsmith.Segment(
        np.arange(n),
        mask,
        np.where(mask, -1.0, 0.0).astype(np.float32),
        np.where(mask, 4, -1).astype(np.int32),
    )
    return tinsmith.Trajectory([segment], [reward], not truncated, truncated, [], seed=11)


def group(index: int, *episodes: tinsmith.Trajectory) -> Group:
    return Group(index, 4, list(episodes))


def advantages(batch) -> list[float]:
    return [float(d.loss_fn_inputs["advantages"][-1]) for d in batch.datums_D]


def test_advantages_are_those_of_the_estimator_weighted_by_episode():
    groups = [group(0, episode(1), episode(0)), group(1, episode(5), episode(2))]
    batch = make_batch(groups, Config(advantage="dr_grpo"), 4)
    np.testing.assert_allclose(advantages(batch), np.array([0.5, -0.5, 1.5, -1.5]) / 4)
    assert batch.weights_D == [0.25] * 4
    assert all(mask[1:].all() for mask in batch.fresh_D)
    assert [m.tolist() for m in batch.sampled_D] == [[0, 1, 1]] * 4
    batch = make_batch(groups, Config(advantage="reinforce_pp"), 4)
    rewards = np.array([1, 0, 5, 2])
    expected = (rewards - 2) / (rewards.std() + 1e-6) / 4
    np.testing.assert_allclose(advantages(batch), expected, rtol=1e-6)


def test_long_and_short_episodes_count_as_the_normalization_says():
    groups = [group(0, episode(1, 2), episode(0, 6))]
    for name, weights in (
        ("episode", [1 / 2, 1 / 2]),
        ("sequence_mean", [1 / 4, 1 / 12]),
        ("token_mean", [1 / 8, 1 / 8]),
    ):
        batch = make_batch(groups, Config(advantage="dr_grpo", normalize=name), 4)
        np.testing.assert_allclose(batch.weights_D, weights)


def test_an_overlong_answer_is_punished_or_left_out():
    groups = [group(0, episode(1, 8), episode(1, 4), episode(0, 4), episode(1, 3, truncated=True))]
    settings = dict(advantage="dr_grpo", max_tokens=8)
    punished = make_batch(groups, Config(overlong_buffer=4, **settings), 4)
    np.testing.assert_allclose(np.array(advantages(punished)) * 4, [-0.5, 0.5, -0.5, 0.5])
    filtered = make_batch(groups, Config(overlong_filter=True, **settings), 4)
    assert filtered.weights_D == [0, 0.25, 0.25, 0]
    np.testing.assert_allclose(advantages(filtered), [0, 0.0625, -0.1875, 0])


@pytest.mark.parametrize("reward", [np.nan, np.inf])
def test_a_reward_that_is_not_finite_is_refused_with_its_episode(reward):
    groups = [group(0, episode(1), episode(0)), group(7, episode(1), episode(reward))]
    message = r"environment 'calculator': the reward of episode 1 of group 7 \(seed 11\) is "
    for settings in ({}, {"loss_fn": "cross_entropy"}):
        with pytest.raises(tinsmith.InvalidInput, match=message + str(reward)):
            make_batch(groups, Config(**settings), 4)


def test_expert_iteration_imitates_the_successful_or_the_best():
    groups = [group(0, episode(1), episode(0), episode(2, 5)), group(1, episode(0), episode(0))]
    assert successful(groups[0].trajectories).tolist() == [True, False, True]
    assert best(groups[0].trajectories).tolist() == [False, False, True]
    assert not best(groups[1].trajectories).any()
    config = Config(loss_fn="cross_entropy", normalize="token_mean")
    batch = make_batch(groups, config, 4)
    assert len(batch.datums_D) == 2
    weights = np.concatenate([d.loss_fn_inputs["weights"] for d in batch.datums_D])
    np.testing.assert_allclose(weights[weights > 0], np.full(7, 1 / 7))
    assert len(make_batch(groups, Config(loss_fn="cross_entropy", imitate="best"), 4).datums_D) == 1
    (datum,) = imitation_datums(episode(1, 3))
    assert datum.loss_fn_inputs["weights"].tolist() == [0, 1, 1, 1]
    assert datum.loss_fn_inputs["target_tokens"].tolist() == [1, 2, 3, 4]


def test_what_is_worth_training_on_depends_on_the_estimator():
    mixed, good = group(0, episode(1), episode(0)), group(1, episode(1), episode(1))
    bad = group(2, episode(0), episode(0))
    kept = {
        "grpo": [True, False, False],
        "reinforce_pp": [True, True, True],
    }
    for name, expected in kept.items():
        config = Config(advantage=name)
        assert [worth_training_on(g, config) for g in (mixed, good, bad)] == expected
    config = Config(loss_fn="cross_entropy")
    assert [worth_training_on(g, config) for g in (mixed, good, bad)] == [True, True, False]


def test_nothing_played_is_nothing_to_train_on():
    assert make_batch([group(0)], Config(), 4).datums_D == []


def test_the_penalty_in_the_loss_is_a_setting_of_the_loss():
    config = Config(kl_coeff=0.2, kl_form="k3", loss_fn="ppo", loss_fn_config={"dual_clip": 3.0})
    assert loss_config(config) == {"dual_clip": 3.0, "kl_k3_coeff": 0.2}
    assert loss_config(Config(kl_coeff=0.2)) == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"normalize": "mean"}, r"normalize must be one of episode, sequence_mean, token_mean"),
        ({"kl_form": "k1"}, r"kl_form must be one of reward, k2, k3, got 'k1'"),
        ({"kl_coeff": -0.1}, r"kl_coeff must not be negative"),
        ({"kl_coeff": 0.1, "kl_form": "k3", "loss_fn": "stable_reinforce"}, "takes no reference"),
        ({"loss_fn_config": {"kl_k3_coeff": 0.1}}, r"set TrainConfig\.kl_coeff and kl_form"),
        ({"importance_level": "word"}, "importance_level must be one of token, geometric"),
        ({"importance_mask": True}, "importance_mask needs a proximal_cap of at least 1"),
        ({"overlong_buffer": 65}, r"overlong_buffer \(65\) must not be above max_tokens \(64\)"),
        ({"loss_fn": "cross_entropy", "kl_coeff": 0.1}, "cross_entropy has no advantages"),
        ({"imitate": "worst"}, "no selection 'worst'; there are successful, best"),
        ({"replay_groups": -1}, "replay_groups must not be negative"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(tinsmith.TinsmithError, match=message):
        Config(**settings)
