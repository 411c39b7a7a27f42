"""The runs of a home, found without starting anything."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from ..actors.registry import Registry
from ..algorithms.run_folder import run_id_of
from ..primitives.errors import NotFound
from ..primitives.paths import SCHEME, CheckpointPath
from ..primitives.types import TrainingRun


def open_registry(home: Path) -> Registry:
    """
    Raises:
        NotFound: nothing was ever run there.
    """
    if not has_registry(home):
        raise NotFound(f"there are no runs in {home} yet; `tinsmith train` starts one")
    return Registry(_registry_path(home))


def has_registry(home: Path) -> bool:
    return _registry_path(home).exists()


def _registry_path(home: Path) -> Path:
    return home / "registry.sqlite"


def find_run(registry: Registry, name: str) -> TrainingRun:
    """The run of an id, or of a run folder.

    Raises:
        NotFound: no such run.
    """
    if Path(name).is_dir():
        name = run_id_of(name)
    known = {run.run_id: run for run in registry.runs()}
    if name not in known:
        near = get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]}?" if near else "`tinsmith runs` lists them"
        raise NotFound(f"no run {name!r}; {hint}")
    return known[name]


def find_checkpoint(name: str, home: Path) -> str:
    """The `tinker://` path of a checkpoint: itself, or the newest one of a run.

    Raises:
        InvalidInput: a `tinker://` path of another form.
        NotFound: no such run, or it has no checkpoint.
    """
    if name.startswith(SCHEME):
        return str(CheckpointPath.parse(name))
    registry = open_registry(home)
    run_id = find_run(registry, name).run_id
    checkpoints = registry.checkpoints(run_id)
    if not checkpoints:
        raise NotFound(f"run {run_id!r} has no checkpoint")
    return checkpoints[0].path
