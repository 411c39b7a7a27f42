"""The SDK's messages, read and written: round trips are exact, anything else is refused."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tinker import types
from tinker.proto import request_conv, response_conv
from tinker.proto import tinker_public_pb2 as pb

from tinsmith.gateway import wire
from tinsmith.primitives.errors import InvalidInput, OutOfCapacity
from tinsmith.primitives.types import ForwardBackwardOutput, SampledSequence, SampleResponse

MiB = 1 << 20
sides = st.tuples(st.integers(1, 6), st.integers(1, 6))
tokens = st.lists(st.integers(0, 2**31 - 1), max_size=20)
float_arrays = hnp.arrays(np.float32, hnp.array_shapes(max_dims=2, min_side=0, max_side=6))
int_arrays = hnp.arrays(np.int64, hnp.array_shapes(max_dims=2, min_side=0, max_side=6))


def encode(
    data: list[types.Datum],
    loss_fn: str = "ppo",
    config=None,
) -> bytes:
    inputs = types.ForwardBackwardInput(data=data, loss_fn=loss_fn, loss_fn_config=config)
    request = types.ForwardBackwardRequest(
        forward_backward_input=inputs, model_id="m:train:0", seq_id=7
    )
    return request_conv.forward_backward_request_to_proto(request).SerializeToString()


def read(body: bytes) -> wire.TrainingRequest:
    return wire.read_training_request(body, MiB)


@given(st.lists(tokens, max_size=3), float_arrays, int_arrays)
@settings(max_examples=60, deadline=None)
def test_a_request_arrives_as_it_was_sent(chunks, floats, ints):
    datum = types.Datum(
        model_input=types.ModelInput(chunks=[types.EncodedTextChunk(tokens=c) for c in chunks]),
        loss_fn_inputs={
            "advantages": types.TensorData.from_numpy(floats),
            "target_tokens": types.TensorData.from_numpy(ints),
        },
    )
    got = read(encode([datum, datum], config={"beta": 0.25, "name": "x"}))
    assert (got.run_id, got.seq_id, got.loss_fn, got.error) == ("m:train:0", 7, "ppo", None)
    assert got.config == {"beta": 0.25, "name": "x"}
    for sent in got.data:
        assert sent.model_input.to_ints() == [t for c in chunks for t in c]
        np.testing.assert_array_equal(sent.loss_fn_inputs["advantages"], floats)
        np.testing.assert_array_equal(sent.loss_fn_inputs["target_tokens"], ints)


@given(hnp.arrays(np.float32, sides, elements=st.sampled_from([0.0, 1.0, -2.5])))
@settings(max_examples=60, deadline=None)
def test_sparse_tensors_are_filled_in(array):
    sparse = types.TensorData.from_torch_sparse(torch.tensor(array))
    datum = types.Datum(
        model_input=types.ModelInput.from_ints([1]), loss_fn_inputs={"weights": sparse}
    )
    body = encode([datum], "cross_entropy")
    np.testing.assert_array_equal(read(body).data[0].loss_fn_inputs["weights"], array)


def test_bfloat16_is_the_upper_half_of_a_float():
    values = np.array([1.0, -2.5, 0.0], np.float32)
    message = pb.Tensor(dtype=pb.DTYPE_BFLOAT16, shape=[3])
    message.dense = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    np.testing.assert_array_equal(wire.read_tensor(message, wire._Budget(MiB)), values)


@given(
    st.lists(float_arrays.filter(lambda a: a.ndim == 1), min_size=1, max_size=4),
    st.dictionaries(st.sampled_from(["loss:sum", "tokens:sum"]), st.floats(allow_nan=False)),
)
@settings(max_examples=40, deadline=None)
def test_training_outputs_arrive_as_they_were_written(arrays, metrics):
    output = ForwardBackwardOutput([{"logprobs": a} for a in arrays], metrics)
    got = response_conv.deserialize_forward_backward_output(wire.write_training_output(output))
    assert got.metrics == metrics
    for a, b in zip(got.loss_fn_outputs, arrays, strict=True):
        np.testing.assert_array_equal(a["logprobs"].to_numpy(), b)


def test_outputs_of_different_widths_keep_their_order():
    shapes = [(3,), (2, 4), (5,), (1, 4), (1, 2)]
    arrays = [np.random.default_rng(0).normal(size=s).astype(np.float32) for s in shapes]
    output = ForwardBackwardOutput([{"logprobs": a} for a in arrays], {})
    got = response_conv.deserialize_forward_backward_output(wire.write_training_output(output))
    for a, b in zip(got.loss_fn_outputs, arrays, strict=True):
        np.testing.assert_array_equal(a["logprobs"].to_numpy().reshape(b.shape), b)


@given(
    st.lists(st.tuples(tokens, st.sampled_from(["stop", "length"])), min_size=1, max_size=3),
    st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_samples_arrive_as_they_were_written(sequences, with_prompt):
    rng = np.random.default_rng(0)
    sampled = [
        SampledSequence(
            np.array(t, np.int64), rng.normal(size=len(t)).astype(np.float32), np.zeros(len(t)), s
        )
        for t, s in sequences
    ]
    prompt = np.array([np.nan, -1.5, -2.0], np.float32) if with_prompt else None
    body = wire.write_sample_response(SampleResponse(sampled, prompt, prompt_cache_hit_tokens=3))
    got = response_conv.deserialize_sample_response(body)
    assert got.prompt_cache_hit_tokens == 3
    assert got.prompt_logprobs == ([None, -1.5, -2.0] if with_prompt else None)
    for a, b in zip(got.sequences, sampled, strict=True):
        assert list(a.tokens) == b.tokens.tolist()
        np.testing.assert_array_equal(np.array(a.logprobs, np.float32), b.logprobs)
        assert a.stop_reason == b.stop_reason


def test_a_zstd_bomb_is_given_up_early():
    bomb = zstandard.compress(bytes(64 * MiB))
    assert len(bomb) < 16 << 10
    with pytest.raises(OutOfCapacity, match="more than 1000 bytes"):
        wire.decompress(bomb, "zstd", 1000)
    assert wire.decompress(zstandard.compress(b"abc"), "zstd", 3) == b"abc"
    for body, encoding in [(b"abc", "zstd"), (b"abc", "br")]:
        with pytest.raises(InvalidInput):
            wire.decompress(body, encoding, MiB)


@pytest.mark.parametrize("level", [1, 3, 19])
def test_the_place_of_a_request_is_read_from_its_head(level):
    noise = np.random.default_rng(0).integers(0, 2**31, 500_000).tolist()
    datum = types.Datum(model_input=types.ModelInput.from_ints(noise), loss_fn_inputs={})
    body = encode([datum])
    assert wire.place_in_log(body[: wire.HEAD_BYTES], None) == ("m:train:0", 7)
    compressed = zstandard.compress(body, level)
    assert wire.place_in_log(compressed[: wire.HEAD_BYTES], "zstd") == ("m:train:0", 7)


def test_looking_for_the_place_opens_no_bomb():
    head = zstandard.compress(bytes(512 * MiB))[: wire.HEAD_BYTES]
    tracemalloc.start()
    assert wire.place_in_log(head, "zstd") is None
    assert tracemalloc.get_traced_memory()[1] < 4 * MiB
    tracemalloc.stop()
