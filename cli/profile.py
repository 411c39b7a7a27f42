"""`tinsmith profile`: where the time of a training step goes."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .options import AsJson, Home, print_json, print_table


def profile(
    home: Home,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, name or hub id.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Where the Chrome/Perfetto trace is written.")
    ] = Path("trace.json"),
    runs: Annotated[int, typer.Option(min=1, help="Training runs at once.")] = 1,
    sequences: Annotated[int, typer.Option(min=1, help="Sequences of each run.")] = 8,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each sequence.")] = 128,
    rank: Annotated[int, typer.Option(min=1, help="Of the adapters.")] = 32,
    as_json: AsJson = False,
) -> None:
    """Run one training step on random tokens and write its trace; show the stages' times."""
    import torch

    from ..actors.threads import engine_device, set_engine_threads
    from ..engines.backbone import Backbone
    from ..engines.learner import LearnerEngine
    from ..engines.models import resolve_model
    from ..engines.profiling import profile_step, random_batches

    with Console(stderr=True).status("loading the model") as status:
        path = resolve_model(model, home, status.update)
        set_engine_threads(None)
        engine = LearnerEngine(Backbone(path, device=engine_device()))
        batches = random_batches(engine, runs, sequences, tokens, rank)
        status.update("running two steps, the second under torch's profiler")
        taken = profile_step(engine, batches, out)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    if as_json:
        print_json({**asdict(taken), "device": device, "trace": str(out)})
        return
    rows = [[stage, f"{seconds:.3f} s"] for stage, seconds in taken.seconds.items()]
    print_table(f"{taken.tokens} tokens of {runs} runs on {device}", ["", ""], rows)
    rows = [[name, f"{seconds:.3f} s"] for name, seconds in taken.operators.items()]
    print_table("the dearest operators, their own time", ["", ""], rows)
    typer.echo(f"{out}: open it in ui.perfetto.dev or chrome://tracing", err=True)
