"""Whatever arrives, it is read or refused with a typed error."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tinker.proto import tinker_public_pb2 as pb

from tests.data import policy_datum
from tests.gateway.sdk import sdk_datum
from tests.gateway.test_wire import MiB, encode
from tinsmith.gateway import wire
from tinsmith.primitives.errors import InvalidInput

SIZES = [0, 1, 2, 3, 12, -1, 2**31, 2**62, 2**63 - 1]
DTYPES = [pb.DTYPE_FLOAT32, pb.DTYPE_INT64, pb.DTYPE_INT32, pb.DTYPE_BFLOAT16, 0, 99]
REAL = encode([sdk_datum(policy_datum(np.random.default_rng(i))) for i in range(3)])
indices = st.lists(
    st.one_of(st.integers(0, 4), st.sampled_from([-1, 2**62, 2**63 - 1, -(2**63)])), max_size=8
)


def read(body: bytes) -> None:
    try:
        request = wire.read_training_request(body, MiB)
    except InvalidInput:
        return
    assert request.run_id
    assert request.error is None or isinstance(request.error, InvalidInput)


@given(st.binary(max_size=400))
@settings(max_examples=150, deadline=None)
def test_random_bytes(body):
    read(body)
    wire.place_in_log(body, None)
    wire.place_in_log(body, "zstd")


@given(st.integers(0, len(REAL) - 1), st.integers(0, 7), st.booleans())
@settings(max_examples=250, deadline=None)
def test_damaged_requests(position, bit, cut):
    body = bytearray(REAL)
    body[position] ^= 1 << bit
    read(bytes(body[:position] if cut else body))


@given(
    st.sampled_from(DTYPES), st.lists(st.sampled_from(SIZES), max_size=3), st.binary(max_size=24)
)
@example(pb.DTYPE_FLOAT32, [0, 2**63 - 1], b"")
@example(pb.DTYPE_FLOAT32, [2**62, 4], b"")
@settings(max_examples=250, deadline=None)
def test_random_dense_tensors(dtype, shape, data):
    tensor = pb.Tensor(shape=shape, dense=data)
    tensor.dtype = dtype
    read(request(tensor))


@given(
    st.sampled_from(DTYPES[:4]),
    st.lists(st.sampled_from(SIZES), min_size=2, max_size=2),
    st.integers(0, 4),
    indices,
    indices,
)
@example(pb.DTYPE_FLOAT32, [0, 2**63 - 1], 0, [0], [])
@example(pb.DTYPE_FLOAT32, [2**63 - 1, 0], 0, [0], [])
@settings(max_examples=500, deadline=None)
def test_random_sparse_tensors(dtype, shape, count, rows, columns):
    tensor = pb.Tensor(dtype=dtype, shape=shape)
    tensor.sparse_csr.values = bytes(count * {1: 4, 2: 8, 3: 4, 4: 2}[dtype])
    tensor.sparse_csr.crow_indices = np.array(rows, "<i8").tobytes()
    tensor.sparse_csr.col_indices = np.array(columns, "<i8").tobytes()
    read(request(tensor))


def test_row_pointers_that_overflow_their_differences():
    big = 2**63 - 1
    tensor = pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=[3, 3])
    tensor.sparse_csr.values = bytes(20)
    tensor.sparse_csr.crow_indices = np.array([0, big, -big + 10, 5], "<i8").tobytes()
    tensor.sparse_csr.col_indices = np.array([0, 1, 2, 0, 1], "<i8").tobytes()
    with pytest.raises(InvalidInput, match="count up"):
        raise wire.read_training_request(request(tensor), MiB).error


def request(tensor: pb.Tensor) -> bytes:
    message = pb.ForwardBackwardRequest(model_id="m", seq_id=1, loss_fn="ppo")
    message.data.add().loss_fn_inputs["weights"].CopyFrom(tensor)
    return message.SerializeToString()
