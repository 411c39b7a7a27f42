"""What a run on a fixed set of examples shows while it goes on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ..algorithms.fit import FitWatcher
from ..algorithms.rows import DataReport


class RichFitWatcher(FitWatcher):
    """A line per step, on a terminal with a bar below. A context manager."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        self.steps = self.progress.add_task("starting the learner", total=None)

    def __enter__(self) -> RichFitWatcher:
        if self.console.is_terminal:
            self.progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.progress.stop()

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    # ---- what the loop tells ----

    def data(self, reports: Mapping[str, DataReport]) -> None:
        for name, report in reports.items():
            first, *rest = report.lines()
            self.say(f"{name}: {first}")
            for line in rest:
                self.say(f"  {line}")

    def started(self, run_id: str, run_dir: Path, first_step: int, steps: int) -> None:
        self.progress.update(
            self.steps, description="optimizer steps", total=steps, completed=first_step
        )
        self.say(f"run {run_id} in {run_dir}")

    def step(self, metrics: dict[str, float]) -> None:
        self.progress.update(self.steps, completed=metrics["step"])
        shown = "nll" if "nll" in metrics else "loss"
        self.say(
            f"step {metrics['step']:>4.0f}  epoch {metrics['epoch']:.2f}  "
            f"{shown} {metrics[shown]:.4f}  gradient {metrics['grad_norm']:.3f}  "
            f"learning rate {metrics['learning_rate']:.2e}  "
            f"tokens/s {metrics['tokens_per_s']:.0f}  {metrics['step_s']:.1f} s"
        )

    def evaluated(self, step: int, result: dict[str, Any]) -> None:
        shown = next(name for name in ("nll", "accuracy", "loss") if name in result)
        low, high = (
            result.get(f"{shown}_{end}", None if shown == "accuracy" else result.get(end))
            for end in ("low", "high")
        )
        interval = "" if low is None else f" (95% interval {low:.4f} to {high:.4f})"
        self.say(f"held-out {shown} after {step} steps: {result[shown]:.4f}{interval}")
