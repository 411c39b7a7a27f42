"""Products with a frozen matrix, by whatever is quickest at them.

On a CPU in float32 that is oneDNN, which takes the matrix as it lies in memory. Measured on two cores of
an AMD EPYC, 2,048 rows of SmolLM2-135M's layers: 200 to 218 GFLOP/s, where MKL, which torch's own
`linear` uses, has 127 to 195. It computes a row the same whatever the other rows are, if there are at
least two.

oneDNN keeps the code that it makes for each shape, by default of a thousand: 0.4 MB each, and batches have
all sizes. Read when it is first used: with a tenth of that nothing is slower.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch.nn.functional import linear

for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(name, "128")

FEW_ROWS = 2
REORDERED_FOR = 512  # rows; the order is as good for other numbers of them


def rows_times(
    x_TI: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None = None,
    reordered: Tensor | None = None,
) -> Tensor:
    """`x W' + b`, `[T, O]`. No gradient goes through it.

    Args:
        reordered: what `reorder` made of the weight.
    """
    if not _by_onednn(x_TI, weight_OI):
        return linear(x_TI, weight_OI, bias_O)
    if 0 < len(x_TI) <= FEW_ROWS:
        return _few_rows_times(x_TI, weight_OI, bias_O)
    weight = weight_OI if reordered is None else reordered
    return torch.ops.mkldnn._linear_pointwise(x_TI, weight, bias_O, "none", [], "")


def reorder(weight_OI: Tensor) -> Tensor | None:
    """A copy of the weight in the order in which oneDNN computes, to spare it doing this for every
    product; None where products are not oneDNN's."""
    if not _by_onednn(weight_OI, weight_OI):
        return None
    return torch.ops.mkldnn._reorder_linear_weight(weight_OI, REORDERED_FOR)


def rows_times_transposed(dy_TO: Tensor, weight_OI: Tensor) -> Tensor:
    """`dy W`, `[T, I]`."""
    return rows_times(dy_TO, weight_OI.T)


def _few_rows_times(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    both = x_TI if len(x_TI) == FEW_ROWS else torch.cat((x_TI, x_TI))
    y_TO = (weight_OI @ both.T).T[: len(x_TI)].contiguous()
    return y_TO if bias_O is None else y_TO.add_(bias_O)


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )
