"""Products by either library against plain ones in double precision, and their rows one by one."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch

import tinsmith
from tinsmith.engines import product_library, products
from tinsmith.engines.product_library import kept_first, library
from tinsmith.engines.products import (
    STEP_ROWS,
    Reordered,
    rows_times,
    rows_times_transposed,
    step_times,
)


@pytest.fixture(params=["blas", "onednn"])
def chosen(request, monkeypatch):
    monkeypatch.setattr(products, "library", lambda: request.param)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(y: torch.Tensor, wanted: torch.Tensor) -> None:
    """Relative to the largest, 1e-5 in float32."""
    tolerance = (1e-5 if y.dtype == torch.float32 else 2e-2) * float(wanted.abs().max())
    torch.testing.assert_close(y.double(), wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 17, STEP_ROWS + 1])
@pytest.mark.parametrize("bias", [False, True])
def test_products_equal_plain_ones(rows, bias, dtype, chosen):
    x, w, b = (random(*s, seed=rows, dtype=dtype) for s in ((rows, 96), (40, 96), (40,)))
    wanted = x.double() @ w.double().T + (b.double() if bias else 0)
    if rows == 0:
        assert step_times(x, w, b if bias else None).shape == (0, 40)
        return
    y = rows_times(x, w, b if bias else None)
    assert_close(y, wanted)
    assert_close(step_times(x, w, b if bias else None), wanted)
    assert_close(rows_times_transposed(y, w), y.double() @ w.double())


@pytest.mark.parametrize("bias", [False, True])
def test_layers_that_share_rows_get_their_own_columns(bias):
    """In any order, and also if one is asked twice or with other rows in between."""
    weights = [random(outputs, 96, seed=outputs) for outputs in (40, 24, 8)]
    biases = [random(len(w), seed=1) for w in weights] if bias else []
    together = Reordered(weights, biases)
    x, other = random(1, 5, 96, seed=2), random(1, 3, 96, seed=3)
    for given, layer in [(x, 0), (x, 1), (x, 2), (x, 2), (other, 1), (x, 1), (x, 0), (other, 2)]:
        wanted = given[0].double() @ weights[layer].double().T
        if bias:
            wanted += biases[layer].double()
        assert_close(together.times(given, layer), wanted)
    given = x.clone()
    before = together.times(given, 0)
    assert torch.equal(before, Reordered(weights[:1], biases[:1]).times(x, 0))


def test_a_row_is_the_same_in_any_company(chosen):
    for inputs, outputs in ((64, 64), (576, 192), (1536, 576), (32, 576), (576, 32)):
        w = random(outputs, inputs)
        for rows in (4, 8, 16, 33, 200):
            x = random(rows + 401, inputs, seed=rows)
            for start in (0, 1, 400):
                here = slice(start, start + rows)
                assert torch.equal(rows_times(x, w)[here], rows_times(x[here], w))


CHOICE = "from tinsmith.engines.product_library import library; print(library())"


def test_what_is_quicker_is_measured_once_and_kept(tmp_path, monkeypatch):
    """The second process has what the first found, be it measured again or not."""
    monkeypatch.delenv("TINSMITH_PRODUCTS", raising=False)
    monkeypatch.setenv("TINSMITH_HOME", str(tmp_path))
    first = subprocess.check_output([sys.executable, "-c", CHOICE], text=True).strip()
    (file,) = (tmp_path / "products").iterdir()
    assert file.read_text().splitlines()[0] == first
    other = {"blas": "onednn", "onednn": "blas"}[first]
    file.write_text(f"{other}\n")
    assert subprocess.check_output([sys.executable, "-c", CHOICE], text=True).strip() == other


def test_the_first_of_several_processes_decides(tmp_path):
    """Of eight that make something else each, at once."""
    ready, path = threading.Barrier(8), tmp_path / "folder" / "file"

    def make(index: int) -> str:
        ready.wait()
        return f"{index}"

    texts: list[str] = []
    threads = [
        threading.Thread(target=lambda i=i: texts.append(kept_first(path, lambda: make(i))))
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(texts) == 8
    assert len(set(texts)) == 1
    assert [file.name for file in path.parent.iterdir()] == ["file"]


def test_a_home_that_cannot_be_written_to_is_no_hindrance(tmp_path):
    (tmp_path / "file").touch()
    assert kept_first(tmp_path / "file" / "below", lambda: "made") == "made"


def test_a_library_that_does_not_exist_is_refused(monkeypatch):
    monkeypatch.setenv("TINSMITH_PRODUCTS", "cublas")
    with pytest.raises(tinsmith.InvalidInput, match="blas or onednn"):
        library.__wrapped__()
    monkeypatch.setenv("TINSMITH_PRODUCTS", "onednn")
    assert product_library.library.__wrapped__() == "onednn"
