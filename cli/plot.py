"""`tinsmith plot`: the learning curve of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..algorithms.plot import plot_rewards, read_metrics
from ..algorithms.plot_fit import is_fit, plot_fit
from ..algorithms.run_folder import run_folder
from .lookup import find_run, open_registry
from .options import AsJson, Home, print_json


def plot(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's id, or its folder.")],
    home: Home,
    out: Annotated[
        Path | None,
        typer.Option(show_default="reward.png or loss.png in the run's folder", help="PNG file."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Draw a run's reward, success and staleness per step; of supervised learning, its loss."""
    # A folder is enough: it may come from another machine, whose runs this home does not know.
    folder = Path(run)
    if not folder.is_dir():
        folder = run_folder(find_run(open_registry(home), run), home)
    if is_fit(read_metrics(folder)):
        path = plot_fit(folder, out or folder / "loss.png")
    else:
        path = plot_rewards(folder, out or folder / "reward.png")
    if as_json:
        print_json({"path": str(path)})
    else:
        typer.echo(str(path))
