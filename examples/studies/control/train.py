"""AI control over long contexts: a monitor learns to find a hidden side task in long transcripts.

By default the monitor is tiny and made on the spot (`tiny_monitor.py`), so that its whole context
of 4,096 tokens fits two cores; any other model is a `--model` away. Run it from the repository's
root:

    python -m examples.studies.control.train

The last line of stdout is one JSON object.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import typer
from matplotlib.figure import Figure
from rich.console import Console

import tinsmith
from tinsmith.algorithms.estimates import rate_interval
from tinsmith.cli.progress import RichWatcher
from tinsmith.cli.report import report

from .tiny_monitor import make_tiny_monitor

ENV = "examples.studies.control.transcripts:SideTask"
TINY = "tiny-monitor"
console = Console()


@dataclass(frozen=True)
class Preset:
    """`measured`, `trained`: lengths of the transcripts, in steps. `monitor_steps`: of the tiny
    monitor's own training."""

    measured: tuple[int, ...]
    trained: tuple[int, ...]
    training: dict[str, Any]
    monitor_steps: int = 500


PRESETS = {
    # Steps of 4 tokens, up to 4,021 of them.
    "laptop": Preset(
        measured=(16, 32, 64, 125, 250, 500, 1000),
        trained=(16, 32, 64, 125, 250, 500, 1000),
        training=dict(
            steps=60,
            groups_per_step=12,
            group_size=8,
            learning_rate=1e-3,
            rank=16,
            max_tokens=2,
            max_staleness=1,
            eval_episodes=560,
        ),
    ),
    # Does it all run?
    "smoke": Preset(
        measured=(4, 8),
        trained=(8,),
        training=dict(
            steps=1,
            groups_per_step=1,
            group_size=2,
            rank=4,
            max_tokens=2,
            max_replaced=0.0,
            eval_episodes=4,
        ),
        monitor_steps=2,
    ),
    # A model of some billions of parameters on a GPU: steps of about 8 tokens, up to 32,000.
    "gpu": Preset(
        measured=(125, 250, 500, 1000, 2000, 4000),
        trained=(125, 250, 500, 1000, 2000, 4000),
        training=dict(
            steps=200,
            groups_per_step=32,
            group_size=16,
            learning_rate=1e-4,
            rank=32,
            max_tokens=16,
            max_staleness=2,
            eval_episodes=600,
            num_env_workers=4,
        ),
    ),
}


def main(
    model: Annotated[
        str | None, typer.Option(help="folder, name or Hugging Face id; default: a tiny monitor")
    ] = None,
    preset: Annotated[
        Literal["laptop", "gpu", "smoke"], typer.Option(help="sizes of everything")
    ] = "laptop",
    steps: Annotated[int | None, typer.Option(help="default: the preset's")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="default: the preset's")] = None,
    eval_episodes: Annotated[int | None, typer.Option(help="default: the preset's")] = None,
    seed: int = 0,
    run_dir: Annotated[Path | None, typer.Option(help="default: runs/control-<time>")] = None,
) -> None:
    chosen = PRESETS[preset]
    flags = dict(steps=steps, learning_rate=learning_rate, eval_episodes=eval_episodes)
    if model is None:
        folder = tinsmith.default_home() / "models" / f"{TINY}-{chosen.monitor_steps}"
        model = make_tiny_monitor(folder, steps=chosen.monitor_steps, console=console)
    run_folder = run_dir or Path(time.strftime("runs/control-%Y%m%d-%H%M%S"))
    try:
        config = tinsmith.TrainConfig(
            model=model,
            env=ENV,
            env_kwargs={"lengths": chosen.trained},
            eval_env_kwargs={"lengths": chosen.measured},
            seed=seed,
            **chosen.training | {name: flag for name, flag in flags.items() if flag is not None},
        )
        summary = asyncio.run(run(config, run_folder))
    except tinsmith.TinsmithError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    print(json.dumps(summary), flush=True)


async def run(config: tinsmith.TrainConfig, folder: Path) -> dict[str, Any]:
    home = tinsmith.default_home()
    await asyncio.to_thread(tinsmith.resolve_model, config.model, home, console.print)
    started = time.monotonic()
    async with tinsmith.connect() as service:
        with RichWatcher(config, console) as watch:
            result = await tinsmith.train(service, config, run_dir=folder, watch=watch)
    summary = report(console, config, result, time.monotonic() - started)
    by_length = {}
    for moment in ("before", "after"):
        evaluation = getattr(result, moment)
        if evaluation is not None:
            by_length[moment] = accuracies(evaluation)
            for length, row in by_length[moment].items():
                console.print(
                    f"{moment}, {length} steps: {row['rate']:.3f} "
                    f"({row['low']:.3f} to {row['high']:.3f})",
                    highlight=False,
                )
    plot(by_length, folder / "accuracy.png")
    return summary | {"by_length": by_length, "model": config.model, "cpus": os.cpu_count()}


def accuracies(evaluation: tinsmith.EvalResult) -> dict[int, dict[str, float]]:
    """Accuracy per length of the transcripts, with Wilson's 95% interval."""
    right: dict[int, list[bool]] = defaultdict(list)
    for trajectory in evaluation.trajectories:
        right[trajectory.info["length"]].append(bool(trajectory.info["success"]))
    rows = {}
    for length, outcomes in sorted(right.items()):
        share = rate_interval(sum(outcomes), len(outcomes))
        rows[length] = {
            "rate": round(share.value, 3),
            "low": round(share.low, 3),
            "high": round(share.high, 3),
            "episodes": len(outcomes),
        }
    return rows


def plot(by_length: dict[str, dict[int, dict[str, float]]], path: Path) -> None:
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for moment, rows in by_length.items():
        rates, lows, highs = (
            np.array([row[key] for row in rows.values()]) for key in ("rate", "low", "high")
        )
        axes.errorbar(
            list(rows), rates, (rates - lows, highs - rates), marker="o", capsize=3, label=moment
        )
    axes.set(xscale="log", xlabel="steps of the transcript", ylabel="accuracy", ylim=(0, 1.02))
    axes.legend(loc="lower left")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    typer.run(main)
