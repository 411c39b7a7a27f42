"""`python -m tinsmith.chaos --model FOLDER --seed 0 --faults 1000 --report report.md`"""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..engines.models import resolve_model
from ..primitives.paths import default_home
from .campaign import Broken, Campaign
from .report import report


def main(
    model: Annotated[str, typer.Option(help="Base model: folder, name or hub id; a tiny one.")],
    seed: Annotated[int, typer.Option(help="Of the scripts and of the faults.")] = 0,
    faults: Annotated[int, typer.Option(min=1, help="How many.")] = 1000,
    report_to: Annotated[
        Path | None, typer.Option("--report", help="Write the report to this file too.")
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Show what the service's processes say.")
    ] = False,
) -> None:
    """Train and sample as four tenants among faults, and compare with the same undisturbed."""
    console = Console(stderr=True)

    def say(text: str) -> None:
        console.print(f"chaos: {text}", highlight=False, soft_wrap=True)

    folder = str(resolve_model(model, default_home(), say))
    with tempfile.TemporaryDirectory(prefix="chaos-") as home:
        campaign = Campaign(folder, Path(home), seed, faults, say, verbose)
        try:
            outcome = asyncio.run(campaign.run())
        except Broken as broken:
            say(str(broken))
            raise typer.Exit(1) from broken
    command = f"python -m tinsmith.chaos --seed {seed} --faults {faults}"
    told = report(campaign, outcome, command)
    typer.echo(told)
    if report_to is not None:
        report_to.write_text(told)


typer.run(main)
