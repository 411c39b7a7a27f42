"""The learning curve of a run, drawn from its `metrics.jsonl`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ..primitives.errors import NotFound

SMOOTHING = 5


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """The rows of a run's `metrics.jsonl`; a last line cut short by a crash is left out.

    Raises:
        NotFound: the folder has none.
    """
    path = Path(run_dir) / "metrics.jsonl"
    if not path.exists():
        raise NotFound(f"there are no metrics in {run_dir} (no metrics.jsonl)")
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def plot_rewards(run_dir: str | Path, out: str | Path) -> Path:
    """Draw success and reward per step, evaluations with their 95% intervals, and staleness."""
    from matplotlib.figure import Figure

    rows = read_metrics(run_dir)
    steps = [row for row in rows if "reward" in row]
    evals = [row for row in rows if "eval" in row]
    figure = Figure(figsize=(8, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    x = np.array([row["step"] for row in steps])
    for name, color in (("success", "tab:blue"), ("reward", "tab:green")):
        y = np.array([row[name] for row in steps], float)
        above.plot(x, y, ".", color=color, alpha=0.35)
        above.plot(x, _smooth(y), color=color, label=f"{name} in training")
    if evals:
        rates = np.array([[row["eval"][k] for k in ("low", "rate", "high")] for row in evals])
        above.errorbar(
            [row["step"] for row in evals],
            rates[:, 1],
            [rates[:, 1] - rates[:, 0], rates[:, 2] - rates[:, 1]],
            fmt="ks",
            capsize=4,
            label="held-out success, 95% interval",
        )
    above.set_ylim(bottom=min(0.0, above.get_ylim()[0]))
    above.legend(loc="best")
    above.set_title(Path(run_dir).name)
    below.step(x, [row["staleness_mean"] for row in steps], where="mid", color="tab:red")
    below.set_ylabel("staleness")
    below.set_xlabel("optimizer step")
    figure.savefig(out, dpi=120)
    return Path(out)


def _smooth(y: np.ndarray) -> np.ndarray:
    """Mean of the last few steps."""
    return np.array([y[max(0, i - SMOOTHING + 1) : i + 1].mean() for i in range(len(y))])
