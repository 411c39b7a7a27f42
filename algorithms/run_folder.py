"""A run's folder: its config (`run.json`), metrics and trajectories. Its checkpoints are kept by the
service, which knows the run by its id."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from ..primitives.errors import InvalidInput, NotFound
from ..primitives.types import TrainingRun
from .config import TrainConfig

C = TypeVar("C")


def run_folder(run: TrainingRun, home: str | Path) -> Path:
    """Where `train` keeps the files of a run."""
    return Path(run.user_metadata.get("run_dir") or Path(home) / "runs" / run.run_id)


def new_run_folder(run_dir: str | Path) -> str:
    """The absolute path of a folder for a new run, for the run's `user_metadata["run_dir"]`.

    Raises:
        InvalidInput: it holds a run already.
    """
    if (Path(run_dir) / "run.json").exists():
        raise InvalidInput(f"{run_dir} holds a run already; resume it, or take another folder")
    return str(Path(run_dir).absolute())


def run_id_of(run_dir: str | Path) -> str:
    """The id of the run in a folder.

    Raises:
        NotFound: there is no `run.json`.
    """
    return _read(run_dir)["run_id"]


def load_run(run_dir: str | Path) -> tuple[str, TrainConfig]:
    """The id and config of the run in a folder, a run of `train`.

    Raises:
        NotFound: there is no `run.json`, or it is of another kind of run.
    """
    return load_run_of(TrainConfig, run_dir)


def load_run_of(kind: type[C], run_dir: str | Path) -> tuple[str, C]:
    """The id and config of the run in a folder; `kind` is the class of its config.

    Raises:
        NotFound: there is no `run.json`, or it is of another kind of run.
    """
    saved = _read(run_dir)
    if (found := saved.get("kind", TrainConfig.__name__)) != kind.__name__:
        raise NotFound(f"the run in {Path(run_dir)} has a {found}, not a {kind.__name__}")
    return saved["run_id"], kind(**saved["config"])


def _read(run_dir: str | Path) -> dict[str, Any]:
    path = Path(run_dir) / "run.json"
    if not path.exists():
        raise NotFound(f"there is no run in {Path(run_dir)} (no run.json)")
    return json.loads(path.read_text())
