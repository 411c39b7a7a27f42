"""`tinsmith train`: the training loop, from a TOML file and flags."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..algorithms.config import TrainConfig
from ..algorithms.run_folder import load_run
from ..envs.registry import find
from ..primitives.errors import InvalidInput
from .config import load_config, with_config_flags
from .options import Address, AsJson, Home, Imports, import_environments, print_json


@with_config_flags(TrainConfig)
def train(
    home: Home,
    file: Annotated[
        Path | None, typer.Argument(metavar="[RUN.TOML]", help="The run's config; flags override.")
    ] = None,
    run_dir: Annotated[
        Path | None,
        typer.Option(show_default="runs/<run id> at home", help="Folder for the run's files."),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="A run folder to go on with; --steps sets another end.")
    ] = None,
    imports: Imports = None,
    address: Address = None,
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
    given = {name: value for name, value in flags.items() if value is not None}
    if resume is None:
        config = load_config(file, given, TrainConfig)
    else:
        if file is not None or run_dir is not None or given.keys() - {"steps"}:
            raise InvalidInput(
                "--resume goes on with the run's own config: of it, give only --steps"
            )
        config = replace(load_run(resume)[1], **given)
    if ":" not in config.env:
        find(config.env)  # a wrong name is better told now than when the model is loaded
    console = Console(stderr=as_json)
    summary = asyncio.run(_run(config, run_dir, resume, home, address, console))
    if as_json:
        print_json(summary)


async def _run(
    config: TrainConfig,
    run_dir: Path | None,
    resume: Path | None,
    home: Path,
    address: str | None,
    console: Console,
) -> dict[str, Any]:
    from ..actors.cluster import connect
    from ..algorithms import train as loop
    from ..engines.models import resolve_model
    from .progress import RichWatcher
    from .report import report

    console.print(f"model {config.model}: making it ready", highlight=False)
    await asyncio.to_thread(resolve_model, config.model, home, console.print)
    started = time.monotonic()
    async with connect(address, home=home) as service:
        with RichWatcher(config, console) as watch:
            if resume is not None:
                result = await loop.resume(service, resume, steps=config.steps, watch=watch)
            else:
                result = await loop.train(service, config, run_dir=run_dir, watch=watch)
    return report(console, config, result, time.monotonic() - started)
