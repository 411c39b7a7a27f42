"""Products by oneDNN against plain ones in double precision, and their rows one by one."""

from __future__ import annotations

import pytest
import torch

from tinsmith.engines.products import reorder, rows_times, rows_times_transposed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 17, 300])
@pytest.mark.parametrize("bias", [False, True])
def test_products_equal_plain_ones(rows, bias, dtype):
    """Relative to the largest, 1e-5 in float32."""
    rng = torch.Generator().manual_seed(rows)
    x, w, b = (torch.randn(*s, generator=rng).to(dtype) for s in ((rows, 96), (40, 96), (40,)))
    y = rows_times(x, w, b if bias else None)
    wanted = x.double() @ w.double().T + (b.double() if bias else 0)
    tolerance = (1e-5 if dtype == torch.float32 else 2e-2) * float(wanted.abs().max())
    torch.testing.assert_close(y.double(), wanted, rtol=0, atol=tolerance)
    again = rows_times(x, w, b if bias else None, reorder(w))
    torch.testing.assert_close(again.double(), wanted, rtol=0, atol=tolerance)
    back = rows_times_transposed(y, w)
    wanted = y.double() @ w.double()
    tolerance = (1e-5 if dtype == torch.float32 else 2e-2) * float(wanted.abs().max())
    torch.testing.assert_close(back.double(), wanted, rtol=0, atol=tolerance)


def test_a_row_is_the_same_in_any_company():
    rng = torch.Generator().manual_seed(0)
    for inputs, outputs in ((64, 64), (576, 192), (1536, 576)):
        w = torch.randn(outputs, inputs, generator=rng)
        for rows in (16, 33, 200):
            x = torch.randn(rows + 401, inputs, generator=rng)
            for start in (0, 1, 400):
                here = slice(start, start + rows)
                assert torch.equal(rows_times(x, w)[here], rows_times(x[here], w))
