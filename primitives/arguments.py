"""Checks of single arguments, where they come in."""

from __future__ import annotations

from typing import Any

import numpy as np

from .errors import InvalidInput


def check_integer(name: str, value: Any) -> None:
    """
    Raises:
        InvalidInput: it is none.
    """
    if not isinstance(value, int | np.integer) or isinstance(value, bool):
        raise InvalidInput(f"{name} must be an integer, got {value!r}")


def check_number(name: str, value: Any) -> None:
    """
    Raises:
        InvalidInput: it is none, or so large that no float holds it. (inf and NaN are numbers.)
    """
    if not isinstance(value, int | float | np.integer | np.floating) or isinstance(value, bool):
        raise InvalidInput(f"{name} must be a number, got {value!r}")
    try:
        float(value)
    except OverflowError:
        raise InvalidInput(f"{name} is too large: {value!r}") from None


def check_flag(name: str, value: Any) -> None:
    """
    Raises:
        InvalidInput: it is neither True nor False.
    """
    if not isinstance(value, bool | np.bool_):
        raise InvalidInput(f"{name} must be True or False, got {value!r}")


def check_text(name: str, value: Any) -> None:
    """
    Raises:
        InvalidInput: it is none, or holds what no file's name can.
    """
    if not isinstance(value, str):
        raise InvalidInput(f"{name} must be a string, got {value!r}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidInput(f"{name} must be valid Unicode: {error}") from None
    if "\0" in value:
        raise InvalidInput(f"{name} holds a null character: {value!r}")
