"""Asker and answerer: two agents with different rewards, trained together on one base model.

The answerer knows an animal; the asker has two questions about its features, and then names it.
The asker is paid for finding it, the answerer for true and short answers: neither sees the other's
reward. Both start from imitating careless players: one asks at random and heeds every other time
what it hears, the other tells the truth two times in three. An asker that heeds such answers gains
little by it, and would learn to name one animal whatever it hears; so the answerer has a head
start, in which the asker plays but does not learn.

At the end all askers meet all answerers, from the start, the middle and the end of training. The
last line of stdout is one JSON object.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import re
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from warm_up import imitate

import tinsmith
from tinsmith.algorithms.cross_play import CrossPlay, Pairing, cross_play
from tinsmith.algorithms.datums import trajectory_datums
from tinsmith.algorithms.league_plot import plot_cross_play
from tinsmith.algorithms.ratings import score_interval
from tinsmith.algorithms.rollout import Rollouts
from tinsmith.envs import MultiAgentEnv

FEATURES = ("bird", "big")
ANIMALS = {"ostrich": {"bird", "big"}, "wren": {"bird"}, "elephant": {"big"}, "mouse": set()}
WHEN = {2: ("start", "end"), 3: ("start", "middle", "end")}
QUESTIONS = len(FEATURES)
AGENTS = ("asker", "answerer")


def facts(animal: str) -> str:
    return ", ".join(f"{f}? {'yes' if f in ANIMALS[animal] else 'no'}" for f in FEATURES)


RULES = (
    "I think of an animal. "
    + "; ".join(f"{facts(animal)}: {animal}" for animal in ANIMALS)
    + f". Ask {QUESTIONS} times, {' or '.join(f'{f}?' for f in FEATURES)} Then name the animal."
)


class TwentyQuestions(MultiAgentEnv):
    """The asker's first turns are questions (`big?`), the last is a guess (`wren`). What is neither
    is a question wasted or a guess that fails. The environment checks the answers, and the asker
    hears no more of them than yes or no.

    Consecutive seeds have different animals: a batch with all of them equally often does not pay
    for naming one of them more than the others."""

    possible_agents = AGENTS

    def reset(self, *, seed=None, options=None):
        animals = list(ANIMALS)
        self.animal = random.choice(animals) if seed is None else animals[seed % len(animals)]
        self.left = QUESTIONS
        self.truths: list[bool] = []
        return {"asker": RULES}, {}

    def step(self, actions):
        if "asker" in actions:
            return self.asked(actions["asker"])
        return self.answered(actions["answerer"])

    def asked(self, text: str):
        words = {w for w in re.findall("[a-z]+", text.lower()) if w in ANIMALS or w in FEATURES}
        if not self.left:
            return self.judged(found=words == {self.animal})
        self.left -= 1
        if len(words) != 1 or not words <= set(FEATURES):
            return {"asker": "?"}, {}, {}, {}, {}
        (self.feature,) = words
        about = "" if self.truths else f"You are the {self.animal}. {facts(self.animal)}. "
        return {"answerer": f"{about}Answer yes or no. {self.feature}?"}, {}, {}, {}, {}

    def judged(self, found: bool):
        infos = {"asker": {"found": found}, "answerer": {"truths": self.truths}}
        return {}, {"asker": float(found)}, dict.fromkeys(AGENTS, True), {}, infos

    def answered(self, text: str):
        said = re.match(r"\W*(yes|no)\b", text.lower())
        heard = said[1] if said else "?"
        true = heard == ("yes" if self.feature in ANIMALS[self.animal] else "no")
        self.truths.append(true)
        brief = text.strip().lower() == heard
        return {"asker": heard}, {"answerer": true - 0.2 * (not brief)}, {}, {}, {}


def careless_asker(messages, rng: random.Random) -> str:
    """Asks at random, and heeds every other time what it has heard."""
    said = [m["content"] for m in messages if m["role"] == "assistant"]
    heard = [m["content"] for m in messages if m["role"] == "user"][1:]
    if len(said) < QUESTIONS:
        return rng.choice(FEATURES) + "?"
    answers = {
        question.removesuffix("?"): answer for question, answer in zip(said, heard, strict=True)
    }
    fitting = [
        animal
        for animal, features in ANIMALS.items()
        if all((f in features) == (answer == "yes") for f, answer in answers.items())
    ]
    return rng.choice(fitting if rng.random() < 0.5 else list(ANIMALS))


def careless_answerer(messages, rng: random.Random) -> str:
    """True two times in three."""
    (animal,) = re.findall("You are the ([a-z]+)", messages[0]["content"])
    feature = messages[-1]["content"].split()[-1].removesuffix("?")
    true = rng.random() < 2 / 3
    return "yes" if (feature in ANIMALS[animal]) == true else "no"


def turn_datums(trajectory: tinsmith.Trajectory, advantages: np.ndarray) -> list[tinsmith.Datum]:
    """Datums whose every turn has its own advantage: an answer is true or not by itself."""
    datums, first = [], 0
    for segment in trajectory.segments:
        begins = segment.mask & ~np.concatenate([[False], segment.mask[:-1]])
        turn = first + np.cumsum(begins) - 1
        (datum,) = trajectory_datums(tinsmith.Trajectory([segment], [], True, False, []), 1.0)
        inputs = dict(datum.loss_fn_inputs)
        per_token = np.where(segment.mask, advantages[turn.clip(0)], 0)[
            1 : len(inputs["advantages"]) + 1
        ]
        inputs["advantages"] = per_token.astype(np.float32)
        datums.append(tinsmith.Datum(datum.model_input, inputs))
        first = turn[-1] + 1
    return datums


def main(
    model: Annotated[str, typer.Option(help="folder, name or Hugging Face id")] = (
        "HuggingFaceTB/SmolLM2-135M-Instruct"
    ),
    steps: int = 40,
    minutes: Annotated[float, typer.Option(help="train no longer than this")] = math.inf,
    groups_per_step: Annotated[int, typer.Option(help="animals per step")] = 8,
    group_size: Annotated[int, typer.Option(help="games per animal")] = 8,
    head_start: Annotated[int, typer.Option(help="first steps, of the answerer alone")] = 10,
    max_staleness: Annotated[int, typer.Option(help="0: strictly on-policy")] = 0,
    learning_rate: float = 5e-4,
    rank: int = 16,
    warm_up_games: Annotated[int, typer.Option(help="of scripts, to imitate")] = 128,
    warm_up_steps: int = 12,
    warm_up_learning_rate: float = 1e-3,
    eval_games: Annotated[int, typer.Option(help="of every asker with every answerer")] = 100,
    seed: int = 0,
    out: Annotated[Path | None, typer.Option(help="folder for the picture")] = None,
) -> None:
    options = dict(locals())
    summary = asyncio.run(run(**options))
    print(json.dumps(summary), flush=True)


async def run(
    model, steps, minutes, groups_per_step, group_size, head_start, max_staleness, learning_rate, rank, warm_up_games, warm_up_steps,
    warm_up_learning_rate, eval_games, seed, out,
) -> dict:  # fmt: skip
    tinsmith.envs.register("twenty-questions", TwentyQuestions)
    started = time.monotonic()
    async with tinsmith.connect() as service:
        new_run = service.create_lora_training_client
        runs = {
            agent: await new_run(model, rank=rank, seed=seed, train_unembed=False)
            for agent in AGENTS
        }
        async with await service.create_env_client(model) as workers:

            def play(policies, game_seed: int, sample_seed: int) -> tinsmith.Op[tinsmith.Match]:
                params = tinsmith.SamplingParams(max_tokens=6, seed=sample_seed)
                spec = tinsmith.MatchSpec("twenty-questions", policies, params, seed=game_seed)
                return workers.play_match(spec)

            scripts = {
                "asker": tinsmith.Scripted(careless_asker),
                "answerer": tinsmith.Scripted(careless_answerer),
            }
            games = await asyncio.gather(*(play(scripts, s, s) for s in range(warm_up_games)))
            for agent, training in runs.items():
                transcripts = [game.trajectories[agent].messages for game in games]
                loss = await imitate(
                    training,
                    transcripts,
                    steps=warm_up_steps,
                    learning_rate=warm_up_learning_rate,
                )
                print(f"{agent} imitates careless play: {loss:.2f} nats a token", flush=True)
            snapshots = {agent: [await snapshot(runs[agent])] for agent in AGENTS}
            live = {agent: await runs[agent].live_sampling_client().ready() for agent in AGENTS}

            async def play_one(group: int, member: int) -> tinsmith.Match:
                return await play(
                    live, 1_000 * seed + group, 1_000_000 * seed + 1_000 * group + member
                )

            version = (await runs["asker"].get_info()).version
            async with Rollouts(
                play_one,
                groups_per_step=groups_per_step,
                group_size=group_size,
                max_staleness=max_staleness,
                max_replaced=0,
                version=version,
            ) as rollouts:
                step = 0
                while step < steps and time.monotonic() - started < 60 * minutes:
                    batch = await rollouts.next_batch()
                    rates = {"asker": learning_rate * (step >= head_start)}
                    version = await train(runs, batch, rates | {"answerer": learning_rate})
                    rollouts.advance(version)
                    step += 1
                    if step == steps // 2:
                        for agent in AGENTS:
                            snapshots[agent].append(await snapshot(runs[agent]))
                    report(step, batch, time.monotonic() - started)
            for agent in AGENTS:
                snapshots[agent].append(await snapshot(runs[agent]))
            cross, truths = await meet(play, snapshots, eval_games)
    return summary(cross, truths, model, step, time.monotonic() - started, out)


async def snapshot(training: tinsmith.TrainingClient) -> tinsmith.SamplingClient:
    return await training.save_weights_and_get_sampling_client()


async def train(runs, batch, learning_rates: dict[str, float]) -> int:
    """One step of both runs, at the same time; their version after it."""
    data: dict[str, list[tinsmith.Datum]] = {agent: [] for agent in AGENTS}
    games = sum(len(group) for group in batch)
    for group in batch:
        askers, answerers = group.of("asker"), group.of("answerer")
        for trajectory, reward in zip(askers.trajectories, askers.rewards, strict=True):
            advantage = (reward - askers.rewards.mean()) / games
            data["asker"] += trajectory_datums(trajectory, float(advantage))
        answers = [reward for t in answerers.trajectories for reward in t.rewards]
        for trajectory in answerers.trajectories:
            if trajectory.segments:
                advantages = (np.array(trajectory.rewards) - np.mean(answers)) / games
                data["answerer"] += turn_datums(trajectory, advantages)
    steps = []
    for agent, rate in learning_rates.items():
        if data[agent] and rate > 0:
            runs[agent].forward_backward(data[agent], "cispo", logprobs="loss")
        steps.append(runs[agent].optim_step(tinsmith.AdamParams(rate, grad_clip_norm=1.0)))
    return (await asyncio.gather(*steps))[0].version


def report(step: int, batch, seconds: float) -> None:
    infos = [m.trajectories["asker"].info for group in batch for m in group.matches]
    truths = [
        true
        for group in batch
        for m in group.matches
        for true in m.trajectories["answerer"].info.get("truths", [])
    ]
    print(
        f"step {step:3d}  found {np.mean([i.get('found', False) for i in infos]):.2f}  "
        f"true answers {np.mean(truths or [0]):.2f}  {seconds:4.0f} s",
        flush=True,
    )


async def meet(play, snapshots, games: int) -> tuple[CrossPlay, dict[str, list[bool]]]:
    """Askers of the start, the middle and the end against answerers of the same, and what share
    of every answerer's answers was true."""
    players = {
        f"{agent} {when}": policy
        for agent in AGENTS
        for when, policy in zip(WHEN[len(snapshots[agent])], snapshots[agent], strict=True)
    }
    truths: dict[str, list[bool]] = {name: [] for name in players}

    async def play_pair(pairing: Pairing) -> float:
        policies = {"asker": players[pairing.first], "answerer": players[pairing.second]}
        match = await play(policies, 1_000_000 + pairing.seed, pairing.seed)
        truths[pairing.second] += match.trajectories["answerer"].info.get("truths", [])
        return float(match.trajectories["asker"].info.get("found", False))

    askers, answerers = ([n for n in players if n.startswith(agent + " ")] for agent in AGENTS)
    return await cross_play(play_pair, askers, answerers, games=games), truths


def summary(cross: CrossPlay, truths, model: str, steps: int, seconds: float, out) -> dict:
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        plot_cross_play(
            cross,
            out / "twenty_questions.png",
            title="twenty questions: animals found",
            row_role="asker",
            column_role="answerer",
            measure="share found",
        )
    for asker, row in zip(cross.rows, cross.score, strict=True):
        print(f"{asker:14s}" + "".join(f"{cell:7.2f}" for cell in row))

    def found(i: int) -> list[float]:
        return [float(table[i, i]) for table in (cross.score, cross.low, cross.high)]

    def true(name: str) -> list[float] | None:
        answers = truths[name]
        if not answers:
            return None
        return [float(np.mean(answers)), *score_interval(sum(answers), len(answers))]

    return {
        "name": "twenty_questions",
        "model": model,
        "steps": steps,
        "seconds": round(seconds, 1),
        "found": {"before": found(0), "after": found(-1)},
        "true_answers": {"before": true("answerer start"), "after": true("answerer end")},
        "cross_play": cross.to_json(),
    }


if __name__ == "__main__":
    typer.run(main)
