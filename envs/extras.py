"""Libraries that only some environments need, imported when one of them is asked for."""

from __future__ import annotations

import importlib
from types import ModuleType

from ..primitives.errors import NotFound


def extra(module: str, wanted_by: str) -> ModuleType:
    """The module of an optional library.

    Raises:
        NotFound: it is not installed; says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise  # something that the library itself misses
        raise NotFound(
            f"{wanted_by} needs the library {package!r}, which is not installed: "
            'pip install "tinsmith[envs]"'
        ) from None
