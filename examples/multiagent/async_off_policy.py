"""Asynchronous off-policy RL by hand: one task, several bounds on staleness, time and reward.

A model learns the calculator task (tool calls over several turns) while every answer of the tool
takes a lognormally distributed time of mean 1 s. For each bound k the same loop trains a fresh
adapter on the same number of episodes: `Rollouts` plays up to k optimizer steps ahead, and the
loop below turns each batch into datums and takes a step. k = 0 is the synchronous run.

`curves.png` shows reward against wall time and against steps, `results.json` holds what it shows;
the last line of stdout is one JSON object.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from matplotlib.figure import Figure
from rich.console import Console

import tinsmith
from tinsmith.algorithms.advantages import get_advantage
from tinsmith.algorithms.datums import trajectory_datums
from tinsmith.algorithms.rollout import Group, Rollouts
from tinsmith.envs import EpisodeLimits, EpisodeSpec

console = Console(stderr=True, highlight=False)


@dataclass(frozen=True)
class Settings:
    model: str
    env: str
    steps: int
    groups_per_step: int
    group_size: int
    learning_rate: float
    latency: float
    eval_episodes: int
    seed: int

    def episode(self, policy: tinsmith.SamplingClient, number: int, member: int = 0) -> EpisodeSpec:
        """Members of a group have the task in common and differ in what they sample."""
        return self._spec(policy, number, member, "train", self.latency)

    def held_out(self, policy: tinsmith.SamplingClient, number: int) -> EpisodeSpec:
        return self._spec(policy, number, 0, "eval", 0.0)

    def _spec(
        self, policy: tinsmith.SamplingClient, number: int, member: int, split: str, latency: float
    ) -> EpisodeSpec:
        return EpisodeSpec(
            "tinsmith.envs.latency:SlowTools",
            policy,
            tinsmith.SamplingParams(max_tokens=16, seed=seed_of(self.seed, number, member)),
            seed=seed_of(self.seed, number),
            env_kwargs={"env": self.env, "env_kwargs": {"split": split}, "mean": latency},
            limits=EpisodeLimits(step_seconds=120, episode_seconds=600),
        )


@dataclass
class Curve:
    """One run: seconds since its start, mean reward and the groups' staleness after every step;
    held-out success as [low, rate, high] (Wilson's 95% interval)."""

    max_staleness: int
    seconds: list[float] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    staleness: list[list[int]] = field(default_factory=list)
    success: list[float] = field(default_factory=list)


async def train(service: tinsmith.ServiceClient, settings: Settings, max_staleness: int) -> Curve:
    """The loop. Everything in it is yours to change."""
    training = await service.create_lora_training_client(
        settings.model, rank=16, train_unembed=False, seed=settings.seed
    )
    live = await training.live_sampling_client().ready()  # follows every optim_step
    ahead = (max_staleness + 1) * settings.groups_per_step * settings.group_size
    curve, version = Curve(max_staleness), 0
    advantages = get_advantage("grpo")
    async with await service.create_env_client(settings.model, max_concurrent=ahead) as workers:

        async def play(index: int, member: int) -> tinsmith.Trajectory:
            episode = workers.run_episode(settings.episode(live, index, member))
            try:
                return await episode
            except asyncio.CancelledError:  # training is over, nobody wants it any more
                episode.cancel()
                raise

        def datums(group: Group) -> list[tinsmith.Datum]:
            # The loss sums over tokens: divided by episodes, its scale is the batch's mean.
            share = advantages(group.rewards) / (settings.groups_per_step * settings.group_size)
            pairs = zip(group.trajectories, share, strict=True)
            return [d for t, a in pairs for d in trajectory_datums(t, float(a))]

        await workers.run_episode(settings.held_out(live, 0))  # so that the worker is up
        started = time.monotonic()
        async with Rollouts(
            play,
            groups_per_step=settings.groups_per_step,
            group_size=settings.group_size,
            max_staleness=max_staleness,
            total=settings.steps * settings.groups_per_step,
            max_replaced=0,  # the same samples for every bound
        ) as rollouts:
            for step in range(settings.steps):
                batch = await rollouts.next_batch()
                curve.staleness.append([version - group.oldest_version for group in batch])
                training.forward_backward(  # queued, not awaited
                    [d for group in batch for d in datums(group)], "cispo", logprobs="loss"
                )
                adam = tinsmith.AdamParams(settings.learning_rate, grad_clip_norm=1.0)
                version = (await training.optim_step(adam)).version
                rollouts.advance(version)
                curve.seconds.append(time.monotonic() - started)
                curve.rewards.append(float(np.mean([group.rewards.mean() for group in batch])))
                console.print(
                    f"staleness {max_staleness}  step {step + 1:3}  {curve.seconds[-1]:6.1f} s  "
                    f"reward {curve.rewards[-1]:.3f}  staleness {np.mean(curve.staleness[-1]):.2f}"
                )
        policy = await training.save_weights_and_get_sampling_client()
        tasks = [settings.held_out(policy, number) for number in range(settings.eval_episodes)]
        result = await tinsmith.evaluate(workers, tasks)
    curve.success = [result.low, result.rate, result.high]
    await service.close_training_run(training.run_id)
    return curve


def seed_of(*words: int) -> int:
    return int(np.random.SeedSequence(words).generate_state(1)[0])


def smooth(values: list[float], over: int = 3) -> list[float]:
    return [float(np.mean(values[max(0, i - over + 1) : i + 1])) for i in range(len(values))]


def plot(curves: list[Curve], path: Path) -> None:
    figure = Figure(figsize=(10, 4), layout="constrained")
    against_time, against_steps = figure.subplots(1, 2, sharey=True)
    for number, curve in enumerate(curves):
        look = {"color": f"C{number}", "label": f"staleness {curve.max_staleness}"}
        against_time.plot(curve.seconds, smooth(curve.rewards), **look)
        against_steps.plot(range(1, len(curve.rewards) + 1), smooth(curve.rewards), **look)
    against_time.set(xlabel="seconds", ylabel="reward (mean of 3 steps)")
    against_steps.set(xlabel="optimizer steps")
    against_steps.legend(loc="lower right")
    figure.savefig(path, dpi=120)


def main(
    model: Annotated[str, typer.Option(help="folder, name or Hugging Face id")] = (
        "HuggingFaceTB/SmolLM2-135M-Instruct"
    ),
    staleness: Annotated[list[int], typer.Option(help="bounds to compare")] = [0, 1, 4, 8],  # noqa: B006
    env: Annotated[str, typer.Option(help="with splits `train` and `eval`")] = "calculator",
    latency: Annotated[float, typer.Option(help="mean seconds of a tool's answer")] = 1.0,
    steps: int = 15,
    groups_per_step: int = 3,
    group_size: int = 4,
    learning_rate: float = 4e-4,
    eval_episodes: int = 48,
    seed: int = 0,
    out: Annotated[Path, typer.Option(help="folder for the results")] = Path(
        "runs/async-off-policy"
    ),
) -> None:
    settings = Settings(
        model, env, steps, groups_per_step, group_size, learning_rate, latency, eval_episodes, seed
    )
    out.mkdir(parents=True, exist_ok=True)
    curves = asyncio.run(compare(settings, staleness, out))
    summary = [
        {
            "max_staleness": curve.max_staleness,
            "seconds": round(curve.seconds[-1], 1),
            "reward": round(smooth(curve.rewards)[-1], 3),
            "success": [round(x, 3) for x in curve.success],
            "staleness": round(float(np.mean(curve.staleness)), 2),
        }
        for curve in curves
    ]
    print(json.dumps({"runs": summary, "out": str(out)}), flush=True)


async def compare(settings: Settings, bounds: list[int], out: Path) -> list[Curve]:
    await asyncio.to_thread(
        tinsmith.resolve_model, settings.model, tinsmith.default_home(), console.print
    )
    curves = []
    async with tinsmith.connect(num_cpus=os.cpu_count()) as service:
        for bound in bounds:
            curves.append(await train(service, settings, bound))
            await asyncio.to_thread(save, settings, curves, out)
    return curves


def save(settings: Settings, curves: list[Curve], out: Path) -> None:
    results = {"settings": asdict(settings), "curves": [asdict(curve) for curve in curves]}
    (out / "results.json").write_text(json.dumps(results, indent=1))
    plot(curves, out / "curves.png")


if __name__ == "__main__":
    typer.run(main)
