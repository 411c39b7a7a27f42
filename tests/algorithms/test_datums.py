from __future__ import annotations

import numpy as np
import pytest

from tinsmith.algorithms.datums import (
    mismatch_metrics,
    on_policy_masks,
    trajectory_datums,
    truncated_importance_weights,
)
from tinsmith.primitives.types import ForwardBackwardOutput, Segment, Trajectory


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
