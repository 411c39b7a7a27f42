"""Study: several agents in several environments at once, over several turns with tools, in one
asynchronous, off-policy run.

Two runs on one base model, a planner and a tool user, play a game together while the tool user
also works alone where every answer of the tool is late. Groups of all environments are played up
to `max_staleness` optimizer steps ahead, and a batch is a mix of them. Run it from the
repository's root:

    python -m examples.studies.agents.train

The last line of stdout is one JSON object.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import typer
from matplotlib.figure import Figure
from rich.console import Console

import tinsmith
from examples.multiagent.warm_up import imitate
from tinsmith.algorithms.advantages import get_advantage
from tinsmith.algorithms.datums import trajectory_datums
from tinsmith.algorithms.estimates import rate_interval
from tinsmith.algorithms.rollout import Group, Rollouts
from tinsmith.algorithms.seeds import derived_seed

from .tasks import RUNS, TASKS, Task

console = Console(highlight=False)


@dataclass(frozen=True)
class Settings:
    """`groups_per_step` are of all environments together, which take turns; `latency` is the mean
    of a slow environment's answer in seconds; `warm_up_games` and `eval_games` are of each; no step
    is begun after `minutes` of training."""

    tasks: tuple[str, ...]
    steps: int
    groups_per_step: int
    group_size: int
    max_staleness: int
    learning_rate: float
    rank: int
    max_tokens: int
    latency: float
    warm_up_games: int
    warm_up_steps: int
    eval_games: int
    env_workers: int
    minutes: float = 60
    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    seed: int = 0


PRESETS = {
    # SmolLM2-135M on two cores.
    "laptop": Settings(
        tasks=("kiosk", "calculator"),
        steps=24,
        groups_per_step=14,
        group_size=4,
        max_staleness=2,
        learning_rate=5e-4,
        rank=16,
        max_tokens=20,
        latency=1.0,
        warm_up_games=96,
        warm_up_steps=12,
        eval_games=80,
        env_workers=1,
    ),
    # Does it all run?
    "smoke": Settings(
        tasks=("kiosk", "calculator"),
        steps=2,
        groups_per_step=2,
        group_size=2,
        max_staleness=1,
        learning_rate=4e-4,
        rank=4,
        max_tokens=8,
        latency=0.01,
        warm_up_games=2,
        warm_up_steps=1,
        eval_games=2,
        env_workers=1,
    ),
    # A model of some billions of parameters, which follows instructions: no warm-up.
    "gpu": Settings(
        tasks=("kiosk", "calculator", "python"),
        steps=200,
        groups_per_step=48,
        group_size=16,
        max_staleness=4,
        learning_rate=1e-4,
        rank=32,
        max_tokens=512,
        latency=2.0,
        warm_up_games=0,
        warm_up_steps=0,
        eval_games=300,
        env_workers=8,
        minutes=24 * 60,
    ),
}

Policies = Mapping[str, Any]  # run -> its policy


@dataclass(frozen=True)
class Players:
    """Plays the tasks with whatever policies the runs have."""

    workers: tinsmith.EnvClient
    settings: Settings

    async def play(
        self, task: Task, policies: Policies, number: int, member: int = 0
    ) -> tinsmith.Match:
        """Members of a group have the task in common and differ in what they sample."""
        seated = {agent: policies[run] for agent, run in task.seats.items()}
        return await self._match(task, seated, number, member, "train", self.settings.latency)

    async def play_scripts(self, task: Task, number: int) -> tinsmith.Match:
        scripts = {agent: tinsmith.Scripted(script) for agent, script in task.scripts.items()}
        return await self._match(task, scripts, number, 0, "train", 0.0)

    async def measure(self, policies: Policies) -> dict[str, dict[str, float]]:
        """Success on held-out tasks by environment, with Wilson's 95% interval."""
        rows = {}
        for name in self.settings.tasks:
            task = TASKS[name]
            seated = {agent: policies[run] for agent, run in task.seats.items()}
            numbers = range(self.settings.eval_games)
            games = await asyncio.gather(
                *(self._match(task, seated, number, 0, "eval", 0.0) for number in numbers)
            )
            rate = rate_interval(sum(map(succeeded, games)), len(games))
            rows[name] = {key: round(value, 3) for key, value in asdict(rate).items()}
        return rows

    async def _match(
        self,
        task: Task,
        seated: Mapping[str, Any],
        number: int,
        member: int,
        split: Literal["train", "eval"],
        latency: float,
    ) -> tinsmith.Match:
        settings = self.settings
        params = tinsmith.SamplingParams(
            max_tokens=settings.max_tokens, seed=derived_seed(settings.seed, number, member)
        )
        spec = task.spec(seated, params, derived_seed(settings.seed, number), split, latency)
        match = self.workers.play_match(spec)
        try:
            return await match
        except asyncio.CancelledError:  # training is over, nobody wants it any more
            match.cancel()
            raise


def succeeded(match: tinsmith.Match) -> bool:
    return any(trajectory.info.get("success") for trajectory in match.trajectories.values())


async def warm_up(runs: Mapping[str, tinsmith.TrainingClient], players: Players) -> None:
    settings = players.settings
    transcripts: dict[str, list[list[dict[str, Any]]]] = defaultdict(list)
    for task in (TASKS[name] for name in settings.tasks):
        if task.scripts:
            numbers = range(settings.warm_up_games)
            games = await asyncio.gather(
                *(players.play_scripts(task, number) for number in numbers)
            )
            for agent, run in task.seats.items():
                transcripts[run] += [game.trajectories[agent].messages for game in games]
    losses = await asyncio.gather(
        *(
            imitate(runs[run], chats, steps=settings.warm_up_steps, learning_rate=1e-3)
            for run, chats in transcripts.items()
        )
    )
    for run, loss in zip(transcripts, losses, strict=True):
        console.print(f"{run} imitates careless scripts: {loss:.2f} nats a token")


async def train(runs: Mapping[str, tinsmith.TrainingClient], players: Players) -> dict[str, float]:
    """The loop. Returns the steps and seconds it took."""
    settings = players.settings
    tasks = [TASKS[name] for name in settings.tasks]
    live = {name: await run.live_sampling_client().ready() for name, run in runs.items()}
    version = (await runs[RUNS[0]].get_info()).version  # all runs' own
    started = time.monotonic()

    async def play(number: int, member: int) -> tinsmith.Match:
        return await players.play(tasks[number % len(tasks)], live, number, member)

    async with Rollouts(
        play,
        groups_per_step=settings.groups_per_step,
        group_size=settings.group_size,
        max_staleness=settings.max_staleness,
        total=settings.steps * settings.groups_per_step,
        max_replaced=0,
        version=version,
    ) as rollouts:
        step = 0
        while step < settings.steps and time.monotonic() - started < 60 * settings.minutes:
            batch = await rollouts.next_batch()
            staleness = np.mean([version - group.oldest_version for group in batch])
            data = datums(batch, tasks)
            adam = tinsmith.AdamParams(settings.learning_rate, grad_clip_norm=1.0)
            updates = []
            for name, run in runs.items():
                if data[name]:
                    run.forward_backward(data[name], "cispo", logprobs="loss")
                updates.append(run.optim_step(adam))
            version = (await asyncio.gather(*updates))[0].version
            rollouts.advance(version)
            step += 1
            seconds = time.monotonic() - started
            told = success(batch, settings.tasks)
            console.print(f"step {step:3d}  {told}  staleness {staleness:.1f}  {seconds:4.0f} s")
    return {"steps": step, "seconds": round(time.monotonic() - started, 1)}


def datums(batch: list[Group], tasks: list[Task]) -> dict[str, list[tinsmith.Datum]]:
    """Of each run, from all environments. Advantages compare the plays of one task by one agent,
    so that no environment's rewards are measured against another's."""
    games = sum(len(group) for group in batch)
    made: dict[str, list[tinsmith.Datum]] = {run: [] for run in RUNS}
    for group in batch:
        for agent, run in tasks[group.index % len(tasks)].seats.items():
            own = group.of(agent)
            advantages = get_advantage("grpo")(own.rewards) / games
            for trajectory, advantage in zip(own.trajectories, advantages, strict=True):
                made[run] += trajectory_datums(trajectory, float(advantage))
    return made


def success(batch: list[Group], names: tuple[str, ...]) -> str:
    """By environment, of those that are in the batch."""
    found = defaultdict(list)
    for group in batch:
        found[names[group.index % len(names)]] += map(succeeded, group.matches)
    return "  ".join(f"{name} {np.mean(found[name]):.2f}" for name in names if found[name])


def main(
    preset: Annotated[
        Literal["laptop", "gpu", "smoke"], typer.Option(help="sizes of everything")
    ] = "laptop",
    model: Annotated[str | None, typer.Option(help="folder, name or Hugging Face id")] = None,
    steps: Annotated[int | None, typer.Option(help="default: the preset's, as all below")] = None,
    minutes: Annotated[float | None, typer.Option(help="train no longer than this")] = None,
    max_staleness: Annotated[int | None, typer.Option(help="0: synchronous")] = None,
    latency: Annotated[float | None, typer.Option(help="mean seconds of a slow answer")] = None,
    learning_rate: float | None = None,
    eval_games: Annotated[int | None, typer.Option(help="of each environment")] = None,
    seed: int | None = None,
    out: Annotated[Path | None, typer.Option(help="folder for the picture")] = None,
) -> None:
    given = dict(
        model=model,
        steps=steps,
        minutes=minutes,
        max_staleness=max_staleness,
        latency=latency,
        learning_rate=learning_rate,
        eval_games=eval_games,
        seed=seed,
    )
    settings = replace(PRESETS[preset], **{k: v for k, v in given.items() if v is not None})
    try:
        summary = asyncio.run(run(settings))
    except tinsmith.TinsmithError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        plot(summary["before"], summary["after"], out / "agents.png")
    print(json.dumps(summary), flush=True)


async def run(settings: Settings) -> dict[str, Any]:
    started = time.monotonic()
    home = tinsmith.default_home()
    await asyncio.to_thread(tinsmith.resolve_model, settings.model, home, console.print)
    async with tinsmith.connect() as service:
        runs = {
            name: await service.create_lora_training_client(
                settings.model, rank=settings.rank, seed=settings.seed, train_unembed=False
            )
            for name in RUNS
        }
        ahead = (settings.max_staleness + 1) * settings.groups_per_step * settings.group_size
        workers = await service.create_env_client(
            settings.model, settings.env_workers, max_concurrent=-(-ahead // settings.env_workers)
        )
        async with workers:
            players = Players(workers, settings)
            await warm_up(runs, players)
            before = await players.measure(await snapshots(runs))
            console.print(f"before: {before}")
            trained = await train(runs, players)
            after = await players.measure(await snapshots(runs))
            console.print(f"after: {after}")
    return {
        "settings": asdict(settings),
        "before": before,
        "after": after,
        "trained": trained,
        "seconds": round(time.monotonic() - started, 1),
        "cpus": os.cpu_count(),
    }


async def snapshots(runs: Mapping[str, tinsmith.TrainingClient]) -> Policies:
    return {name: await run.save_weights_and_get_sampling_client() for name, run in runs.items()}


def plot(
    before: dict[str, dict[str, float]], after: dict[str, dict[str, float]], path: Path
) -> None:
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    for side, (moment, rows) in enumerate({"before": before, "after": after}.items()):
        rates, lows, highs = (
            np.array([row[key] for row in rows.values()]) for key in ("value", "low", "high")
        )
        places = np.arange(len(rows)) + 0.4 * side
        axes.bar(places, rates, 0.38, yerr=(rates - lows, highs - rates), capsize=4, label=moment)
    axes.set_xticks(np.arange(len(before)) + 0.2, list(before))
    axes.set(ylim=(0, 1), ylabel="success, 95% interval")
    axes.legend(loc="upper left")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    typer.run(main)
