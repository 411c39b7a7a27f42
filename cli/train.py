"""`tinsmith train`: the training loop, from a TOML file and flags."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..algorithms.config import TrainConfig
from ..envs.registry import find
from .config import chosen_config, with_config_flags
from .options import (
    Address,
    AsJson,
    BaseWeights,
    Engine,
    Home,
    Imports,
    Layout,
    Learners,
    ReorderSamplerWeights,
    Resume,
    RunDir,
    Samplers,
    import_environments,
    print_json,
)


@with_config_flags(TrainConfig)
def train(
    home: Home,
    file: Annotated[
        Path | None, typer.Argument(metavar="[RUN.TOML]", help="The run's config; flags override.")
    ] = None,
    run_dir: RunDir = None,
    resume: Resume = None,
    imports: Imports = None,
    address: Address = None,
    engine: Engine = "auto",
    learners: Learners = 1,
    layout: Layout = None,
    base_weights: BaseWeights = "auto",
    reorder_sampler_weights: ReorderSamplerWeights = False,
    samplers: Samplers = 1,
    as_json: AsJson = False,
    **flags: Any,
) -> None:
    """Train a policy in an environment, by asynchronous off-policy RL.

    With --json, progress goes to stderr and stdout ends with one JSON object. Ctrl-C ends the
    run with a checkpoint, from which --resume goes on.

    An environment is a bundled one, one that --import registers, gymnasium:ID or
    package.module:Class; modules in the current folder are found.
    """
    import_environments(imports)
    config = chosen_config(TrainConfig, file, flags, run_dir, resume)
    if ":" not in config.env:
        find(config.env)  # a wrong name is better told now than when the model is loaded
    console = Console(stderr=as_json)
    opened: dict[str, Any] = dict(
        address=address,
        home=home,
        engine=engine,
        base_weights=base_weights,
        reorder_sampler_weights=reorder_sampler_weights,
        learners=learners,
        layout=layout,
        samplers=samplers,
    )
    summary = asyncio.run(_run(config, run_dir, resume, opened, console))
    if as_json:
        print_json(summary)


async def _run(
    config: TrainConfig,
    run_dir: Path | None,
    resume: Path | None,
    opened: dict[str, Any],
    console: Console,
) -> dict[str, Any]:
    from ..actors.cluster import connect
    from ..algorithms import train as loop
    from ..engines.models import resolve_model
    from .progress import RichWatcher
    from .report import report

    console.print(f"model {config.model}: making it ready", highlight=False)
    await asyncio.to_thread(resolve_model, config.model, opened["home"], console.print)
    started = time.monotonic()
    async with connect(**opened) as service:
        with RichWatcher(config, console) as watch:
            if resume is not None:
                result = await loop.resume(service, resume, steps=config.steps, watch=watch)
            else:
                result = await loop.train(service, config, run_dir=run_dir, watch=watch)
    return report(console, config, result, time.monotonic() - started)
