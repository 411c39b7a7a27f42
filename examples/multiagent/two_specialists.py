"""Two specialists, trained together and asynchronously on one base model: one plans, one has tools.

The game is in `kiosk.py`: a planner turns an order's words into a plan, a tool user asks for prices
and pays what the plan comes to. Each is a run of its own with rewards of its own: the tool user is
not blamed for a bad plan, which it is paid for carrying out. Matches are played up to `staleness`
optimizer steps ahead, and both runs learn from the same ones at the same time.

Both start from imitating careless scripts. At the end the pair meets held-out orders, and so does
either alone: in both seats, and the tool user with the order in place of a plan. The last line of
stdout is one JSON object.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from kiosk import AGENTS, Kiosk, careless_planner, careless_tool_user, reads_out
from matplotlib.figure import Figure
from warm_up import imitate

import tinsmith
from tinsmith.algorithms.advantages import get_advantage
from tinsmith.algorithms.datums import trajectory_datums
from tinsmith.algorithms.estimates import rate_interval
from tinsmith.algorithms.rollout import Group, Rollouts

Pair = dict[str, Any]  # agent -> policy


@dataclass(frozen=True)
class Settings:
    model: str
    steps: int
    minutes: float
    orders: int
    games_per_order: int
    staleness: int
    learning_rate: float
    rank: int
    warm_up_games: int
    warm_up_steps: int
    eval_games: int
    seed: int


class Players:
    """Plays matches of one environment client."""

    def __init__(self, workers: tinsmith.EnvClient, settings: Settings) -> None:
        self.workers, self.settings = workers, settings

    async def play(
        self, pair: Pair, order: int, member: int = 0, split: str = "train"
    ) -> tinsmith.Match:
        """Members of a group have order and prices in common and differ in what they sample."""
        spec = tinsmith.MatchSpec(
            "kiosk",
            pair,
            tinsmith.SamplingParams(max_tokens=20, seed=seed_of(self.settings.seed, order, member)),
            seed=seed_of(self.settings.seed, order),
            env_kwargs={"split": split},
        )
        match = self.workers.play_match(spec)
        try:
            return await match
        except asyncio.CancelledError:  # training is over, nobody wants it any more
            match.cancel()
            raise

    async def measure(self, pair: Pair) -> dict[str, list[float]]:
        """On held-out orders: how often they were paid rightly, planned rightly, and how often the
        plan was carried out; each as [rate, low, high] (Wilson's 95% interval)."""
        games = await asyncio.gather(
            *(self.play(pair, order, split="eval") for order in range(self.settings.eval_games))
        )
        infos = [game.trajectories["planner"].info for game in games]
        rates = {}
        for what in ("success", "planned", "executed"):
            rate = rate_interval(sum(bool(info.get(what)) for info in infos), len(infos))
            rates[what] = [round(x, 3) for x in (rate.value, rate.low, rate.high)]
        return rates


async def warm_up(runs: dict[str, tinsmith.TrainingClient], players: Players) -> None:
    settings = players.settings
    scripts = {
        "planner": tinsmith.Scripted(careless_planner),
        "tool_user": tinsmith.Scripted(careless_tool_user),
    }
    games = await asyncio.gather(
        *(players.play(scripts, order) for order in range(settings.warm_up_games))
    )
    for agent, training in runs.items():
        transcripts = [game.trajectories[agent].messages for game in games]
        loss = await imitate(
            training, transcripts, steps=settings.warm_up_steps, learning_rate=1e-3
        )
        print(f"{agent} imitates its script: {loss:.2f} nats a token", flush=True)


async def train(runs: dict[str, tinsmith.TrainingClient], players: Players) -> dict[str, float]:
    """The loop. Everything in it is yours to change. Returns the steps and seconds it took."""
    settings = players.settings
    live = {agent: await runs[agent].live_sampling_client().ready() for agent in AGENTS}
    version = (await runs["planner"].get_info()).version  # both runs' own
    started = time.monotonic()

    async def play(order: int, member: int) -> tinsmith.Match:
        return await players.play(live, order, member)

    async with Rollouts(
        play,
        groups_per_step=settings.orders,
        group_size=settings.games_per_order,
        max_staleness=settings.staleness,
        total=settings.steps * settings.orders,
        max_replaced=0,
        version=version,
    ) as rollouts:
        step = 0
        while step < settings.steps and time.monotonic() - started < 60 * settings.minutes:
            batch = await rollouts.next_batch()
            staleness = np.mean([version - group.oldest_version for group in batch])
            adam = tinsmith.AdamParams(settings.learning_rate, grad_clip_norm=1.0)
            updates = []
            for agent, training in runs.items():
                training.forward_backward(datums(batch, agent), "cispo", logprobs="loss")
                updates.append(training.optim_step(adam))
            version = (await asyncio.gather(*updates))[0].version
            rollouts.advance(version)
            step += 1
            report(step, batch, float(staleness), time.monotonic() - started)
    return {"steps": step, "seconds": round(time.monotonic() - started, 1)}


def datums(batch: list[Group], agent: str) -> list[tinsmith.Datum]:
    """One agent's tokens with its own advantages. The loss sums over tokens: divided by games, its
    scale is the batch's mean."""
    games = sum(len(group) for group in batch)
    made = []
    for group in (group.of(agent) for group in batch):
        advantages = get_advantage("grpo")(group.rewards) / games
        for trajectory, advantage in zip(group.trajectories, advantages, strict=True):
            made += trajectory_datums(trajectory, float(advantage))
    return made


def report(step: int, batch: list[Group], staleness: float, seconds: float) -> None:
    infos = [match.trajectories["planner"].info for group in batch for match in group.matches]
    shares = {
        what: np.mean([i[what] for i in infos]) for what in ("planned", "executed", "success")
    }
    told = "  ".join(f"{what} {share:.2f}" for what, share in shares.items())
    print(f"step {step:3d}  {told}  staleness {staleness:.1f}  {seconds:4.0f} s", flush=True)


def seed_of(*words: int) -> int:
    return int(np.random.SeedSequence(words).generate_state(1)[0])


def main(
    model: Annotated[str, typer.Option(help="folder, name or Hugging Face id")] = (
        "HuggingFaceTB/SmolLM2-135M-Instruct"
    ),
    steps: int = 24,
    minutes: Annotated[float, typer.Option(help="train no longer than this")] = 60,
    orders: Annotated[int, typer.Option(help="per step")] = 8,
    games_per_order: int = 4,
    staleness: Annotated[int, typer.Option(help="most steps ahead; 0: synchronous")] = 2,
    learning_rate: float = 5e-4,
    rank: int = 16,
    warm_up_games: Annotated[int, typer.Option(help="of scripts, to imitate")] = 128,
    warm_up_steps: int = 14,
    eval_games: Annotated[int, typer.Option(help="of each pair, on held-out orders")] = 80,
    seed: int = 0,
    out: Annotated[Path | None, typer.Option(help="folder for the picture")] = None,
) -> None:
    settings = Settings(
        model, steps, minutes, orders, games_per_order, staleness, learning_rate, rank,
        warm_up_games, warm_up_steps, eval_games, seed,
    )  # fmt: skip
    summary = asyncio.run(run(settings))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        plot(summary["held_out"], out / "two_specialists.png")
    print(json.dumps(summary), flush=True)


async def run(settings: Settings) -> dict[str, Any]:
    tinsmith.envs.register("kiosk", Kiosk)
    async with tinsmith.connect() as service:
        runs = {
            agent: await service.create_lora_training_client(
                settings.model, rank=settings.rank, seed=settings.seed, train_unembed=False
            )
            for agent in AGENTS
        }
        async with await service.create_env_client(settings.model) as workers:
            players = Players(workers, settings)
            await warm_up(runs, players)
            start = await snapshots(runs)
            held_out = {"the pair at the start": await players.measure(start)}
            print(held_out, flush=True)
            trained = await train(runs, players)
            end = await snapshots(runs)
            planner, tool_user = end["planner"], end["tool_user"]
            for who, pair in {
                "the pair at the end": end,
                "the planner in both seats": dict.fromkeys(AGENTS, planner),
                "the tool user in both seats": dict.fromkeys(AGENTS, tool_user),
                "the tool user, no plan": {
                    "planner": tinsmith.Scripted(reads_out),
                    "tool_user": tool_user,
                },
            }.items():
                held_out[who] = await players.measure(pair)
                print(who, held_out[who], flush=True)
    return {"settings": asdict(settings), "trained": trained, "held_out": held_out}


async def snapshots(runs: dict[str, tinsmith.TrainingClient]) -> Pair:
    return {agent: await runs[agent].save_weights_and_get_sampling_client() for agent in AGENTS}


def plot(held_out: dict[str, dict[str, list[float]]], path: Path) -> None:
    figure = Figure(figsize=(7, 2.6), layout="constrained")
    axes = figure.subplots()
    rates, lows, highs = np.array([rates["success"] for rates in held_out.values()]).T
    axes.barh(list(held_out), rates, xerr=(rates - lows, highs - rates), capsize=4)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xlabel="held-out orders paid rightly (95% interval)")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    typer.run(main)
