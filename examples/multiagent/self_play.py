"""Self-play against a league of past selves: Nim, as TextArena has it.

Whoever takes the last object wins. The learner starts from imitating a player that makes random
legal moves; from there on it meets itself and its past selves, prioritised by how even the match
is, and joins them every few steps. The random player and one that plays perfectly are only met at
the end, when all play all: every pair's score with its interval, and the ratings that follow.

Everything is in the run's checkpoints, the league too: `--resume RUN` goes on with one. The last
line of stdout is one JSON object.
"""

from __future__ import annotations

import asyncio
import functools
import json
import math
import operator
import random
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from warm_up import imitate

import tinsmith
from tinsmith.algorithms.cross_play import CrossPlay, Pairing, cross_play
from tinsmith.algorithms.datums import trajectory_datums
from tinsmith.algorithms.league import League, LeagueConfig
from tinsmith.algorithms.league_plot import plot_cross_play, plot_ladder
from tinsmith.algorithms.ratings import bradley_terry, score_interval
from tinsmith.algorithms.rollout import Group, Rollouts

PLAYERS = ("player_0", "player_1")  # player_0 moves first


def piles_of(messages: list[dict[str, Any]]) -> list[int]:
    """The piles as the game last told them."""
    told = re.findall(r"pile (\d+): (\d+)", messages[-1]["content"])
    return list({int(pile): int(left) for pile, left in told}.values())


def random_player(messages: list[dict[str, Any]], rng: random.Random) -> str:
    moves = [(i, n) for i, left in enumerate(piles_of(messages)) for n in range(1, left + 1)]
    return "[{} {}]".format(*rng.choice(moves))


def perfect_player(messages: list[dict[str, Any]], rng: random.Random) -> str:
    """Leaves piles whose exclusive or is 0 wherever it can (Bouton, 1901)."""
    piles = piles_of(messages)
    balance = functools.reduce(operator.xor, piles)
    for pile, left in enumerate(piles):
        if left ^ balance < left:
            return f"[{pile} {left - (left ^ balance)}]"
    return random_player(messages, rng)


def score(match: tinsmith.Match, player: str) -> float:
    """1 won, 0.5 drawn, 0 lost."""
    mine = match.rewards[player]
    other = match.rewards[PLAYERS[1 - PLAYERS.index(player)]]
    return 0.5 + 0.5 * float(np.sign(mine - other))


@dataclass
class Learner:
    """One run, its league, and the players that the league's members are."""

    service: tinsmith.ServiceClient
    training: tinsmith.TrainingClient
    workers: tinsmith.EnvClient
    env: str
    env_kwargs: dict[str, Any]
    league: League
    step: int = 0
    players: dict[str, tinsmith.SamplingClient] = field(default_factory=dict)
    opponents: dict[int, str | None] = field(default_factory=dict)

    def play(self, first, second, seed: int) -> tinsmith.Op[tinsmith.Match]:
        return self.workers.play_match(
            tinsmith.MatchSpec(
                self.env,
                dict(zip(PLAYERS, (first, second), strict=True)),
                tinsmith.SamplingParams(max_tokens=8, seed=seed),
                seed=seed,
                env_kwargs=self.env_kwargs,
            )
        )

    async def play_for_training(self, group: int, member: int) -> tinsmith.Match:
        """The group decides who plays: the learner moves first in every second one."""
        if group not in self.opponents:
            opponent = self.league.opponent(group)
            self.opponents[group] = opponent and opponent.name
        name = self.opponents[group]
        live = self.players["learner"]
        pair = [live, live if name is None else self.players[name]]
        seat = group % 2
        match = await self.play(pair[seat], pair[1 - seat], 1_000 * group + member)
        if name is not None:
            self.league.record(name, score(match, PLAYERS[seat]))
        return match

    async def train(self, batch: list[Group], learning_rate: float) -> int:
        """One step on every game that a live policy played; the version after it."""
        data = []
        weight = 1 / sum(len(group) for group in batch)
        for group in batch:
            for player in group.matches[0].live:
                own = group.of(player)
                for trajectory, advantage in zip(
                    own.trajectories, own.rewards - own.rewards.mean(), strict=True
                ):
                    data += trajectory_datums(trajectory, float(advantage) * weight)
        self.training.forward_backward(data, "cispo", logprobs="loss")
        stepped = await self.training.optim_step(
            tinsmith.AdamParams(learning_rate, grad_clip_norm=1.0)
        )
        return stepped.version

    async def join(self) -> None:
        """The learner as it is becomes a member; one checkpoint holds it and the league."""
        name = f"step {self.step}"
        saved = await self.training.save_weights_for_sampler(f"self-{self.step}", overwrite=True)
        self.league.admit(name, saved.path, step=self.step, pinned=self.step == 0)
        await self.seat(name, saved.path)
        state = {"league": self.league.to_json(), "step": self.step}
        await self.training.save_state(f"step-{self.step}", user_metadata=state, overwrite=True)

    async def seat(self, name: str, path: str) -> None:
        client = await self.service.create_sampling_client(path)
        self.players[name] = await client.ready()


def main(
    model: Annotated[str, typer.Option(help="folder, name or Hugging Face id")] = (
        "HuggingFaceTB/SmolLM2-135M-Instruct"
    ),
    steps: int = 16,
    minutes: Annotated[float, typer.Option(help="train no longer than this")] = math.inf,
    piles: Annotated[str, typer.Option(help="sizes, as in '3 4 5'")] = "1 3",
    groups_per_step: int = 6,
    group_size: int = 16,
    max_staleness: Annotated[int, typer.Option(help="0: strictly on-policy")] = 0,
    join_every: Annotated[int, typer.Option(help="steps between new members")] = 5,
    self_play: Annotated[float, typer.Option(help="share of games against itself")] = 0.5,
    learning_rate: float = 4e-4,
    rank: int = 16,
    warm_up_games: Annotated[int, typer.Option(help="of random moves, to imitate")] = 128,
    warm_up_steps: int = 6,
    warm_up_learning_rate: float = 1e-3,
    eval_games: Annotated[int, typer.Option(help="of every pair, in both orders")] = 50,
    seed: int = 0,
    env: str = "textarena:Nim-v0",
    resume: Annotated[str | None, typer.Option(help="a run's id, to go on with")] = None,
    out: Annotated[Path | None, typer.Option(help="folder for the pictures")] = None,
) -> None:
    summary = asyncio.run(run(**locals()))
    print(json.dumps(summary), flush=True)


async def run(
    model, steps, minutes, piles, groups_per_step, group_size, max_staleness, join_every, self_play,
    learning_rate, rank, warm_up_games, warm_up_steps,
    warm_up_learning_rate, eval_games, seed, env, resume, out,
) -> dict:  # fmt: skip
    started = time.monotonic()
    env_kwargs = {"piles": [int(pile) for pile in piles.split()]}
    async with (
        tinsmith.connect() as service,
        await service.create_env_client(model) as workers,
    ):
        if resume is None:
            training = await service.create_lora_training_client(model, rank=rank, seed=seed)
            league = League(LeagueConfig(self_play=self_play, admit_every=join_every, seed=seed))
            learner = Learner(service, training, workers, env, env_kwargs, league)
            await warm_up(learner, warm_up_games, warm_up_steps, warm_up_learning_rate)
            await learner.join()
        else:
            learner = await resumed(service, workers, env, env_kwargs, resume)
            training = learner.training
        print(f"run {training.run_id} from step {learner.step}", flush=True)
        learner.players["learner"] = await training.live_sampling_client().ready()
        async with Rollouts(
            learner.play_for_training,
            groups_per_step=groups_per_step,
            group_size=group_size,
            max_staleness=max_staleness,
            max_replaced=0,
            version=(await training.get_info()).version,
            first_index=learner.step * groups_per_step,
        ) as rollouts:
            while learner.step < steps and time.monotonic() - started < 60 * minutes:
                batch = await rollouts.next_batch()
                version = await learner.train(batch, learning_rate)
                learner.step += 1
                if learner.league.due(learner.step):
                    await learner.join()
                rollouts.advance(version)
                report(learner, batch, time.monotonic() - started)
        if learner.league.admitted_step < learner.step:
            await learner.join()
        cross = await meet(learner, eval_games)
    return summary(cross, model, piles, learner.step, time.monotonic() - started, out)


async def warm_up(learner: Learner, games: int, steps: int, learning_rate: float) -> None:
    script = tinsmith.Scripted(random_player)
    played = await asyncio.gather(*(learner.play(script, script, s) for s in range(games)))
    transcripts = [t.messages for game in played for t in game.trajectories.values()]
    loss = await imitate(learner.training, transcripts, steps=steps, learning_rate=learning_rate)
    print(f"imitates random moves: {loss:.2f} nats a token", flush=True)


async def resumed(service, workers, env, env_kwargs, run_id: str) -> Learner:
    """The learner with its league as the newest checkpoint has them."""
    saved = [c for c in await service.list_checkpoints(run_id) if "league" in c.user_metadata]
    newest = max(saved, key=lambda c: c.user_metadata["step"])
    training = await service.resume_training_client(run_id, path=newest.path)
    league = League.from_json(newest.user_metadata["league"])
    step = newest.user_metadata["step"]
    learner = Learner(service, training, workers, env, env_kwargs, league, step)
    for member in league.members:
        await learner.seat(member.name, member.path)
    return learner


def report(learner: Learner, batch: list[Group], seconds: float) -> None:
    members = "  ".join(f"{m.name}: {m.win_rate:.2f}" for m in learner.league.members)
    lost = np.mean([m.trajectories[p].info.get("invalid_move", False)
                    for g in batch for m in g.matches for p in PLAYERS])  # fmt: skip
    print(
        f"step {learner.step:3d}  {seconds:4.0f} s  illegal {lost:.2f}  wins against {members}",
        flush=True,
    )


async def meet(learner: Learner, games: int) -> CrossPlay:
    """The selves in the league and the scripts, everyone against everyone in both orders."""
    players: dict[str, Any] = {m.name: learner.players[m.name] for m in learner.league.members}
    players["random"] = tinsmith.Scripted(random_player)
    players["perfect"] = tinsmith.Scripted(perfect_player)

    async def play(pairing: Pairing) -> float:
        pair = players[pairing.first], players[pairing.second]
        match = await learner.play(*pair, 1_000_000_000 + pairing.seed)
        return score(match, PLAYERS[0])

    return await cross_play(play, list(players), games=games)


def summary(
    cross: CrossPlay, model: str, piles: str, steps: int, seconds: float, out: Path | None
) -> dict:
    ratings = bradley_terry(cross.results(), anchor="random", order_effect=True)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        title = f"Nim {piles}"
        plot_cross_play(cross, out / "self_play.png", title=title)
        plot_ladder(ratings, out / "self_play_elo.png", title=f"{title}, random player at 0")
    for name, rating in ratings.players.items():
        print(f"{name:10s} {rating.elo:+6.0f} Elo  [{rating.low:+.0f}, {rating.high:+.0f}]")

    def against(name: str, other: str) -> list[float]:
        """Mean score over both orders, with its 95% interval."""
        i, j = cross.rows.index(name), cross.rows.index(other)
        games = int(cross.games[i, j] + cross.games[j, i])
        won = cross.score[i, j] * cross.games[i, j] + (1 - cross.score[j, i]) * cross.games[j, i]
        return [won / games, *score_interval(won, games)]

    last = f"step {steps}"
    return {
        "name": "self_play",
        "model": model,
        "piles": piles,
        "steps": steps,
        "seconds": round(seconds, 1),
        "start_against_random": against("step 0", "random"),
        "end_against_random": against(last, "random"),
        "end_against_start": against(last, "step 0"),
        "perfect_against_random": against("perfect", "random"),
        "elo": {n: [r.elo, r.low, r.high] for n, r in ratings.players.items()},
        "cross_play": cross.to_json(),
    }


if __name__ == "__main__":
    typer.run(main)
