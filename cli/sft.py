"""`tinsmith sft`: supervised fine-tuning on conversations or completions."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..algorithms.fit_config import SupervisedConfig
from ..primitives.errors import InvalidInput
from .config import chosen_config, with_config_flags
from .options import Address, AsJson, BaseWeights, Home, Layout, Resume, RunDir, print_json


@with_config_flags(SupervisedConfig, without=("data",))
def sft(
    home: Home,
    data: Annotated[
        str | None,
        typer.Argument(
            metavar="[DATA.JSONL]",
            help="Rows of messages, of ShareGPT's conversations, or of prompt and completion; or "
            "hf:NAME[:SPLIT], a data set of Hugging Face's.",
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="RUN.TOML", help="The run's config; flags override.")
    ] = None,
    run_dir: RunDir = None,
    resume: Resume = None,
    address: Address = None,
    base_weights: BaseWeights = "auto",
    layout: Layout = None,
    as_json: AsJson = False,
    **flags: Any,
) -> None:
    """Fine-tune a model on conversations, by its own chat template.

    Rows that cannot be used are left out and reported by their lines; --strict refuses them. With
    --json, progress goes to stderr and stdout ends with one JSON object. Ctrl-C ends the run with a
    checkpoint, from which --resume goes on.
    """
    if data is not None:
        # A run is resumed from anywhere.
        flags["data"] = str(Path(data).absolute()) if Path(data).exists() else data
    settings = chosen_config(SupervisedConfig, config, flags, run_dir, resume)
    if resume is None and not settings.data:
        raise InvalidInput("name a file of rows: tinsmith sft DATA.JSONL")
    console = Console(stderr=as_json)
    opened: dict[str, Any] = dict(
        address=address, home=home, base_weights=base_weights, layout=layout
    )
    summary = asyncio.run(_run(settings, run_dir, resume, opened, console))
    if as_json:
        print_json(summary)


async def _run(
    config: SupervisedConfig,
    run_dir: Path | None,
    resume: Path | None,
    opened: dict[str, Any],
    console: Console,
) -> dict[str, Any]:
    from ..actors.cluster import connect
    from ..algorithms.plot_fit import plot_fit
    from ..algorithms.supervised import resume_supervised, train_supervised
    from ..engines.models import resolve_model
    from .fit_progress import RichFitWatcher

    console.print(f"model {config.model}: making it ready", highlight=False)
    await asyncio.to_thread(resolve_model, config.model, opened["home"], console.print)
    started = time.monotonic()
    async with connect(**opened) as service:
        with RichFitWatcher(console) as watch:
            if resume is not None:
                result = await resume_supervised(
                    service, resume, steps=config.steps or None, watch=watch
                )
            else:
                result = await train_supervised(service, config, run_dir=run_dir, watch=watch)
    if result.steps:
        plot_fit(result.run_dir, result.run_dir / "loss.png")
    if result.stopped:
        console.print(f"stopped; go on with --resume {result.run_dir}", highlight=False)
    return {
        "run_id": result.run_id,
        "run_dir": str(result.run_dir),
        "checkpoint": result.checkpoint,
        "optim_steps": result.steps,
        "stopped": result.stopped,
        "before": result.before,
        "after": result.after,
        "data": {name: report.to_json() for name, report in result.reports.items()},
        "tokens": result.tokens,
        "seconds": round(time.monotonic() - started, 1),
    }
