"""Checks at the door. Those of a batch of datums name the datum and the field."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .errors import InvalidInput
from .types import ROUTED_EXPERTS, Datum

MAX_TTL_S = 100 * 365 * 86400


def check_ttl(ttl_seconds: int | None) -> int | None:
    """
    Raises:
        InvalidInput: it is neither None nor a positive integer of at most a hundred years.
    """
    good = isinstance(ttl_seconds, int) and not isinstance(ttl_seconds, bool)
    if ttl_seconds is not None and not (good and 0 < ttl_seconds <= MAX_TTL_S):
        raise InvalidInput(
            "ttl_seconds must be a positive integer of at most a hundred years, or None; "
            f"got {ttl_seconds!r}"
        )
    return ttl_seconds


def validate_datums(
    datums: Sequence[Datum],
    inputs: Sequence[str],
    vocab_size: int,
    max_length: int,
    *,
    optional: Sequence[str] = (),
    multi_target: bool = False,
    routed: tuple[int, int, int] | None = None,
) -> None:
    """Check every datum against a loss that takes `inputs` besides `target_tokens`, and `optional`
    ones if given. With `multi_target`, `target_tokens` may be `[T, K]` as well as `[T]`; all other
    inputs have its shape, but `routed_experts`. `routed`: how many layers with routers, experts of each,
    and experts of a token the model has; None: it has none.

    Raises:
        InvalidInput: naming the datum's index and the field.
    """
    if len(datums) == 0:
        raise InvalidInput("the batch is empty: give at least one datum")
    wanted = ("target_tokens", *inputs)
    for index, datum in enumerate(datums):
        name = f"datum {index}"
        _check_model_input(name, datum, vocab_size, max_length)
        _check_fields(name, datum, wanted, optional)
        _check_targets(name, datum, multi_target)
        for field, array in datum.loss_fn_inputs.items():
            if field == ROUTED_EXPERTS:
                _check_routed(f"{name}: {ROUTED_EXPERTS}", array, datum.model_input.length, routed)
                continue
            _check_values(f"{name}: loss_fn_inputs[{field!r}]", field, array, vocab_size)


def _check_model_input(name: str, datum: Datum, vocab_size: int, max_length: int) -> None:
    length = datum.model_input.length
    if length == 0:
        raise InvalidInput(f"{name}: model_input is empty")
    if length > max_length:
        raise InvalidInput(
            f"{name}: model_input has {length} tokens, the model's context is {max_length}"
        )
    _check_tokens(f"{name}: model_input", datum.model_input.tokens, vocab_size)


def _check_fields(name: str, datum: Datum, wanted: Sequence[str], optional: Sequence[str]) -> None:
    for field in wanted:
        if field not in datum.loss_fn_inputs:
            raise InvalidInput(f"{name}: loss_fn_inputs[{field!r}] is missing")
    for field in datum.loss_fn_inputs:
        if field not in (*wanted, *optional, ROUTED_EXPERTS):
            known = ", ".join([*wanted, *(f"{o} if you like" for o in optional)])
            raise InvalidInput(
                f"{name}: loss_fn_inputs[{field!r}] is not an input of this loss ({known})"
            )


def _check_targets(name: str, datum: Datum, multi_target: bool) -> None:
    """The shape of `target_tokens`, and that all other inputs have it."""
    length, shape = datum.model_input.length, datum.loss_fn_inputs["target_tokens"].shape
    where = f"{name}: loss_fn_inputs['target_tokens']"
    if len(shape) == 2 and not multi_target:
        raise InvalidInput(
            f"{where} has shape {shape}: this loss takes one target per position, "
            f"shape {(length,)}; cross_entropy takes several"
        )
    if len(shape) not in (1, 2) or shape[0] != length:
        raise InvalidInput(f"{where} has shape {shape}, but model_input has {length} tokens")
    if shape[-1] == 0:
        raise InvalidInput(f"{where} has shape {shape}: give at least one target per position")
    for field, array in datum.loss_fn_inputs.items():
        if array.shape != shape and field != ROUTED_EXPERTS:
            raise InvalidInput(
                f"{name}: loss_fn_inputs[{field!r}] has shape {array.shape}, target_tokens {shape}"
            )


def _check_values(where: str, field: str, array: np.ndarray, vocab_size: int) -> None:
    if field == "target_tokens":
        if array.dtype.kind not in "iu":
            raise InvalidInput(f"{where} must be integers, got dtype {array.dtype}")
        _check_tokens(where, array, vocab_size)
    elif array.dtype.kind == "b":
        raise InvalidInput(f"{where} must be numbers, got dtype bool")
    elif not np.isfinite(array).all():
        position = _first(~np.isfinite(array))
        raise InvalidInput(f"{where} is {array[position]} at position {_text(position)}")


def _check_routed(
    where: str, array: np.ndarray, length: int, routed: tuple[int, int, int] | None
) -> None:
    if routed is None:
        raise InvalidInput(f"{where} is there, but the model has no routed experts: leave it out")
    layers, experts, k = routed
    if array.shape != (length, layers, k):
        raise InvalidInput(
            f"{where} has shape {array.shape}, expected {(length, layers, k)}: of each token of "
            f"model_input, in each layer with a router, {k} experts"
        )
    if array.dtype.kind not in "iu":
        raise InvalidInput(f"{where} must be integers, got dtype {array.dtype}")
    outside = (array < -1) | (array >= experts)
    if outside.any():
        position = _first(outside)
        raise InvalidInput(
            f"{where} is {array[position]} at position {_text(position)}: experts are 0 to {experts - 1}"
        )
    ascending = np.sort(array, -1)
    repeated = (ascending[..., 1:] == ascending[..., :-1]) & (ascending[..., 1:] >= 0)
    mixed = (array < 0).any(-1) & (array >= 0).any(-1)
    bad = repeated.any(-1) | mixed
    if bad.any():
        position = _first(bad)
        raise InvalidInput(
            f"{where} is {array[position].tolist()} at position {_text(position)}: give {k} different "
            "experts, or only -1"
        )


def _check_tokens(where: str, tokens: np.ndarray, vocab_size: int) -> None:
    outside = (tokens < 0) | (tokens >= vocab_size)
    if outside.any():
        position = _first(outside)
        raise InvalidInput(
            f"{where} holds token {tokens[position]} at position {_text(position)}, "
            f"outside the vocabulary of {vocab_size}"
        )


def _first(mask: np.ndarray) -> tuple[int, ...]:
    return tuple(np.argwhere(mask)[0].tolist())


def _text(position: tuple[int, ...]) -> str:
    return str(position[0] if len(position) == 1 else list(position))
