"""Trajectories as JSON: how they come over HTTP, from services that recorded an agent's requests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np

from .errors import InvalidInput
from .types import Message, Segment, Trajectory

_DTYPES = {"tokens": np.int64, "mask": np.bool_, "logprobs": np.float32, "versions": np.int32}


class _Segment(msgspec.Struct):
    tokens: list[int]
    mask: list[bool]
    logprobs: list[float]
    versions: list[int]
    routed_experts: list[list[list[int]]] | None = None


class _Trajectory(msgspec.Struct):
    segments: list[_Segment]
    messages: list[Message]
    rewards: list[float] = []
    terminated: bool = False
    truncated: bool = False
    info: dict[str, Any] = {}
    seed: int | None = None
    seconds: float = 0.0


def trajectory_to_json(trajectory: Trajectory) -> dict[str, Any]:
    """JSON values that `trajectory_from_json` turns into the same trajectory, bit for bit."""
    return {
        "segments": [_segment_to_json(segment) for segment in trajectory.segments],
        "messages": trajectory.messages,
        "rewards": trajectory.rewards,
        "terminated": trajectory.terminated,
        "truncated": trajectory.truncated,
        "info": trajectory.info,
        "seed": trajectory.seed,
        "seconds": trajectory.seconds,
    }


def _segment_to_json(segment: Segment) -> dict[str, Any]:
    content = {name: getattr(segment, name).tolist() for name in _DTYPES}
    if segment.routed_experts is not None:
        content["routed_experts"] = segment.routed_experts.tolist()
    return content


def trajectory_from_json(data: Mapping[str, Any]) -> Trajectory:
    """The trajectory of `GET /v1/trajectories/{id}`, ready for `algorithms.datums`.

    Raises:
        InvalidInput: naming the field that is missing or of another shape.
    """
    try:
        content = msgspec.convert(dict(data), _Trajectory)
    except msgspec.ValidationError as error:
        raise InvalidInput(f"not a trajectory: {error}") from None
    return Trajectory(
        [_segment(index, segment) for index, segment in enumerate(content.segments)],
        content.rewards,
        content.terminated,
        content.truncated,
        content.messages,
        content.info,
        content.seed,
        content.seconds,
    )


def _segment(index: int, content: _Segment) -> Segment:
    routed = content.routed_experts
    names = (*_DTYPES, *(() if routed is None else ("routed_experts",)))
    lengths = {name: len(getattr(content, name)) for name in names}
    if len(set(lengths.values())) > 1:
        raise InvalidInput(f"not a trajectory: segments[{index}] has arrays of lengths {lengths}")
    try:
        arrays: dict[str, Any] = {
            n: np.array(getattr(content, n), kind) for n, kind in _DTYPES.items()
        }
        experts = None if routed is None else np.array(routed, np.int16)
    except (OverflowError, ValueError) as error:
        raise InvalidInput(f"not a trajectory: segments[{index}]: {error}") from None
    return Segment(**arrays, routed_experts=experts)
