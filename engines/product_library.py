"""Which of the two libraries for float32 products on a CPU that come with torch a learner uses: oneDNN, or
the one that torch's own `linear` uses (MKL on x86).

The quicker one differs between processors of one instruction set: of two AMD EPYC, one computed 200 to
218 GFLOP/s with oneDNN and 127 to 195 with MKL, the other 145 to 156 and 178 to 182 (two cores, 2,048 rows
of SmolLM2-135M's layers). So it is measured, once for a processor, and kept: results differ in their last
bits, and a learner that is started again must compute what the one before it did.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, cast, get_args

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..primitives.errors import InvalidInput
from ..primitives.paths import default_home

Library = Literal["blas", "onednn"]
CHOICE = "TINSMITH_PRODUCTS"

TRIAL = (1024, 576, 1536)  # rows, inputs, outputs
TRIALS, GAIN = 9, 1.03  # oneDNN must be quicker by this factor


def by_onednn(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """`x W' + b`."""
    return torch.ops.mkldnn._linear_pointwise(x_TI, weight_OI, bias_O, "none", [], "")


def has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@functools.cache
def library() -> Library:
    """The quicker one at a learner's products on this processor: `$TINSMITH_PRODUCTS`, else what was
    measured when a process of this `TINSMITH_HOME` first asked.

    Raises:
        InvalidInput: the variable names none.
    """
    chosen = os.environ.get(CHOICE)
    if chosen in get_args(Library):
        return cast(Library, chosen)
    if chosen:
        raise InvalidInput(f"{CHOICE}={chosen!r}: it can be blas or onednn")
    if not has_onednn():
        return "blas"
    about = f"{processor()}, torch {torch.__version__}"
    name = hashlib.blake2b(about.encode(), digest_size=6).hexdigest()
    kept = kept_first(default_home() / "products" / name, lambda: f"{_quicker()}\n{about}\n")
    return "onednn" if kept.startswith("onednn") else "blas"


def kept_first(path: Path, make: Callable[[], str]) -> str:
    """The file's text; if there is none, what is made, or what another process kept meanwhile."""
    if path.exists():
        return path.read_text()
    made = make()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent) as file:
            file.write(made)
            file.flush()
            os.link(file.name, path)
    except OSError:  # it is there by now, or nothing can be kept there
        return path.read_text() if path.is_file() else made
    return made


@torch.inference_mode()
def _quicker() -> Library:
    rows, inputs, outputs = TRIAL
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
    blas: list[float] = []
    onednn: list[float] = []
    for _ in range(TRIALS):
        for times, taken in ((linear, blas), (by_onednn, onednn)):
            started = time.perf_counter()
            times(x, weight)
            taken.append(time.perf_counter() - started)
    return "onednn" if min(onednn) * GAIN < min(blas) else "blas"


def processor() -> str:
    """Its name and, as that may be a family's, its numbers."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    fields = dict(re.findall(r"(?m)^([\w ]+?)\s*:\s*(.+)$", info.read_text().split("\n\n")[0]))
    numbers = [
        f"{key} {fields[key]}" for key in ("cpu family", "model", "stepping") if key in fields
    ]
    return f"{fields.get('model name', platform.machine())} ({', '.join(numbers)})"
