"""What a run has come to, for people and for scripts."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from ..algorithms.config import TrainConfig
from ..algorithms.evaluate import EvalResult
from ..algorithms.plot import plot_rewards
from ..algorithms.train import TrainResult
from ..primitives.types import Message, Trajectory


def report(
    console: Console, config: TrainConfig, result: TrainResult, seconds: float
) -> dict[str, Any]:
    """Show the success before and after training and an episode of each, and write `reward.png`
    into the run's folder. Returns the summary: JSON values."""
    before, after = result.before, result.after
    evaluations = {name: e for name, e in (("before", before), ("after", after)) if e is not None}
    if evaluations:
        console.print(_table(evaluations))
    for name, evaluation in evaluations.items():
        _show_episode(console, f"an episode {name} training", evaluation.trajectories[0])
    plot_rewards(result.run_dir, result.run_dir / "reward.png")
    if result.stopped:
        console.print(f"stopped; go on with --resume {result.run_dir}", highlight=False)
    return {
        "task": config.env,
        "before": before and before.to_json(),
        "after": after and after.to_json(),
        "episodes": int(result.totals["episodes"]),
        "optim_steps": result.steps,
        "seconds": round(seconds, 1),
        "run_dir": str(result.run_dir),
    }


def _table(evaluations: dict[str, EvalResult]) -> Table:
    table = Table(title="held-out success")
    for column in ("", "rate", "95% interval", "episodes"):
        table.add_column(column)
    for name, evaluation in evaluations.items():
        interval = f"{evaluation.low:.3f} to {evaluation.high:.3f}"
        table.add_row(name, f"{evaluation.rate:.3f}", interval, str(evaluation.episodes))
    return table


def _show_episode(console: Console, title: str, trajectory: Trajectory) -> None:
    console.rule(f"{title}: reward {trajectory.reward:g}")
    for message in _played(trajectory):
        console.print(f"[bold]{message['role']:>9}[/bold]  ", end="")
        console.print(_shown(message["content"]), markup=False, highlight=False)


def _shown(text: str, most: int = 2000) -> str:
    """A long text without its middle."""
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]}\n... {len(text) - most} characters ...\n{text[-half:]}"


def _played(trajectory: Trajectory) -> list[Message]:
    """What the policy said, and the question before it (the prompt's worked examples are left
    out)."""
    messages, turns = trajectory.messages, len(trajectory.rewards)
    said = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    first = said[-turns] if turns else len(messages)
    return messages[max(first - 1, 0) :]
