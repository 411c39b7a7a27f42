"""A small model learns to use a tool over several turns, by asynchronous off-policy RL.

The task (`tinsmith.envs.calculator`): add several numbers with a calculator that takes two at a
time, chaining its results, then answer. Rollouts and training run at the same time;
`--max-staleness 0` makes it strictly on-policy. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

import tinsmith
from tinsmith.algorithms.plot import plot_rewards
from tinsmith.cli.progress import RichWatcher

console = Console()


def main(
    model: Annotated[str, typer.Option(help="folder, name or Hugging Face id")] = (
        "HuggingFaceTB/SmolLM2-135M-Instruct"
    ),
    steps: int = 10,
    max_staleness: Annotated[int, typer.Option(help="0: strictly on-policy")] = 1,
    groups_per_step: int = 8,
    group_size: int = 8,
    learning_rate: float = 3e-4,
    rank: int = 16,
    eval_episodes: int = 200,
    seed: int = 0,
    run_dir: Annotated[str | None, typer.Option(help="default: runs/tool-use-<time>")] = None,
    resume: Annotated[str | None, typer.Option(help="a run folder to go on with")] = None,
) -> None:
    config = tinsmith.TrainConfig(
        model=model,
        env="calculator",
        eval_env_kwargs={"split": "eval"},
        steps=steps,
        max_staleness=max_staleness,
        groups_per_step=groups_per_step,
        group_size=group_size,
        learning_rate=learning_rate,
        rank=rank,
        train_unembed=False,
        max_tokens=16,
        eval_episodes=eval_episodes,
        checkpoint_every=5,
        seed=seed,
    )
    folder = Path(resume or run_dir or time.strftime("runs/tool-use-%Y%m%d-%H%M%S"))
    asyncio.run(run(config, folder, resume is not None))


async def run(config: tinsmith.TrainConfig, folder: Path, going_on: bool) -> None:
    console.print(f"model {config.model}: making it ready", highlight=False)
    home = tinsmith.default_home()
    await asyncio.to_thread(tinsmith.resolve_model, config.model, home, console.print)
    started = time.monotonic()
    async with tinsmith.connect() as service:
        with RichWatcher(config, console) as watch:
            if going_on:
                result = await tinsmith.resume(service, folder, steps=config.steps, watch=watch)
            else:
                result = await tinsmith.train(service, config, run_dir=folder, watch=watch)
    report(config, result, time.monotonic() - started)


def report(config: tinsmith.TrainConfig, result: tinsmith.TrainResult, seconds: float) -> None:
    before, after = result.before, result.after
    table = Table(title="held-out success")
    for column in ("", "rate", "95% interval", "episodes"):
        table.add_column(column)
    for name, evaluation in (("before", before), ("after", after)):
        if evaluation is not None:
            interval = f"{evaluation.low:.3f} to {evaluation.high:.3f}"
            table.add_row(name, f"{evaluation.rate:.3f}", interval, str(evaluation.episodes))
    console.print(table)
    for name, evaluation in (("before", before), ("after", after)):
        if evaluation is not None:
            show(f"an episode {name} training", evaluation.trajectories[0])
    plot_rewards(result.run_dir, result.run_dir / "reward.png")
    if result.stopped:
        console.print(f"stopped; go on with --resume {result.run_dir}", highlight=False)
    summary = {
        "task": config.env,
        "before": before and before.to_json(),
        "after": after and after.to_json(),
        "episodes": int(result.totals["episodes"]),
        "optim_steps": result.steps,
        "seconds": round(seconds, 1),
        "run_dir": str(result.run_dir),
    }
    print(json.dumps(summary), flush=True)


def show(title: str, trajectory: tinsmith.Trajectory) -> None:
    """The episode's own question and what followed (the worked examples before are left out)."""
    console.rule(f"{title}: reward {trajectory.reward:g}")
    questions = [
        i
        for i, message in enumerate(trajectory.messages)
        if message["role"] == "user" and message["content"].startswith("First")
    ]
    for message in trajectory.messages[questions[-1] :]:
        console.print(f"[bold]{message['role']:>9}[/bold]  ", end="")
        console.print(message["content"], markup=False, highlight=False)


if __name__ == "__main__":
    typer.run(main)
