"""What the frozen base weights are kept in. Adapters, gradients and Adam are float32 in any case."""

from __future__ import annotations

import importlib.util
from typing import Literal, get_args

from ..primitives.errors import InvalidInput, Unavailable

BaseWeights = Literal["auto", "fp32", "bf16", "int8", "nf4"]
"""`auto`: on a GPU bf16 for a model stored in it, else fp32. `int8` and `nf4` quantise the decoder's
linear layers; what is left, and what they compute in, is as `auto` has it."""

QUANTIZED = ("int8", "nf4")
INSTALL = "pip install 'tinsmith[quantized]'"


def check_base_weights(name: str) -> None:
    """
    Raises:
        InvalidInput: there is no such setting.
        Unavailable: quantised weights are asked for, and the library for them is not installed.
    """
    if name not in get_args(BaseWeights):
        raise InvalidInput(
            f"base_weights must be one of {', '.join(get_args(BaseWeights))}, got {name!r}"
        )
    if name in QUANTIZED and importlib.util.find_spec("bitsandbytes") is None:
        raise Unavailable(
            f"base_weights={name!r} needs bitsandbytes (it runs on CPUs and on CUDA GPUs), which is "
            f"not installed: {INSTALL}"
        )


def resolved(name: BaseWeights, stored: str, device: str) -> tuple[BaseWeights, BaseWeights]:
    """What the weights are kept in, and what is computed in (fp32 or bf16), for a model stored in
    `stored` (a name as safetensors gives it) on that kind of device."""
    full: BaseWeights = "bf16" if device == "cuda" and stored == "BF16" else "fp32"
    if name == "auto":
        return full, full
    return name, full if name in QUANTIZED else name
