"""What a training run shows while it goes on."""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..algorithms.evaluate import EvalResult
from ..algorithms.rollout import Group as EpisodeGroup
from ..algorithms.train import TrainConfig, Watcher
from ..primitives.types import Trajectory

BARS = " ▁▂▃▄▅▆▇█"


def sparkline(values: list[float], width: int = 40) -> str:
    """The last `width` values between 0 and the largest (at least 1) as a row of bars."""
    top = max([1.0, *values])
    return "".join(BARS[round(max(v, 0) / top * (len(BARS) - 1))] for v in values[-width:])


class RichWatcher(Watcher):
    """A live table on a terminal, a line per step elsewhere. A context manager."""

    def __init__(self, config: TrainConfig, console: Console | None = None) -> None:
        self.config = config
        self.console = console or Console()
        self.rewards: list[float] = []
        self.last: dict[str, float] = {}
        self.doing = "starting the learner"
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self.console,
        )
        self.steps = self.progress.add_task("optimizer steps", total=config.steps)
        self.evaluation = self.progress.add_task("evaluation", total=None, visible=False)
        self.live = Live(
            get_renderable=self._render, console=self.console, refresh_per_second=2, transient=True
        )
        self.episodes = 0
        self.tokens = 0
        self.since = time.monotonic()

    def __enter__(self) -> RichWatcher:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.live.stop()

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)

    def _render(self) -> RenderableType:
        table = Table.grid(padding=(0, 2))
        table.add_row("now", self.doing)
        if self.last:
            m = self.last
            table.add_row("reward", f"{m['reward']:.3f}  {sparkline(self.rewards)}")
            table.add_row("success", f"{m['success']:.3f}")
            table.add_row(
                "staleness",
                f"mean {m['staleness_mean']:.2f}, max {m['staleness_max']:.0f} "
                f"(bound {self.config.max_staleness})",
            )
            table.add_row(
                "tokens/s",
                f"sampled {m['sampled_tokens_per_s']:.0f}, trained {m['trained_tokens_per_s']:.0f}",
            )
            table.add_row("mismatch", _mismatch(m))
            table.add_row(
                "groups",
                f"{m['trained']:.0f} trained, {m['dropped_no_signal']:.0f} without signal, "
                f"{m['dropped_stale']:.0f} stale; {m['failed_episodes']:.0f} episodes failed",
            )
        return Group(table, self.progress)

    # ---- what the loop tells ----

    def started(self, run_id: str, run_dir: Path, first_step: int) -> None:
        self.progress.update(self.steps, completed=first_step)
        self.doing = "playing the first episodes"
        self.say(f"run {run_id} in {run_dir}")

    def group(self, group: EpisodeGroup) -> None:
        self.episodes += len(group.trajectories)
        self.doing = f"{self.episodes} episodes played"

    def step(self, metrics: dict[str, float]) -> None:
        self.last = metrics
        self.rewards.append(metrics["reward"])
        self.progress.update(self.steps, completed=metrics["step"])
        self.say(
            f"step {metrics['step']:>4.0f}  reward {metrics['reward']:.3f}  "
            f"success {metrics['success']:.3f}  staleness {metrics['staleness_mean']:.2f}"
            f"/{metrics['staleness_max']:.0f}  tokens/s {metrics['sampled_tokens_per_s']:.0f} "
            f"sampled {metrics['trained_tokens_per_s']:.0f} trained  {_mismatch(metrics)}  "
            f"{metrics['step_s']:.1f} s"
        )

    def eval_episode(self, trajectory: Trajectory) -> None:
        self.doing = "evaluating on the held-out set"
        self.progress.update(
            self.evaluation, total=self.config.eval_episodes, advance=1, visible=True
        )

    def evaluated(self, step: int, result: EvalResult) -> None:
        self.progress.reset(self.evaluation, visible=False)
        self.doing = "playing episodes"
        self.say(
            f"held-out success after {step} steps: {result.rate:.3f} "
            f"(95% interval {result.low:.3f} to {result.high:.3f}, {result.episodes} episodes)"
        )


def _mismatch(metrics: dict[str, float]) -> str:
    policy_kl = f"kl {metrics.get('policy_kl', 0):.4f}"
    if "mismatch_max" not in metrics:
        return policy_kl
    return f"trainer-sampler {metrics['mismatch_max']:.1e}, {policy_kl}"
