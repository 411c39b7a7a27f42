"""Trajectories survive JSON bit for bit, and what is none is named."""

from __future__ import annotations

import json

import numpy as np
import pytest

import tinsmith
from tinsmith.primitives.trajectory_json import trajectory_from_json, trajectory_to_json


def trajectory() -> tinsmith.Trajectory:
    rng = np.random.default_rng(0)
    segment = tinsmith.Segment(
        rng.integers(0, 1 << 40, 5),
        np.array([False, True, True, False, True]),
        rng.normal(size=5).astype(np.float32),
        np.array([-1, 3, 3, -1, 4], np.int32),
        rng.integers(-1, 300, (5, 2, 3)).astype(np.int16),
    )
    message = {"role": "user", "content": "é", "tool_calls": [{"x": [1, None]}]}
    return tinsmith.Trajectory([segment], [0.1], True, False, [message], {"turns": 1}, 7, 0.5)


def test_there_and_back():
    given = trajectory()
    got = trajectory_from_json(json.loads(json.dumps(trajectory_to_json(given))))
    for name in ("tokens", "mask", "logprobs", "versions", "routed_experts"):
        expected, array = getattr(given.segments[0], name), getattr(got.segments[0], name)
        assert array.dtype == expected.dtype
        np.testing.assert_array_equal(array, expected)
    for name in ("rewards", "terminated", "truncated", "messages", "info", "seed", "seconds"):
        assert getattr(got, name) == getattr(given, name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.pop("segments"), "segments"),
        (lambda data: data["segments"][0].update(tokens=["a"]), r"segments\[0\]|segments\[...\]"),
        (lambda data: data["segments"][0].update(mask=[True]), r"segments\[0\] has arrays of len"),
        (lambda data: data["segments"][0].update(tokens=[2**64] * 5), "segments"),
        (lambda data: data.update(messages="x"), "messages"),
        (lambda data: data["segments"][0].update(routed_experts=[[[1]]]), "arrays of lengths"),
        (lambda data: data["segments"][0]["routed_experts"][1].pop(), r"segments\[0\]"),
    ],
)
def test_what_is_no_trajectory_is_named(change, message):
    data = trajectory_to_json(trajectory())
    change(data)
    with pytest.raises(tinsmith.InvalidInput, match=f"not a trajectory.*{message}"):
        trajectory_from_json(data)


def test_experts_are_told_only_if_the_sampler_told():
    data = trajectory_to_json(trajectory())
    del data["segments"][0]["routed_experts"]
    got = trajectory_from_json(data)
    assert got.segments[0].routed_experts is None
    assert trajectory_to_json(got) == data
