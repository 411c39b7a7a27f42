"""What is encoded comes back bit for bit, with its types."""

from __future__ import annotations

import dataclasses

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from tinsmith.algorithms.rollout import Group
from tinsmith.primitives.codec import decode, encode
from tinsmith.primitives.types import (
    AdamParams,
    Checkpoint,
    Datum,
    ForwardBackwardOutput,
    LoraConfig,
    Match,
    ModelInput,
    OptimStepResponse,
    PolicyRef,
    PublishResponse,
    SampledSequence,
    SampledToken,
    SampleRequest,
    SampleResponse,
    SamplingParams,
    SaveResponse,
    Segment,
    ServerCapabilities,
    SupportedModel,
    TokenLogprobs,
    TrainingInfo,
    TrainingRun,
    Trajectory,
)

LOGPROBS = np.array([np.nan, -0.0, -1e-38, np.float32(-1 / 3)], np.float32)
TOP = TokenLogprobs(np.array([[3, 1], [0, 0]]), LOGPROBS.reshape(2, 2))
SEQUENCE = SampledSequence(
    np.array([5, 2**40, 0, 1]),
    LOGPROBS,
    np.array([1, 1, 2, 2], np.int32),
    "length",
    routed_experts=np.arange(24, dtype=np.uint8).reshape(6, 2, 2),
)
SEGMENT = Segment(
    np.arange(4), np.array([False, True, True, False]), LOGPROBS, np.array([-1, 3, 4, -1], np.int32)
)
TRAJECTORY = Trajectory(
    [SEGMENT, SEGMENT],
    [0.5, -1 / 3],
    True,
    False,
    [{"role": "user", "content": "hé"}, {"role": "assistant", "content": "", "tool_calls": [1]}],
    {"success": True, "turns": 2, "note": None},
    7,
    0.25,
)
LORA = LoraConfig(8, 16.0, None, train_mlp=False)
MATCH = Match({"a": TRAJECTORY, "b": TRAJECTORY}, ["a"], {"b": "its context is full"}, 3, 0.5)

EXAMPLES = [
    ModelInput(np.array([1, 2, 3])),
    Datum([1, 2], {"target_tokens": np.array([2, 3]), "weights": LOGPROBS[1:3]}),
    LORA,
    AdamParams(1e-5, 0.8, 0.9, 1e-8, 0.1, 1.0),
    PolicyRef("run", None),
    SEQUENCE,
    SampleResponse([SEQUENCE], LOGPROBS, TOP, LOGPROBS[:, None], TOP, 16),
    SampledToken(1, 5, -1 / 3, 4, "stop"),
    ForwardBackwardOutput([{"logprobs": LOGPROBS}, {}], {"loss:sum": 1 / 3}),
    OptimStepResponse(3, {"grad_norm": 0.1}),
    SaveResponse("tinker://run/weights/a"),
    PublishResponse(3, 0.5),
    ServerCapabilities([SupportedModel("m", 512)], ["ppo"]),
    TrainingRun("run", "m", LORA, 1.5, 2.5, {"k": [1, {"x": None}]}),
    Checkpoint("tinker://run/weights/a", "run", "weights", "a", 3, 1.5, 100, {"loop": {"step": 3}}),
    TrainingInfo("run", "m", "/m", LORA, 3, 512, 336, 1000, "nf4"),
    SEGMENT,
    TRAJECTORY,
    Group(4, 2, [TRAJECTORY], ["it broke"]),
    MATCH,
    Group(4, 2, [], ["it broke"], [MATCH]),
]


def assert_same(a, b):
    """Equal all the way down: types, dtypes, shapes and bits."""
    assert type(a) is type(b)
    if isinstance(a, np.ndarray):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.tobytes() == b.tobytes()
    elif dataclasses.is_dataclass(a):
        for field in dataclasses.fields(a):
            assert_same(getattr(a, field.name), getattr(b, field.name))
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    else:
        assert a == b


@pytest.mark.parametrize("value", EXAMPLES, ids=lambda v: type(v).__name__)
def test_every_dataclass_comes_back_bit_for_bit(value):
    assert_same(decode(encode(value), type(value)), value)


@pytest.mark.parametrize("stop", [None, [], "END", ["a", "b"], [1, 2]])
def test_sampling_params_and_requests_keep_every_form_of_stop(stop):
    params = SamplingParams(5, 2**40, stop, 0.5, 10, 0.9)
    assert_same(decode(encode(params), SamplingParams), params)
    targets = np.array([[3, -1]])
    request = SampleRequest([1, 2], params, PolicyRef("run", 3), 2, True, 4, 1, targets, 5, 6)
    assert_same(decode(encode(request), SampleRequest), request)


@given(
    npst.arrays(st.sampled_from(["<f4", "<f8", "<i4", "<i8", "|b1", "|u1"]), npst.array_shapes())
)
@settings(max_examples=50, deadline=None)
def test_any_array_comes_back_bit_for_bit_also_when_it_is_a_view(array):
    assert_same(decode(encode(array), np.ndarray), array)
    assert_same(decode(encode(array.T), np.ndarray), np.ascontiguousarray(array.T))


def test_empty_arrays_keep_their_dtype_and_shape():
    empty = np.zeros((0, 3), np.int32)
    assert_same(decode(encode(empty), np.ndarray), empty)


def test_decoded_arrays_are_read_only():
    back = decode(encode(SEQUENCE), SampledSequence)
    with pytest.raises(ValueError, match="read-only"):
        back.tokens[0] = 1


def test_bytes_of_something_else_are_refused():
    with pytest.raises(msgspec.ValidationError):
        decode(encode(SEQUENCE), Trajectory)
    with pytest.raises(msgspec.ValidationError):
        decode(encode({"run_id": 3}), PolicyRef)
