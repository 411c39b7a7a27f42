"""The protobuf messages of the Tinker API, to and from Tinsmith's types.

The message classes come with the `tinker` package. Everything that arrives is checked here for
its form; what it means is checked where it is used.

Dimension names: T tokens, K alternatives per token.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import zstandard
from google.protobuf.message import DecodeError
from tinker.proto import tinker_public_pb2 as pb

from ..primitives.errors import InvalidInput, OutOfCapacity
from ..primitives.types import Datum, ForwardBackwardOutput, SampleResponse, TokenLogprobs

_DTYPES: dict[int, np.dtype[Any]] = {
    pb.DTYPE_FLOAT32: np.dtype("<f4"),
    pb.DTYPE_INT64: np.dtype("<i8"),
    pb.DTYPE_INT32: np.dtype("<i4"),
    pb.DTYPE_BFLOAT16: np.dtype("<u2"),  # the upper half of a float32
}
_PROTO_DTYPES = {"f": pb.DTYPE_FLOAT32, "i": pb.DTYPE_INT64}
_STOP_REASONS = {"stop": pb.STOP_REASON_STOP, "length": pb.STOP_REASON_LENGTH}
EMPTY_LOGPROB = -99999.0
HEAD_BYTES = 1 << 18  # of a request, that tell its place in a log: more than one block of zstd


@dataclass(frozen=True)
class Span:
    """Tokens `[offset, offset + length)` of a recorded sequence's prompt or sampled tokens."""

    sampled: bool
    sequence_id: str
    offset: int
    length: int


@dataclass(frozen=True, eq=False)
class TrainingRequest:
    """A `ForwardBackwardRequest`. `error` is what is wrong with its data, whose place in the
    run's log is known all the same."""

    run_id: str
    seq_id: int
    loss_fn: str = ""
    config: dict[str, float | str] = field(default_factory=dict)
    forward_only: bool = False
    data: list[Datum] = field(default_factory=list)
    input_spans: list[list[Span]] = field(default_factory=list)
    target_spans: list[list[Span]] = field(default_factory=list)
    error: InvalidInput | None = None


def decompress(body: bytes, encoding: str | None, max_bytes: int) -> bytes:
    """
    Raises:
        InvalidInput: not of that encoding, or one that is not known.
        OutOfCapacity: more than `max_bytes` come out.
    """
    if encoding in (None, "", "identity"):
        return body
    if encoding != "zstd":
        raise InvalidInput(f"content-encoding {encoding!r} is not supported: send zstd or none")
    try:
        with zstandard.ZstdDecompressor().stream_reader(body, read_across_frames=True) as reader:
            data = reader.read(max_bytes + 1)
    except zstandard.ZstdError as error:
        raise InvalidInput(f"the body is not zstd: {error}") from None
    if len(data) > max_bytes:
        raise OutOfCapacity(f"the body decompresses to more than {max_bytes} bytes")
    return data


def place_in_log(head: bytes, encoding: str | None) -> tuple[str, int] | None:
    """`model_id` and `seq_id` from the beginning of a `ForwardBackwardRequest` that is refused
    unread: they are its first fields. None where they are not."""
    if encoding == "zstd":
        try:
            with zstandard.ZstdDecompressor().stream_reader(head) as reader:
                head = reader.read(1024)  # and no more: it may be a bomb
        except zstandard.ZstdError:
            return None
    try:
        if head[0] != 0x0A or head[1] > 127:  # field 1, a string of one length byte
            return None
        end = 2 + head[1]
        run_id = head[2:end].decode()
        if head[end] != 0x10:  # field 2, a varint
            return None
        seq_id, shift = 0, 0
        for byte in head[end + 1 : end + 11]:
            seq_id |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return run_id, seq_id
    except (IndexError, UnicodeDecodeError):
        pass
    return None


def read_training_request(body: bytes, max_bytes: int) -> TrainingRequest:
    """
    Raises:
        InvalidInput: not that message at all, or no place in a log.
    """
    message = pb.ForwardBackwardRequest()
    try:
        message.ParseFromString(body)
    except DecodeError as error:
        raise InvalidInput(f"the body is no ForwardBackwardRequest: {error}") from None
    run_id, seq_id = message.model_id, message.seq_id
    if not run_id or seq_id < 1:
        raise InvalidInput(f"model_id {run_id!r} and seq_id {seq_id} name no place in a run's log")
    try:
        budget = _Budget(max_bytes)
        data = [_read(f"datum {i}", _datum, datum, budget) for i, datum in enumerate(message.data)]
        return TrainingRequest(
            run_id,
            seq_id,
            message.loss_fn,
            _config(message),
            message.forward_only,
            data,
            [_spans(datum.model_input_spans) for datum in message.data],
            [_spans(datum.loss_fn_input_spans) for datum in message.data],
        )
    except InvalidInput as error:
        return TrainingRequest(run_id, seq_id, error=error)


class _Budget:
    """Bytes that the tensors of one request may take once filled in."""

    def __init__(self, left: int) -> None:
        self.left = left

    def take(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise InvalidInput("the request's tensors are larger than this server takes")


def _read(where: str, read: Any, *args: Any) -> Any:
    try:
        return read(*args)
    except InvalidInput as error:
        raise InvalidInput(f"{where}: {error}") from None


def _config(message: pb.ForwardBackwardRequest) -> dict[str, float | str]:
    if message.loss_fn_config_v2:
        return {
            key: value.text if value.WhichOneof("value") == "text" else value.number
            for key, value in message.loss_fn_config_v2.items()
        }
    return dict(message.loss_fn_config)


def _datum(message: pb.Datum, budget: _Budget) -> Datum:
    chunks = [_chunk(chunk) for chunk in message.model_input]
    tokens = np.concatenate(chunks) if chunks else np.zeros(0, np.int64)
    inputs = {
        name: _read(f"loss_fn_inputs[{name!r}]", read_tensor, tensor, budget)
        for name, tensor in message.loss_fn_inputs.items()
    }
    return Datum(tokens, inputs)  # type: ignore[arg-type]


def _chunk(chunk: pb.Chunk) -> np.ndarray:
    kind = chunk.WhichOneof("chunk")
    if kind != "encoded_text":
        raise InvalidInput(f"model_input holds a chunk of kind {kind!r}: only text is supported")
    return _from_bytes(chunk.encoded_text.tokens, np.dtype("<i4")).astype(np.int64)


def _from_bytes(data: bytes, dtype: np.dtype) -> np.ndarray:
    if len(data) % dtype.itemsize:
        raise InvalidInput(f"{len(data)} bytes are no whole number of {dtype.name}")
    return np.frombuffer(data, dtype)


def read_tensor(message: pb.Tensor, budget: _Budget) -> np.ndarray:
    """The dense array; unlisted entries of a sparse one are 0."""
    shape = tuple(message.shape)
    if len(shape) > 2 or any(not 0 <= size < 1 << 31 for size in shape):
        raise InvalidInput(f"shape {list(shape)} is not one of one or two dimensions")
    if message.dtype not in _DTYPES:
        raise InvalidInput(f"unknown dtype {message.dtype}")
    dtype = _DTYPES[message.dtype]
    if message.WhichOneof("encoding") == "sparse_csr":
        if len(shape) != 2:
            raise InvalidInput("a sparse tensor needs a shape of two dimensions")
        budget.take(math.prod(shape) * 8)
        csr = message.sparse_csr
        array = fill_csr(
            _from_bytes(csr.values, dtype),
            _from_bytes(csr.crow_indices, np.dtype("<i8")),
            _from_bytes(csr.col_indices, np.dtype("<i8")),
            shape,
            0,
        )
    else:
        array = _from_bytes(message.dense, dtype)
        if shape and math.prod(shape) != array.size:
            raise InvalidInput(f"{array.size} values do not fill shape {list(shape)}")
        budget.take(array.size * 8)
        array = array.reshape(shape) if shape else array
    if message.dtype == pb.DTYPE_BFLOAT16:
        array = (array.astype("<u4") << 16).view("<f4")
    return array


def fill_csr(
    values: np.ndarray, rows: np.ndarray, columns: np.ndarray, shape: tuple[int, ...], pad: int
) -> np.ndarray:
    """The dense array of compressed sparse rows; `rows` are the T + 1 row pointers."""
    height, width = shape
    if len(rows) != height + 1 or len(columns) != len(values):
        raise InvalidInput(
            f"sparse rows: {len(rows)} row pointers for {height} rows, {len(columns)} columns "
            f"for {len(values)} values"
        )
    if rows[0] != 0 or rows[-1] != len(values) or (rows[1:] < rows[:-1]).any():
        raise InvalidInput("sparse rows: the row pointers do not count up to the values")
    if len(columns) and (columns.min() < 0 or columns.max() >= width):
        raise InvalidInput(f"sparse rows: a column is outside [0, {width})")
    array = np.full(shape, pad, values.dtype)
    array[np.repeat(np.arange(height), np.diff(rows)), columns] = values
    return array


def _spans(messages: Iterable[pb.ProvenanceSpan]) -> list[Span]:
    spans = []
    for message in messages:
        kind = message.WhichOneof("span")
        if kind is None:
            raise InvalidInput("a provenance span names neither prompt nor sampled tokens")
        arm = getattr(message, kind)
        if arm.offset < 0 or arm.length < 0:
            raise InvalidInput("a provenance span has a negative offset or length")
        spans.append(Span(kind == "sampled_tokens", arm.sequence_id, arm.offset, arm.length))
    return spans


# ---- results ----


def write_training_output(output: ForwardBackwardOutput) -> bytes:
    message = pb.ForwardBackwardOutput(loss_fn_output_type="ArrayRecord")
    for name, value in output.metrics.items():
        message.metrics[name] = value

    def widths(datum: Mapping[str, np.ndarray]) -> list[Any]:
        return [(name, array.shape[1:], array.dtype.kind) for name, array in datum.items()]

    # A record's arrays have one width: soft targets may differ from datum to datum.
    for _, group in groupby(output.loss_fn_outputs, widths):
        datums = list(group)
        record = message.loss_fn_outputs.add(num_datums=len(datums))
        for name, first in datums[0].items():
            arrays = [datum[name] for datum in datums]
            ends = np.cumsum([0, *(array.nbytes for array in arrays)], dtype="<i8")
            tensor = record.fields[name]
            tensor.data = b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)
            tensor.offsets = ends.tobytes()
            tensor.dtype = _PROTO_DTYPES[first.dtype.kind]
            tensor.trailing_shape.extend(first.shape[1:])
    return message.SerializeToString()


def write_sample_response(
    response: SampleResponse, target_csr: tuple[np.ndarray, np.ndarray] | None = None
) -> bytes:
    """`target_csr`: row pointers and columns of the request's sparse `target_prompt_logprobs`,
    whose layout the answer takes."""
    message = pb.SampleResponse(prompt_cache_hit_tokens=response.prompt_cache_hit_tokens)
    for sequence in response.sequences:
        written = message.sequences.add(
            stop_reason=_STOP_REASONS[sequence.stop_reason],
            tokens=sequence.tokens.astype("<i4").tobytes(),
            logprobs=sequence.logprobs.astype("<f4").tobytes(),
        )
        if sequence.topk_logprobs is not None:
            _write_topk(written.topk_sampled_logprobs, sequence.topk_logprobs)
    if response.prompt_logprobs is not None:
        message.prompt_logprobs = response.prompt_logprobs.astype("<f4").tobytes()
    if response.topk_prompt_logprobs is not None:
        _write_topk(message.topk_prompt_logprobs, response.topk_prompt_logprobs)
    if response.target_prompt_logprobs is not None:
        _write_tensor(message.target_prompt_logprobs, response.target_prompt_logprobs, target_csr)
    if response.prompt_alt_tokens is not None:
        _write_tensor(message.prompt_alt_tokens.tokens, response.prompt_alt_tokens.tokens)
        _write_tensor(message.prompt_alt_tokens.logprobs, response.prompt_alt_tokens.logprobs)
    return message.SerializeToString()


def _write_topk(message: pb.TopkLogprobs, topk: TokenLogprobs) -> None:
    message.length, message.k = topk.tokens.shape
    message.token_ids = topk.tokens.astype("<i4").tobytes()
    logprobs = np.where(np.isnan(topk.logprobs), EMPTY_LOGPROB, topk.logprobs)
    message.logprobs = logprobs.astype("<f4").tobytes()


def _write_tensor(
    message: pb.Tensor, array: np.ndarray, csr: tuple[np.ndarray, np.ndarray] | None = None
) -> None:
    message.dtype = _PROTO_DTYPES[array.dtype.kind]
    message.shape.extend(array.shape)
    array = array.astype("<f4" if array.dtype.kind == "f" else "<i8")
    if csr is None:
        message.dense = array.tobytes()
        return
    rows, columns = csr
    listed = array[np.repeat(np.arange(len(rows) - 1), np.diff(rows)), columns]
    message.sparse_csr.values = listed.tobytes()
    message.sparse_csr.crow_indices = rows.astype("<i8").tobytes()
    message.sparse_csr.col_indices = columns.astype("<i8").tobytes()
