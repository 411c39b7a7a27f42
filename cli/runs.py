"""`tinsmith runs`: what was trained, and what is kept of it."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ..actors.storage import Storage
from ..algorithms.run_folder import run_folder
from ..primitives.errors import InvalidInput
from ..primitives.types import Checkpoint, TrainingRun
from .lookup import find_run, has_registry, open_registry
from .options import AsJson, Home, print_json, print_table


def runs(
    home: Home,
    run: Annotated[
        str | None,
        typer.Argument(metavar="RUN", help="A run's id, or its folder: show its checkpoints."),
    ] = None,
    delete: Annotated[
        bool, typer.Option("--delete", help="Forget RUN and delete its checkpoints.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before deleting.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the runs, newest first; show one with its checkpoints; delete one."""
    if run is None:
        if delete:
            raise InvalidInput("--delete needs a run")
        _list(home, as_json)
    elif delete:
        _delete(run, home, yes, as_json)
    else:
        _show(run, home, as_json)


def _list(home: Path, as_json: bool) -> None:
    registry = open_registry(home) if has_registry(home) else None
    rows = []
    for run in registry.runs() if registry else []:
        count = len(registry.checkpoints(run.run_id)) if registry else 0
        rows.append(_facts(run, home) | {"checkpoints": count})
    if as_json:
        print_json(rows)
    elif not rows:
        typer.echo(f"no runs in {home} yet; `tinsmith train` starts one")
    else:
        columns = ["run", "model", "environment or data", "created", "checkpoints"]
        print_table(f"runs in {home}", columns, [_row(facts) for facts in rows])


def _row(facts: dict[str, Any]) -> list[str]:
    return [
        facts["run_id"],
        facts["base_model"],
        facts["user_metadata"].get("env") or facts["user_metadata"].get("data", ""),
        _when(facts["created"]),
        str(facts["checkpoints"]),
    ]


def _show(name: str, home: Path, as_json: bool) -> None:
    registry = open_registry(home)
    run = find_run(registry, name)
    facts, checkpoints = _facts(run, home), registry.checkpoints(run.run_id)
    crashes = registry.crashes(run.run_id)
    if as_json:
        found = {"checkpoints": [asdict(c) for c in checkpoints]}
        print_json(facts | found | {"crashes": [asdict(c) for c in crashes]})
        return
    for label, value in (
        ("run", run.run_id),
        ("model", f"{run.base_model}, LoRA of rank {run.lora.rank}"),
        ("created", _when(run.created)),
        ("folder", facts["run_dir"]),
    ):
        typer.echo(f"{label:>8}  {value}")
    columns = ["checkpoint", "version", "created", "size"]
    print_table("checkpoints", columns, [_checkpoint_row(c) for c in checkpoints])
    for crash in crashes:
        at = "; ".join(str(i) for i in crash.under_way if i.run == run.run_id)
        died = f"{crash.process} (pid {crash.pid}) died: {crash.reason}"
        typer.echo(f"{_when(crash.time)}  {died}; it was at {at}")


def _checkpoint_row(checkpoint: Checkpoint) -> list[str]:
    size = f"{checkpoint.size_bytes / 1e6:.1f} MB"
    return [checkpoint.path, str(checkpoint.version), _when(checkpoint.created), size]


def _delete(name: str, home: Path, yes: bool, as_json: bool) -> None:
    registry = open_registry(home)
    run = find_run(registry, name)
    count = len(registry.checkpoints(run.run_id))
    if not yes:
        typer.confirm(f"delete run {run.run_id} and its {count} checkpoints?", abort=True, err=True)
    Storage(home).delete(f"runs/{run.run_id}")
    registry.delete_run(run.run_id)
    if as_json:
        print_json({"deleted": run.run_id})
        return
    typer.echo(f"deleted run {run.run_id}")
    folder = run_folder(run, home)
    if folder.exists():
        typer.echo(f"its metrics and trajectories are still in {folder}")


def _facts(run: TrainingRun, home: Path) -> dict[str, Any]:
    return asdict(run) | {"run_dir": str(run_folder(run, home))}


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
