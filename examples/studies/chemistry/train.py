"""Chemistry: from a compound's systematic name to its molecular formula, by reinforcement learning.

Names come from a small grammar (or a file of yours), OPSIN reads them, RDKit counts the atoms, and
the reward is what these two say. Run it from the repository's root:

    python -m examples.studies.chemistry.train

The last line of stdout is one JSON object.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

import tinsmith
from tinsmith.algorithms.estimates import rate_interval
from tinsmith.cli.progress import RichWatcher
from tinsmith.cli.report import report

from . import dataset
from .warm_up import warm_up

ENV = "examples.studies.chemistry.name_to_formula:NameToFormula"
NAMES_PER_LEVEL = dict.fromkeys((1, 2, 3, 4), 2000)  # level 1 has no more than 490
console = Console()


@dataclass(frozen=True)
class Preset:
    """`levels`: of the names. `warm_up`: supervised steps before. The rest goes to the environment and to `TrainConfig`."""

    levels: tuple[int, ...]
    warm_up: int
    env_kwargs: dict[str, Any]
    training: dict[str, Any]


PRESETS = {
    # SmolLM2-135M on two cores: names of one or two features, the formula at once. (Of one feature
    # there are too few: 62 held-out names, and the others are soon known by heart.)
    "laptop": Preset(
        levels=(1, 2),
        warm_up=200,
        env_kwargs={"examples": 0},
        training=dict(
            steps=60,
            groups_per_step=8,
            group_size=8,
            learning_rate=2e-4,
            rank=16,
            max_tokens=16,
            max_staleness=1,
            train_unembed=False,
            eval_episodes=400,
        ),
    ),
    # Any model: does it all run?
    "smoke": Preset(
        levels=(1,),
        warm_up=1,
        env_kwargs={"examples": 1},
        training=dict(
            steps=1,
            groups_per_step=1,
            group_size=2,
            rank=4,
            max_tokens=8,
            max_replaced=0.0,
            eval_episodes=2,
        ),
    ),
    # A model of some billions of parameters on a GPU: longer names, and room to think.
    "gpu": Preset(
        levels=(1, 2, 3, 4),
        warm_up=0,
        env_kwargs={"examples": 4, "thinking": True},
        training=dict(
            steps=200,
            groups_per_step=32,
            group_size=16,
            learning_rate=1e-4,
            rank=32,
            max_tokens=1024,
            max_staleness=2,
            eval_episodes=500,
            eval_every=50,
            num_env_workers=4,
        ),
    ),
}


def main(
    model: Annotated[str, typer.Option(help="folder, name or Hugging Face id")] = (
        "HuggingFaceTB/SmolLM2-135M-Instruct"
    ),
    preset: Annotated[
        Literal["laptop", "gpu", "smoke"], typer.Option(help="sizes of everything")
    ] = ("laptop"),
    steps: Annotated[
        int | None, typer.Option(help="optimizer steps; default: the preset's")
    ] = None,
    warm_up_steps: Annotated[int | None, typer.Option(help="supervised steps before")] = None,
    eval_episodes: Annotated[int | None, typer.Option(help="default: the preset's")] = None,
    max_staleness: Annotated[int | None, typer.Option(help="0: strictly on-policy")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="default: the preset's")] = None,
    examples: Annotated[int | None, typer.Option(help="worked examples in the prompt")] = None,
    shaping: Annotated[float, typer.Option(help="largest reward of a wrong formula")] = 0.5,
    names: Annotated[Path | None, typer.Option(help="your own names, one a line")] = None,
    strict: Annotated[bool, typer.Option(help="refuse names that OPSIN cannot read")] = False,
    level: Annotated[list[int] | None, typer.Option(help="1 to 4; may be repeated")] = None,
    seed: int = 0,
    run_dir: Annotated[Path | None, typer.Option(help="default: runs/chemistry-<time>")] = None,
) -> None:
    chosen = PRESETS[preset]
    env_kwargs = chosen.env_kwargs | ({} if examples is None else {"examples": examples})
    flags = dict(
        steps=steps,
        eval_episodes=eval_episodes,
        max_staleness=max_staleness,
        learning_rate=learning_rate,
    )
    levels = tuple(level or chosen.levels) if names is None else (0,)
    try:
        folder, counts = prepare(names, strict)
        config = tinsmith.TrainConfig(
            model=model,
            env=ENV,
            env_kwargs={"data": str(folder), "levels": levels, "shaping": shaping, **env_kwargs},
            eval_env_kwargs={"split": "eval"},
            seed=seed,
            **chosen.training | {name: flag for name, flag in flags.items() if flag is not None},
        )
        run_folder = run_dir or Path(time.strftime("runs/chemistry-%Y%m%d-%H%M%S"))
        warm = chosen.warm_up if warm_up_steps is None else warm_up_steps
        summary = asyncio.run(run(config, run_folder, warm))
    except tinsmith.TinsmithError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    print(json.dumps(summary | {"names": vars(counts)}), flush=True)


def prepare(names: Path | None, strict: bool) -> tuple[Path, dataset.Counts]:
    """The folder of checked names, and what became of them."""
    console.print("checking the names with OPSIN and RDKit", highlight=False)
    rows = dataset.generated(NAMES_PER_LEVEL) if names is None else dataset.read_names(names)
    folder, counts = dataset.build(rows, tinsmith.default_home() / "chemistry", strict=strict)
    console.print(str(counts), highlight=False)
    if counts.refused:
        console.print(f"refused: {dataset.shortened(counts.refused)}", highlight=False)
    return folder, counts


async def run(config: tinsmith.TrainConfig, folder: Path, warm_up_steps: int) -> dict[str, Any]:
    home = tinsmith.default_home()
    await asyncio.to_thread(tinsmith.resolve_model, config.model, home, console.print)
    started = time.monotonic()
    warmed = None
    async with tinsmith.connect() as service:
        if warm_up_steps:
            path, losses = await warm_up(service, config, warm_up_steps)
            config = replace(config, start=path)
            warmed = {"steps": warm_up_steps, "seconds": round(time.monotonic() - started, 1)}
            console.print(
                f"supervised warm-up: loss {losses[0]:.2f} to {losses[-1]:.2f} nats per token "
                f"in {warm_up_steps} steps, {warmed['seconds']} s",
                highlight=False,
            )
        with RichWatcher(config, console) as watch:
            result = await tinsmith.train(service, config, run_dir=folder, watch=watch)
    summary = report(console, config, result, time.monotonic() - started)
    for moment in ("before", "after"):
        evaluation = getattr(result, moment)
        if evaluation is not None:
            summary[moment]["by_level"] = by_level(evaluation)
            console.print(f"{moment}, by level: {summary[moment]['by_level']}", highlight=False)
    return summary | {"warm_up": warmed, "model": config.model, "cpus": os.cpu_count()}


def by_level(evaluation: tinsmith.EvalResult) -> dict[str, dict[str, float]]:
    """Exact accuracy per level of the names, with Wilson's 95% interval."""
    right: dict[str, list[bool]] = defaultdict(list)
    for trajectory in evaluation.trajectories:
        right[str(trajectory.info["level"])].append(bool(trajectory.info["success"]))
    rows = {}
    for level, outcomes in sorted(right.items()):
        share = rate_interval(sum(outcomes), len(outcomes))
        rows[level] = {
            "rate": round(share.value, 3),
            "low": round(share.low, 3),
            "high": round(share.high, 3),
            "episodes": len(outcomes),
        }
    return rows


if __name__ == "__main__":
    typer.run(main)
