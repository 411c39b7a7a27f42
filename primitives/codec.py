"""msgpack for the vocabulary: dataclasses as maps, numpy arrays as an extension type."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec
import numpy as np

T = TypeVar("T")
_ARRAY = 1


def _encode(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        parts = (value.dtype.str, value.shape, np.ascontiguousarray(value).tobytes())
        return msgspec.msgpack.Ext(_ARRAY, msgspec.msgpack.encode(parts))
    if isinstance(value, np.generic):
        return value.item()
    raise NotImplementedError(f"cannot encode {type(value).__name__}")


def _extension(code: int, data: memoryview) -> Any:
    if code != _ARRAY:
        raise ValueError(f"unknown msgpack extension {code}")
    dtype, shape, raw = msgspec.msgpack.decode(data)
    return np.frombuffer(raw, dtype=np.dtype(dtype)).reshape(shape)


def _decode(kind: type, value: Any) -> Any:
    if kind is np.ndarray and isinstance(value, np.ndarray):
        return value
    raise NotImplementedError(f"cannot decode {kind}")


_encoder = msgspec.msgpack.Encoder(enc_hook=_encode)


def encode(value: Any) -> bytes:
    """msgpack bytes of a dataclass of `types.py` (or anything msgspec encodes)."""
    return _encoder.encode(value)


def decode(data: bytes, kind: type[T]) -> T:
    """The `kind` that `encode` was given. Arrays come back read-only, bit for bit.

    Raises:
        msgspec.ValidationError: the bytes hold something else.
    """
    return msgspec.msgpack.decode(data, type=kind, dec_hook=_decode, ext_hook=_extension)
