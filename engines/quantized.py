"""Frozen weights in 8 or 4 bits (QLoRA, Dettmers et al. 2023, https://arxiv.org/abs/2305.14314), by
bitsandbytes.

A weight is unpacked for every product, forward and backward, and multiplied in the dtype that the
model computes in; only the packed form stays. bitsandbytes' own layers would also round what comes
in: in int8 by outliers of the whole batch, in 4 bits to bfloat16 on some CPUs. Then a row's result
would depend on its neighbours, and learner and sampler would differ.

Dimension names: I and O a linear layer's inputs and outputs.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from ..primitives.errors import Unavailable
from .base_weights import INSTALL

BLOCK = 64  # weights that share a scale in nf4


class PackedWeight(Protocol):
    @property
    def nbytes(self) -> int: ...

    def dense(self) -> Tensor:
        """`[O, I]`, a new tensor in the dtype that the model computes in."""


def pack(weight_OI: Tensor, kind: str) -> PackedWeight:
    """Quantise a weight on its device, to be unpacked in its dtype.

    Args:
        kind: "int8" (a scale for every output) or "nf4" (for every 64 weights, itself in 8 bits).

    Raises:
        Unavailable: bitsandbytes is not installed.
    """
    library = _bitsandbytes()
    if kind == "int8":
        values_OI, scale_O, _ = library.int8_vectorwise_quant(weight_OI.to(torch.float16))
        return _Int8(values_OI, scale_O, weight_OI.dtype)
    # On a CPU bitsandbytes unpacks each row as if blocks began anew there (tried with 0.50.2), which
    # is wrong for rows of another length than whole blocks; so rows are made of one block each.
    whole = weight_OI.numel() % BLOCK == 0
    rows = weight_OI.reshape(-1, BLOCK) if whole else weight_OI.reshape(1, -1)
    packed, state = library.quantize_4bit(
        rows, blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
    )
    return _Nf4(packed, state, weight_OI.shape)


@dataclass(frozen=True, eq=False)
class _Int8:
    values_OI: Tensor
    scale_O: Tensor
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.values_OI.nbytes + self.scale_O.nbytes

    def dense(self) -> Tensor:
        return _bitsandbytes().int8_vectorwise_dequant(self.values_OI, self.scale_O).to(self.dtype)


@dataclass(frozen=True, eq=False)
class _Nf4:
    packed: Tensor
    state: Any  # bitsandbytes' `QuantState`
    shape: torch.Size

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.state.absmax.nbytes + self.state.state2.absmax.nbytes

    def dense(self) -> Tensor:
        return _bitsandbytes().dequantize_4bit(self.packed, self.state).view(self.shape)


@cache
def _bitsandbytes() -> Any:
    # As it loads, it warns of a kernel that we do not use.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise Unavailable(
            f"quantised base weights need bitsandbytes ({error}): {INSTALL}"
        ) from error
    return functional
