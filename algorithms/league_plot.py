"""Pictures of a league: who beats whom, and how strong each one is."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .cross_play import CrossPlay
from .ratings import Ratings


def plot_cross_play(
    cross: CrossPlay,
    out: str | Path,
    *,
    title: str = "",
    row_role: str = "moves first",
    column_role: str = "moves second",
    measure: str = "score of the row",
) -> Path:
    """A heat map of the matrix, each cell with its score and half the width of its 95% interval."""
    from matplotlib.figure import Figure

    height, width = cross.score.shape
    figure = Figure(figsize=(2.6 + 0.85 * width, 1.8 + 0.6 * height), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(cross.score, vmin=0, vmax=1, cmap="RdBu", aspect="auto")
    for r, c in np.argwhere(cross.games):
        score, margin = cross.score[r, c], (cross.high[r, c] - cross.low[r, c]) / 2
        color = "white" if abs(score - 0.5) > 0.3 else "black"
        label = f"{score:.2f}\n±{margin:.2f}"
        axes.text(c, r, label, ha="center", va="center", color=color, fontsize=8)
    axes.set_xticks(range(width), cross.columns, rotation=35, ha="right")
    axes.set_yticks(range(height), cross.rows)
    axes.set_xlabel(column_role)
    axes.set_ylabel(row_role)
    axes.set_title(title)
    figure.colorbar(image, label=measure)
    figure.savefig(out, dpi=120)
    return Path(out)


def plot_ladder(ratings: Ratings, out: str | Path, *, title: str = "") -> Path:
    """Elo of every player with its 95% interval, the strongest on top."""
    from matplotlib.figure import Figure

    ranked = sorted(ratings.players.items(), key=lambda player: player[1].elo)
    elo = np.array([rating.elo for _, rating in ranked])
    low = np.array([rating.low for _, rating in ranked])
    high = np.array([rating.high for _, rating in ranked])
    figure = Figure(figsize=(7, 1.4 + 0.35 * len(ranked)), layout="constrained")
    axes = figure.subplots()
    axes.errorbar(elo, range(len(ranked)), xerr=[elo - low, high - elo], fmt="ko", capsize=4)
    axes.set_yticks(range(len(ranked)), [name for name, _ in ranked])
    axes.set_ylim(-0.6, len(ranked) - 0.4)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("Elo, 95% interval")
    axes.set_title(title)
    figure.savefig(out, dpi=120)
    return Path(out)
