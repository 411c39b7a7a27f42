"""Products with a frozen matrix, by whatever is quickest at them.

A learner's are all by one library, whatever the number of rows (see `product_library`). It computes a row
the same whatever the other rows are, if those are a multiple of 4 or more than 11.

The few rows of a sampler's step are another matter: reading the matrix takes much of the time, and so does
bringing it into the order in which oneDNN computes.

oneDNN keeps the code that it makes for each shape, by default of a thousand: 0.4 MB each, and batches have
all sizes. Read when it is first used: with a tenth of that nothing is slower.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.nn.functional import linear

from .product_library import by_onednn, has_onednn, library

for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(name, "128")

STEP_ROWS = 192  # a step of more is like a learner's pass
FEW_ROWS = 4
REORDERED_FOR = 512  # rows; the order is as good for other numbers of them


def rows_times(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """`x W' + b`, `[T, O]`. No gradient goes through it."""
    if _float_on_cpu(x_TI, weight_OI) and library() == "onednn":
        return by_onednn(x_TI, weight_OI, bias_O)
    return linear(x_TI, weight_OI, bias_O)


def rows_times_transposed(dy_TO: Tensor, weight_OI: Tensor) -> Tensor:
    """`dy W`, `[T, I]`."""
    return rows_times(dy_TO, weight_OI.T)


def step_times(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """As `rows_times`, by what is quickest at this number of rows."""
    if not _float_on_cpu(x_TI, weight_OI) or not has_onednn() or many(len(x_TI)):
        return rows_times(x_TI, weight_OI, bias_O)
    if 0 < len(x_TI) <= FEW_ROWS:
        return _few_rows_times(x_TI, weight_OI, bias_O)
    return by_onednn(x_TI, weight_OI, bias_O)


def many(rows: int) -> bool:
    """Whether a step of so many rows is like a learner's pass."""
    return rows > STEP_ROWS and library() == "blas"


class Reordered:
    """A second copy of the weights of layers that are given the same rows one after the other, side by
    side and in the order in which oneDNN computes. Their products are one.

    Args:
        weights: `[O, I]` of each, float32 on a CPU.
        biases: `[O]` of each; empty if they have none.
    """

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> None:
        together = torch.cat([*weights]) if len(weights) > 1 else weights[0]
        self.weight = torch.ops.mkldnn._reorder_linear_weight(together, REORDERED_FOR)
        self.bias = torch.cat([*biases]) if biases else None
        edges = [0, *accumulate(len(weight) for weight in weights)]
        self.columns = [slice(*pair) for pair in pairwise(edges)]
        self._given: Tensor | None = None
        self._product: Tensor | None = None

    @staticmethod
    def possible(weight_OI: Tensor) -> bool:
        return _float_on_cpu(weight_OI, weight_OI) and has_onednn()

    def times(self, x: Tensor, layer: int) -> Tensor:
        """`x W' + b`, `[T, O]`, of one layer for rows `x` `[..., I]`; of all others too, which ask for
        it by giving the same tensor."""
        product = self._product
        if product is None or layer == 0 or x is not self._given:
            product = by_onednn(x.reshape(-1, x.shape[-1]), self.weight, self.bias)
        last = layer == len(self.columns) - 1
        self._given, self._product = (None, None) if last else (x, product)
        return product[:, self.columns[layer]]


def _few_rows_times(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """With the rows as the right factor, of which MKL likes 2 or 4."""
    rows = len(x_TI)
    wanted = 2 if rows <= 2 else FEW_ROWS
    filled = x_TI if rows == wanted else torch.cat((x_TI, x_TI[-1:].expand(wanted - rows, -1)))
    y_TO = (weight_OI @ filled.T).T[:rows].contiguous()
    return y_TO if bias_O is None else y_TO.add_(bias_O)


def _float_on_cpu(x: Tensor, weight: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
