"""Asynchronous off-policy RL (staleness 8) against synchronous, with slow tools, same samples.

A random two-layer model learns by GRPO to write vowels, three turns an episode; a tool answers
each turn after a lognormally distributed time of mean 1 s (sigma 1). Both sides are
`tinsmith.train` with the same groups, episodes and optimizer steps; `max_staleness` alone differs.
The model is that small so that, as on an accelerator, tools and not two cores are what a
synchronous run waits for. Figures are medians of the seconds that training took, evaluations left
out. Success on 100 held-out episodes (played without delays) is pooled over the runs, with Wilson's
95% interval. Every run of `--runs` takes minutes: half as many pairs are run.
"""

from __future__ import annotations

import asyncio
import math
import os
import random
import statistics
import tempfile
from pathlib import Path

from harness import options, report, say
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, set_seed

import tinsmith
from tinsmith.algorithms.estimates import rate_interval
from tinsmith.algorithms.plot import read_metrics
from tinsmith.envs import Env
from tinsmith.envs.latency import SlowTools

STALENESS = 8
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


class Vowels(Env):
    """Wants vowels, turn after turn. The reward is their share among the characters written,
    averaged over the turns; more than 0.9 is a success."""

    def __init__(self, turns: int) -> None:
        self.turns = turns

    def reset(self, *, seed=None, options=None):
        self.letters = random.Random(seed).choices("abcd", k=self.turns)
        self.shares = []
        return self.letters[0], {}

    def step(self, action):
        self.shares.append(sum(c in "aeiou" for c in action) / max(len(action), 1))
        over = len(self.shares) == self.turns
        observation = "" if over else self.letters[len(self.shares)]
        info = {"success": sum(self.shares) / self.turns > 0.9}
        return observation, self.shares[-1] / self.turns, over, False, info


@tinsmith.envs.register("slow-vowels")
def slow_vowels(turns: int = 3, mean: float = 1.0):
    return SlowTools(Vowels(turns), mean=mean, sigma=1.0)


def tiny_like(model: str, folder: Path) -> str:
    """A random two-layer model of that family, with a token for every letter."""
    special = ["<end>", "<user>", "<assistant>", "<unknown>"]
    vocabulary = {token: i for i, token in enumerate([*special, *"abcdefghijklmnopqrstuvwxyz"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<end>",
        unk_token="<unknown>",
        additional_special_tokens=special[1:3],
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    config = AutoConfig.from_pretrained(model)
    config.update(
        dict(
            vocab_size=len(vocabulary),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=256,
            initializer_range=0.2,
            eos_token_id=0,
            bos_token_id=None,
            pad_token_id=None,
        )
    )
    config.layer_types = None
    set_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


def config(model: str, max_staleness: int, quick: bool, seed: int) -> tinsmith.TrainConfig:
    return tinsmith.TrainConfig(
        model=model,
        env="slow-vowels",
        env_kwargs={"mean": 0.01 if quick else 1.0},
        eval_env_kwargs={"mean": 0.0},
        rank=8,
        learning_rate=3e-3,
        steps=3 if quick else 25,
        groups_per_step=2 if quick else 4,
        group_size=4 if quick else 8,
        max_staleness=max_staleness,
        max_replaced=0,  # the same samples on both sides
        max_tokens=4,
        step_seconds=120.0,
        num_env_workers=1 if quick else 5,
        eval_episodes=8 if quick else 100,
        checkpoint_every=1000,
        seed=seed,
    )


async def main() -> None:
    chosen = options(__doc__)
    pairs = math.ceil(chosen.runs / 2)  # of minutes each
    results: dict[str, list[tinsmith.TrainResult]] = {"async": [], "sync": []}
    with tempfile.TemporaryDirectory() as home:
        model = tiny_like(chosen.model, Path(home) / "models" / "tiny")
        async with tinsmith.connect(
            home=home, num_cpus=os.cpu_count(), kv_bytes=1 << 27
        ) as service:
            for pair in range(pairs):
                for side, max_staleness in (("async", STALENESS), ("sync", 0)):
                    settings = config(model, max_staleness, chosen.quick, seed=pair)
                    result = await tinsmith.train(service, settings)
                    results[side].append(result)
                    say(f"pair {pair + 1}, {side}: {describe(result)}")
        learned = {side: [seconds_to(0.8, run) for run in runs] for side, runs in results.items()}
    seconds = {side: [r.totals["seconds"] for r in runs] for side, runs in results.items()}
    ours, theirs = (statistics.median(seconds[side]) for side in ("async", "sync"))
    report(
        "s",
        ours,
        theirs,
        theirs / ours,
        pairs,
        success={side: success(runs) for side, runs in results.items()},
        seconds_to_reward_08=learned,
    )


def steps_of(result: tinsmith.TrainResult) -> list[dict[str, float]]:
    return [row for row in read_metrics(result.run_dir) if "batch_reward" in row]


def describe(result: tinsmith.TrainResult) -> str:
    rows = steps_of(result)
    shown = rows[:: max(len(rows) // 8, 1)]
    staleness = [row["staleness_mean"] for row in rows]
    return (
        f"{result.totals['seconds']:.1f} s; staleness {statistics.mean(staleness):.1f} on average, "
        f"{max(row['staleness_max'] for row in rows)} at most; rewards "
        f"{', '.join(format(row['batch_reward'], '.2f') for row in shown)}; "
        f"success {result.before.rate:.3f} before, {result.after.rate:.3f} after"
    )


def seconds_to(reward: float, result: tinsmith.TrainResult) -> float | None:
    """Until the first batch of that mean reward; None if there was none."""
    reached = (r["seconds"] for r in steps_of(result) if r["batch_reward"] >= reward)
    return next((round(seconds, 1) for seconds in reached), None)


def success(runs: list[tinsmith.TrainResult]) -> list[float]:
    """Low end, rate and high end over all runs' held-out episodes."""
    episodes = sum(run.after.episodes for run in runs)
    found = rate_interval(sum(run.after.successes for run in runs), episodes)
    return [round(x, 3) for x in (found.low, found.value, found.high)]


if __name__ == "__main__":
    asyncio.run(main())
