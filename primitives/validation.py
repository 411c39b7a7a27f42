"""Checks at the door. Those of a batch of datums name the datum and the field."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .errors import InvalidInput
from .types import Datum


def check_ttl(ttl_seconds: int | None) -> int | None:
    """
    Raises:
        InvalidInput: it is neither None nor a positive integer.
    """
    good = isinstance(ttl_seconds, int) and not isinstance(ttl_seconds, bool) and ttl_seconds > 0
    if ttl_seconds is not None and not good:
        raise InvalidInput(f"ttl_seconds must be a positive integer or None, got {ttl_seconds!r}")
    return ttl_seconds


def validate_datums(
    datums: Sequence[Datum], inputs: Sequence[str], vocab_size: int, max_length: int
) -> None:
    """Check every datum against a loss that takes `inputs` besides `target_tokens`.

    Raises:
        InvalidInput: naming the datum's index and the field.
    """
    if len(datums) == 0:
        raise InvalidInput("the batch is empty: give at least one datum")
    for index, datum in enumerate(datums):
        _validate(f"datum {index}", datum, inputs, vocab_size, max_length)


def _validate(
    name: str, datum: Datum, inputs: Sequence[str], vocab_size: int, max_length: int
) -> None:
    length = datum.model_input.length
    if length == 0:
        raise InvalidInput(f"{name}: model_input is empty")
    if length > max_length:
        raise InvalidInput(
            f"{name}: model_input has {length} tokens, the model's context is {max_length}"
        )
    _check_tokens(f"{name}: model_input", datum.model_input.tokens, vocab_size)
    given = datum.loss_fn_inputs
    wanted = ("target_tokens", *inputs)
    for field in wanted:
        if field not in given:
            raise InvalidInput(f"{name}: loss_fn_inputs[{field!r}] is missing")
    for field, array in given.items():
        where = f"{name}: loss_fn_inputs[{field!r}]"
        if field not in wanted:
            raise InvalidInput(f"{where} is not an input of this loss ({', '.join(wanted)})")
        if array.shape != (length,):
            raise InvalidInput(
                f"{where} has shape {array.shape}, but model_input has {length} tokens"
            )
        if field == "target_tokens":
            if array.dtype.kind not in "iu":
                raise InvalidInput(f"{where} must be integers, got dtype {array.dtype}")
            _check_tokens(where, array, vocab_size)
        elif array.dtype.kind == "b":
            raise InvalidInput(f"{where} must be numbers, got dtype bool")
        elif not np.isfinite(array).all():
            position = int(np.flatnonzero(~np.isfinite(array))[0])
            raise InvalidInput(f"{where} is {array[position]} at position {position}")


def _check_tokens(where: str, tokens: np.ndarray, vocab_size: int) -> None:
    outside = (tokens < 0) | (tokens >= vocab_size)
    if outside.any():
        position = int(np.flatnonzero(outside)[0])
        raise InvalidInput(
            f"{where} holds token {tokens[position]} at position {position}, "
            f"outside the vocabulary of {vocab_size}"
        )
