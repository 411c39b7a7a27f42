"""What every benchmark shares: options, alternating runs, one JSON object at the end."""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import tinsmith
from tinsmith.engines.vllm_start import chosen_engine

DEMO_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def options(description: str | None) -> argparse.Namespace:
    """`--model` (resolved to a folder), `--runs`, `--quick`."""
    chosen = options_without_model(description)
    chosen.model = str(tinsmith.resolve_model(chosen.model, tinsmith.default_home(), say))
    return chosen


def options_without_model(description: str | None) -> argparse.Namespace:
    """The same, of a benchmark that loads no model: `--model` is left alone."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--model", default=DEMO_MODEL, help="folder, name or Hugging Face id")
    parser.add_argument("--runs", type=int, default=5, help="timed runs of each side")
    parser.add_argument("--quick", action="store_true", help="one small run: does it work at all?")
    chosen = parser.parse_args()
    if chosen.quick:
        chosen.runs = 1
    return chosen


def require_vllm() -> None:
    """End with one sentence where vLLM is not installed."""
    try:
        chosen_engine("vllm")
    except tinsmith.Unavailable as error:
        raise SystemExit(str(error)) from None


def with_environment(**wanted: str) -> None:
    """Start this script again with these variables set, if they are not: some are read by
    libraries as they load."""
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **wanted})


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def seconds(action: Callable[[], object]) -> float:
    gc.collect()
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def matrix_rate(device: str | torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of large matrix products: medians of several, of a square one and one of a small
    model's shape, whichever is faster."""
    rates = []
    for rows, inner, columns in ((1024, 1024, 1024), (512, 576, 1536)):
        a = torch.randn(rows, inner, device=device, dtype=dtype)
        b = torch.randn(columns, inner, device=device, dtype=dtype)
        times = [seconds(lambda a=a, b=b: (a @ b.T)[0, 0].item()) for _ in range(12)][2:]
        rates.append(2 * rows * inner * columns / statistics.median(times))
    return max(rates)


def alternate(
    ours: Callable[[], object], theirs: Callable[[], object], runs: int, rest: float = 0
) -> tuple[float, float]:
    """Median seconds of each side: one warm-up, then `runs` times one after the other, each after
    `rest` seconds in which what the side before left running comes to rest."""
    times: tuple[list[float], list[float]] = ([], [])
    for run in range(runs + 1):
        for side, action in enumerate((ours, theirs)):
            time.sleep(rest)
            taken = seconds(action)
            say(
                f"{'warm-up' if run == 0 else f'run {run}'}, {('ours', 'theirs')[side]}: {taken:.3f} s"
            )
            if run > 0:
                times[side].append(taken)
    return statistics.median(times[0]), statistics.median(times[1])


def report(
    unit: str, ours: float, theirs: float, ratio: float, runs: int, **details: object
) -> None:
    """The last line of stdout. `ratio` above 1 means that we are better."""
    name = Path(sys.argv[0]).stem
    result = {
        "name": name,
        "unit": unit,
        "ours": _rounded(ours),
        "theirs": _rounded(theirs),
        "ratio": _rounded(ratio),
        "runs": runs,
        "command": " ".join(["python", f"benchmarks/{name}.py", *sys.argv[1:]]),
        **details,
    }
    print(json.dumps(result), flush=True)


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
