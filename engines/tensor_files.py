"""Safetensors that others may have written."""

from __future__ import annotations

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from ..primitives.errors import InvalidInput


def read_tensors(data: bytes, what: str) -> dict[str, Tensor]:
    """The tensors in a file's bytes, by name.

    Raises:
        InvalidInput: it is damaged, or no such file; the message begins with `what`.
    """
    try:
        return safetensors.torch.load(data)
    except (SafetensorError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise InvalidInput(f"{what} is damaged: {type(error).__name__}: {error}") from error
