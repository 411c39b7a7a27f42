"""A run's folder: its config (`run.json`), metrics and trajectories. Its checkpoints are kept by the
service, which knows the run by its id."""

from __future__ import annotations

import json
from pathlib import Path

from ..primitives.errors import InvalidInput, NotFound
from ..primitives.types import TrainingRun
from .config import TrainConfig


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


def load_run(run_dir: str | Path) -> tuple[str, TrainConfig]:
    """The id and config of the run in a folder.

    Raises:
        NotFound: there is no `run.json`.
    """
    path = Path(run_dir) / "run.json"
    if not path.exists():
        raise NotFound(f"there is no run in {Path(run_dir)} (no run.json)")
    saved = json.loads(path.read_text())
    return saved["run_id"], TrainConfig(**saved["config"])
