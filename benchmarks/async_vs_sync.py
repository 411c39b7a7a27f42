"""Asynchronous off-policy RL (staleness 8) against synchronous, with slow tools, same samples.

A random two-layer model learns by GRPO to take a dictation over several turns: the tool names a
letter, the model writes it, the tool answers after a lognormally distributed time of mean 1 s
(sigma 1). Both sides are `tinsmith.train` with the same groups, episodes and optimizer steps;
`max_staleness` alone differs. The model is that small so that, as on an accelerator, tools and not
the two cores are what a synchronous run waits for. Figures are medians of the seconds that training
took, evaluations left out; success on held-out episodes (played without delays) is pooled over
the runs, with Wilson's 95% interval.
"""

from __future__ import annotations

import asyncio
import os
import random
import statistics
import tempfile
from pathlib import Path

from harness import options, report, say
from scipy.stats import binomtest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, set_seed

import tinsmith
from tinsmith.algorithms.plot import read_metrics
from tinsmith.envs import Env
from tinsmith.envs.latency import SlowTools

STALENESS = 8
LETTERS = "abcd"
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


class Dictation(Env):
    """Every turn names a letter; the reward is the share of the characters written that are it,
    averaged over the turns."""

    def __init__(self, turns: int) -> None:
        self.turns = turns

    def reset(self, *, seed=None, options=None):
        self.letters = random.Random(seed).choices(LETTERS, k=self.turns)
        self.shares = []
        return self.letters[0], {}

    def step(self, action):
        turn = len(self.shares)
        self.shares.append(action.count(self.letters[turn]) / max(len(action), 1))
        over = turn + 1 == self.turns
        mean = sum(self.shares) / self.turns
        info = {"success": over and mean > 0.9}
        return (
            "" if over else self.letters[turn + 1],
            self.shares[-1] / self.turns,
            over,
            False,
            info,
        )


@tinsmith.envs.register("slow-dictation")
def slow_dictation(turns: int = 3, mean: float = 1.0):
    return SlowTools(Dictation(turns), mean=mean, sigma=1.0)


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
        env="slow-dictation",
        env_kwargs={"mean": 0.01 if quick else 1.0},
        eval_env_kwargs={"mean": 0.0},
        rank=8,
        learning_rate=1e-2,
        steps=3 if quick else 30,
        groups_per_step=2 if quick else 4,
        group_size=4 if quick else 8,
        max_staleness=max_staleness,
        max_replaced=0,  # the same samples on both sides
        max_tokens=4,
        num_env_workers=1 if quick else 5,
        eval_episodes=8 if quick else 200,
        checkpoint_every=1000,
        seed=seed,
    )


async def main() -> None:
    chosen = options(__doc__)
    results: dict[str, list[tinsmith.TrainResult]] = {"async": [], "sync": []}
    with tempfile.TemporaryDirectory() as home:
        model = tiny_like(chosen.model, Path(home) / "models" / "tiny")
        async with tinsmith.connect(
            home=home, num_cpus=os.cpu_count(), kv_bytes=1 << 27
        ) as service:
            for run in range(chosen.runs):
                for side, max_staleness in (("async", STALENESS), ("sync", 0)):
                    settings = config(model, max_staleness, chosen.quick, run)
                    result = await tinsmith.train(service, settings)
                    results[side].append(result)
                    say(f"run {run}, {side}: {describe(result)}")
    seconds = {side: [r.totals["seconds"] for r in runs] for side, runs in results.items()}
    ours, theirs = (statistics.median(seconds[side]) for side in ("async", "sync"))
    report(
        "s",
        ours,
        theirs,
        theirs / ours,
        chosen.runs,
        success={side: success(runs) for side, runs in results.items()},
    )


def describe(result: tinsmith.TrainResult) -> str:
    rows = [row for row in read_metrics(result.run_dir) if "reward" in row]
    batch_rewards = ", ".join(
        f"{row['batch_reward']:.2f}" for row in rows[:: max(len(rows) // 8, 1)]
    )
    mean = statistics.mean(row["staleness_mean"] for row in rows)
    most = max(row["staleness_max"] for row in rows)
    return (
        f"{result.totals['seconds']:.1f} s, staleness {mean:.1f} on average, {most} at most; "
        f"rewards {batch_rewards}; success {result.before.rate:.3f} to {result.after.rate:.3f}"
    )


def success(runs: list[tinsmith.TrainResult]) -> list[float]:
    """Low end, rate and high end over all runs' held-out episodes."""
    episodes = sum(run.after.episodes for run in runs)
    found = binomtest(sum(run.after.successes for run in runs), episodes)
    interval = found.proportion_ci(method="wilson")
    return [round(x, 3) for x in (interval.low, found.statistic, interval.high)]


if __name__ == "__main__":
    asyncio.run(main())
