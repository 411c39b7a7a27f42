"""The learning curve of a run on a fixed set of examples, drawn from its `metrics.jsonl`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .plot import read_metrics

LOSSES = ("nll", "loss")


def is_fit(rows: list[dict[str, Any]]) -> bool:
    """Whether the rows are of such a run."""
    return any("learning_rate" in row for row in rows)


def plot_fit(run_dir: str | Path, out: str | Path) -> Path:
    """Draw the loss per step (supervised: per token, in nats), that on what is held out with its
    95% interval, and the learning rate.

    Raises:
        NotFound: the folder has no metrics.
    """
    from matplotlib.figure import Figure

    rows = read_metrics(run_dir)
    steps = [row for row in rows if "learning_rate" in row]
    evals = [row for row in rows if "eval" in row]
    name = next(name for name in LOSSES if name in steps[0])
    figure = Figure(figsize=(8, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    x = np.array([row["step"] for row in steps])
    above.plot(x, [row[name] for row in steps], color="tab:blue", label=f"{name} in training")
    if evals and name in evals[0]["eval"]:
        x_eval = [row["step"] for row in evals]
        means = np.array([row["eval"][name] for row in evals], float)
        above.plot(x_eval, means, "ks-", label=f"held-out {name}, 95% interval")
        bounds = [(row["eval"].get("low"), row["eval"].get("high")) for row in evals]
        if all(low is not None for low, _ in bounds):
            low, high = np.array(bounds, float).T
            above.errorbar(x_eval, means, [means - low, high - means], fmt="none", ecolor="k")
    above.legend(loc="best")
    above.set_title(Path(run_dir).name)
    below.plot(x, [row["learning_rate"] for row in steps], color="tab:gray")
    below.set_ylabel("learning rate")
    below.set_xlabel("optimizer step")
    figure.savefig(out, dpi=120)
    return Path(out)
