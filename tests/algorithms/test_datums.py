from __future__ import annotations

import numpy as np
import pytest

import tinsmith
from tinsmith.algorithms.datums import (
    episode_weights,
    importance_weights,
    mismatch_metrics,
    on_policy_masks,
    sampled_masks,
    trajectory_datums,
    truncated_importance_weights,
    turn_lengths,
)
from tinsmith.envs.renderer import GrowingSegment
from tinsmith.primitives.types import (
    ForwardBackwardOutput,
    SampledSequence,
    Segment,
    Trajectory,
)


def trajectory(masks) -> Trajectory:
    segments = []
    for mask in masks:
        mask = np.array(mask, bool)
        tokens = np.arange(len(mask)) + 10
        logprobs = np.where(mask, -tokens / 10, 0).astype(np.float32)
        segments.append(Segment(tokens, mask, logprobs, np.where(mask, 4, -1).astype(np.int32)))
    return Trajectory(segments, [1.0], True, False, [])


def test_a_datums_targets_logprobs_and_advantages_line_up():
    (datum,) = trajectory_datums(trajectory([[0, 0, 1, 1, 0, 1, 0, 0]]), -2.0)
    assert datum.model_input.to_ints() == [10, 11, 12, 13, 14]
    assert datum.loss_fn_inputs["target_tokens"].tolist() == [11, 12, 13, 14, 15]
    assert datum.loss_fn_inputs["advantages"].tolist() == [0, -2, -2, 0, -2]
    np.testing.assert_allclose(datum.loss_fn_inputs["logprobs"], [0, -1.2, -1.3, 0, -1.5])


def test_experts_are_replayed_as_each_token_was_first_computed():
    """Two turns: what the second tells of the first one's tokens is not taken, but for its last,
    which was not computed before."""
    growing, rng = GrowingSegment([1, 2, 3]), np.random.default_rng(0)
    told = [
        rng.integers(0, 8, (length, 2, 2)).astype(np.uint8) for length in (3 + 2 - 1, 7 + 3 - 1)
    ]
    for tokens, routed, given in (([4, 5], told[0], [6, 7]), ([8, 9, 10], told[1], [11])):
        n = len(tokens)
        growing.sample(
            SampledSequence(
                np.array(tokens),
                np.zeros(n, np.float32),
                np.zeros(n, np.int32),
                "stop",
                None,
                routed,
            )
        )
        growing.give(given)
    segment = growing.segment()
    np.testing.assert_array_equal(segment.routed_experts[:4], told[0])
    np.testing.assert_array_equal(segment.routed_experts[4:9], told[1][4:])
    assert (segment.routed_experts[9:] == -1).all()
    assert len(segment.routed_experts) == len(segment.tokens) == 11
    (datum,) = trajectory_datums(Trajectory([segment], [1.0], True, False, []), 1.0)
    assert datum.model_input.to_ints() == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    replayed = datum.loss_fn_inputs["routed_experts"]
    np.testing.assert_array_equal(replayed, segment.routed_experts[:9])
    assert (replayed >= 0).all()


def test_every_segment_with_sampled_tokens_is_a_datum():
    played = trajectory([[0, 1], [0, 0, 0], [0, 1, 1]])
    assert [d.model_input.length for d in trajectory_datums(played, 1.0)] == [1, 2]
    assert [len(mask) for mask in on_policy_masks(played, 4)] == [1, 2]


def test_a_turn_is_on_policy_if_all_of_it_is():
    mask = np.array([0, 0, 1, 1, 0, 1, 1, 0, 1, 0], bool)
    versions = np.array([-1, -1, 3, 4, -1, 4, 4, -1, 3, -1], np.int32)
    tokens = np.arange(10)
    segment = Segment(tokens, mask, np.zeros(10, np.float32), versions)
    played = Trajectory([segment], [1.0], True, False, [])
    (on_policy,) = on_policy_masks(played, 4)
    assert on_policy.tolist() == [0, 0, 0, 0, 1, 1, 0, 0]
    assert len(on_policy) == trajectory_datums(played, 1.0)[0].model_input.length


def test_importance_weights_are_truncated_and_the_proximal_policy_takes_over():
    datums = trajectory_datums(trajectory([[0, 1, 1, 1]]), 2.0)
    behaviour = datums[0].loss_fn_inputs["logprobs"]
    proximal = behaviour + np.log([0.5, 1.0, 8.0]).astype(np.float32)
    output = ForwardBackwardOutput([{"logprobs": proximal}], {})
    (corrected,) = truncated_importance_weights(datums, output, cap=3.0)
    np.testing.assert_allclose(corrected.loss_fn_inputs["advantages"], [1, 2, 6], rtol=1e-5)
    np.testing.assert_allclose(corrected.loss_fn_inputs["logprobs"], proximal)


@pytest.mark.parametrize("level", ["token", "geometric", "sequence"])
@pytest.mark.parametrize("mask", [False, True])
def test_importance_weights_equal_their_definitions(level, mask):
    rng = np.random.default_rng(0)
    datums, outputs = [], []
    for _ in range(40):
        (datum,) = trajectory_datums(trajectory([[0, 1, 1, 0, 1, 1]]), 1.0)
        gap = rng.normal(0, 0.4, 5).astype(np.float32)
        datums.append(datum)
        outputs.append({"logprobs": datum.loss_fn_inputs["logprobs"] + gap})
    output = ForwardBackwardOutput(outputs, {})
    got = importance_weights(datums, output, cap=1.4, level=level, mask=mask)
    bounded = 0
    for datum, out, weights in zip(datums, outputs, got, strict=True):
        ratios = np.exp(out["logprobs"].astype(float) - datum.loss_fn_inputs["logprobs"])
        used = np.array([0, 1, 3, 4])
        product = ratios[used].prod()
        for t in range(5):
            w = {"token": ratios[t], "geometric": product**0.25, "sequence": product}[level]
            expected = (w if 1 / 1.4 <= w <= 1.4 else 0.0) if mask else min(w, 1.4)
            bounded += t in used and expected != w
            assert weights[t] == pytest.approx(expected if t in used else 1.0, rel=1e-6)
    assert bounded > 0


def test_a_bound_or_level_that_makes_no_sense_is_refused():
    output = ForwardBackwardOutput([], {})
    for settings in ({"cap": 0.0}, {"cap": 0.5, "mask": True}):
        with pytest.raises(tinsmith.InvalidInput, match="cap must be above 0"):
            importance_weights([], output, **settings)
    with pytest.raises(tinsmith.NotFound, match="no level 'word'; there are token, geometric"):
        importance_weights([], output, cap=2.0, level="word")


def test_normalizations_weigh_tokens_as_their_papers_do():
    """Each against the mean that its paper writes, of random values per token."""
    rng = np.random.default_rng(0)
    lengths = np.array([3, 1, 7, 4])
    values = [rng.normal(size=n) for n in lengths]
    means = {
        "episode": np.mean([v.sum() for v in values]),
        "sequence_mean": np.mean([v.mean() for v in values]),
        "token_mean": np.concatenate(values).mean(),
    }
    for name, mean in means.items():
        weights = episode_weights(lengths, name)
        total = sum(w * v.sum() for w, v in zip(weights, values, strict=True))
        assert total == pytest.approx(mean)
    # One that is filtered out counts nowhere.
    assert episode_weights(np.array([3, 0, 5]), "token_mean").tolist() == [1 / 8, 0, 1 / 8]
    assert not episode_weights(np.zeros(2), "sequence_mean").any()
    with pytest.raises(tinsmith.NotFound, match="no normalization 'none'"):
        episode_weights(lengths, "none")


def test_turns_and_masks_line_up_with_datums():
    played = trajectory([[0, 1, 1, 0, 1], [0, 0, 0], [0, 0, 1, 1, 1, 0]])
    assert turn_lengths(played) == [2, 1, 3]
    assert [m.tolist() for m in sampled_masks(played)] == [[1, 1, 0, 1], [0, 1, 1, 1]]
    for datum, mask in zip(trajectory_datums(played, 2.0), sampled_masks(played), strict=True):
        assert (datum.loss_fn_inputs["advantages"] != 0).tolist() == mask.tolist()


def test_mismatch_is_told_apart_from_staleness():
    datums = trajectory_datums(trajectory([[0, 1, 1, 0, 1]]), 1.0)
    difference = np.array([0.01, -0.3, np.nan, 0.5], np.float32)
    output = ForwardBackwardOutput(
        [{"logprobs": datums[0].loss_fn_inputs["logprobs"] + difference}], {}
    )
    metrics = mismatch_metrics(datums, output, [np.array([True, False, False, False])])
    assert metrics["mismatch_max"] == pytest.approx(0.01, rel=1e-3)
    expected = np.mean([np.exp(d) - 1 - d for d in (0.01, -0.3, 0.5)])
    assert metrics["policy_kl"] == pytest.approx(expected, rel=1e-3)
