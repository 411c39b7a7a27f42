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

import tinsmith
from tinsmith.cli.progress import RichWatcher
from tinsmith.cli.report import report
from tinsmith.engines.vllm_start import EngineName

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
    engine: Annotated[EngineName, typer.Option(help="what samples")] = "auto",
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
    asyncio.run(run(config, folder, resume is not None, engine))


async def run(
    config: tinsmith.TrainConfig, folder: Path, going_on: bool, engine: EngineName
) -> None:
    console.print(f"model {config.model}: making it ready", highlight=False)
    home = tinsmith.default_home()
    await asyncio.to_thread(tinsmith.resolve_model, config.model, home, console.print)
    started = time.monotonic()
    async with tinsmith.connect(engine=engine) as service:
        with RichWatcher(config, console) as watch:
            if going_on:
                result = await tinsmith.resume(service, folder, steps=config.steps, watch=watch)
            else:
                result = await tinsmith.train(service, config, run_dir=folder, watch=watch)
    summary = report(console, config, result, time.monotonic() - started)
    print(json.dumps(summary), flush=True)


if __name__ == "__main__":
    typer.run(main)
