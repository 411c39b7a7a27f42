"""Study: formal proofs (after Goedel-Prover). A small model learns to write proofs that Agda accepts.

1. Supervised fine-tuning, LoRA on a fifth of the proofs against every parameter on all of them,
   the same number of examples seen: pass@1 and pass@32 on theorems that neither has seen.
2. Self-correction: the LoRA model sees Agda's message about its failed attempt and tries again. It
   learns that from its own attempts only: a failed one, the message, and one that Agda accepted.

    python -m examples.studies.proofs.train                  # SmolLM2-135M, 2 cores
    python -m examples.studies.proofs.train --preset gpu --model Qwen/Qwen3-8B
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import typer
from rich.console import Console
from rich.progress import track

import tinsmith
from tinsmith.algorithms.estimates import Estimate, mean_interval, pass_at_k

from .agda import Agda, Verdict
from .full import train_all_parameters
from .logic import Theorem, theorems

console = Console(stderr=True)

FEW_SHOTS = """Proofs in propositional logic. `fst` and `snd` take a pair apart, `(a , b)` makes one,
`inl` and `inr` prove a disjunction, `either f g` uses one, `absurd` proves all from False.

Theorem: P & Q -> P
Proof: fst

Theorem: P -> Q or P
Proof: inr

Theorem: (P -> Q) -> (Q -> R) -> P -> R
Proof: \\ a b c -> b (a c)

Theorem: P or Q -> Q or P
Proof: either inr inl

"""


@dataclass(frozen=True)
class Settings:
    """`epochs` are the LoRA run's; the full-parameter run takes a fifth of them on five times the
    proofs. `corrections`: the most of them to learn from."""

    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    theorems: int = 600
    held_out: int = 64
    atoms: int = 3
    sizes: tuple[int, int] = (3, 6)
    longest: int = 56
    epochs: int = 5
    batch_size: int = 16
    rank: int = 32
    learning_rate: float = 1e-3
    full_learning_rate: float = 1e-4
    samples: int = 32
    correction_attempts: int = 4
    corrections: int = 400
    correction_epochs: int = 1
    max_tokens: int = 48
    seed: int = 0


PRESETS = {
    "laptop": Settings(),
    "gpu": Settings(
        theorems=20_000,
        held_out=400,
        atoms=5,
        sizes=(4, 12),
        longest=160,
        rank=64,
        batch_size=64,
        learning_rate=2e-4,
        full_learning_rate=1e-5,
        correction_attempts=8,
        corrections=20_000,
        max_tokens=160,
    ),
}


@dataclass(frozen=True)
class Attempt:
    theorem: Theorem
    proof: str
    verdict: Verdict


def ask(theorem: Theorem) -> str:
    return f"Theorem: {theorem.statement}\nProof:"


def ask_again(attempt: Attempt) -> str:
    return f"{ask(attempt.theorem)} {attempt.proof}\nError: {attempt.verdict.message}\nProof:"


class Study:
    """The parts of the study, for one tokenizer, sampler settings and Agda."""

    def __init__(self, settings: Settings, tokenizer: Any, agda: Agda) -> None:
        self.settings = settings
        self.tokenizer = tokenizer
        self.agda = agda

    def tokens(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def example(self, prompt: str, proof: str) -> tuple[list[int], list[int]]:
        return self.tokens(prompt), self.tokens(f" {proof}\n")

    async def attempts(
        self,
        policy: tinsmith.SamplingClient,
        theorem: Theorem,
        prompt: str,
        samples: int,
        seed: int = 0,
    ) -> list[Attempt]:
        params = tinsmith.SamplingParams(
            max_tokens=self.settings.max_tokens, stop=["\n"], seed=self.settings.seed + seed
        )
        response = await policy.sample(self.tokens(prompt), samples, params)
        proofs = [
            self.tokenizer.decode(s.tokens, skip_special_tokens=True).strip()
            for s in response.sequences
        ]
        verdicts = await asyncio.gather(
            *(self.agda.check(theorem.statement, proof) for proof in proofs)
        )
        return [Attempt(theorem, p, v) for p, v in zip(proofs, verdicts, strict=True)]

    async def attempts_at_all(
        self,
        policy: tinsmith.SamplingClient,
        given: Sequence[Theorem],
        samples: int,
        before: str,
        what: str,
    ) -> list[list[Attempt]]:
        under_way = [
            asyncio.ensure_future(self.attempts(policy, t, before + ask(t), samples)) for t in given
        ]
        return [await attempts for attempts in track(under_way, what, console=console)]

    async def fine_tune(
        self,
        training: tinsmith.TrainingClient,
        examples: Sequence[tuple[list[int], list[int]]],
        epochs: int,
        what: str,
    ) -> None:
        """Cross-entropy on the completions' tokens, its mean per batch; linear decay to 0."""
        settings, generator = self.settings, random.Random(self.settings.seed)
        batches = []
        for _ in range(epochs):
            order = generator.sample(range(len(examples)), len(examples))
            batches += [
                [examples[i] for i in order[start : start + settings.batch_size]]
                for start in range(0, len(order), settings.batch_size)
            ]
        for step, batch in enumerate(track(batches, what, console=console)):
            weight = 1 / sum(len(completion) for _, completion in batch)
            datums = [datum(*example, weight) for example in batch]
            rate = settings.learning_rate * (1 - step / len(batches))
            adam = tinsmith.AdamParams(rate, grad_clip_norm=1.0)
            training.forward_backward(datums, "cross_entropy", logprobs="loss")
            await training.optim_step(adam)


def datum(prompt: list[int], completion: list[int], weight: float) -> tinsmith.Datum:
    """Position t predicts token t + 1: the completion's tokens weigh, the prompt's do not."""
    tokens = prompt + completion
    weights = [0.0] * (len(prompt) - 1) + [weight] * len(completion)
    return tinsmith.Datum(tokens[:-1], {"target_tokens": tokens[1:], "weights": weights})


def pass_rates(attempts_T: Sequence[Sequence[Attempt]]) -> dict[str, Estimate]:
    """Unbiased pass@1 and pass@n with 95% bootstrap intervals over the theorems."""
    right = [sum(attempt.verdict.holds for attempt in attempts) for attempts in attempts_T]
    samples = len(attempts_T[0])
    return {
        f"pass@{k}": mean_interval([pass_at_k(r, samples, k) for r in right])
        for k in (1, 2, samples)
    }


async def self_corrected(
    study: Study,
    policy: tinsmith.SamplingClient,
    attempts_T: Sequence[Sequence[Attempt]],
    what: str,
) -> Estimate:
    """Success with one more try after Agda's message, per first attempt."""

    async def outcome(number: int, attempt: Attempt) -> bool:
        if attempt.verdict.holds:
            return True
        (again,) = await study.attempts(policy, attempt.theorem, ask_again(attempt), 1, number + 1)
        return again.verdict.holds

    under_way = [
        asyncio.ensure_future(asyncio.gather(*(outcome(*a) for a in enumerate(attempts[:8]))))
        for attempts in attempts_T
    ]
    rates = [np.mean(await outcomes) for outcomes in track(under_way, what, console=console)]
    return mean_interval(rates)


def corrections(attempts_T: Sequence[Sequence[Attempt]]) -> list[tuple[str, str]]:
    """(prompt with a failed attempt and its message, a proof of the same theorem that held), one
    per failed attempt of a theorem that was also proved."""
    pairs = []
    for attempts in attempts_T:
        right = sorted({a.proof for a in attempts if a.verdict.holds}, key=len)
        wrong = {a.proof: a for a in attempts if not a.verdict.holds}
        if right:
            pairs += [(ask_again(attempt), right[0]) for attempt in wrong.values()]
    return pairs


async def run(settings: Settings, folder: Path) -> dict[str, Any]:
    async with tinsmith.connect() as service, Agda() as agda:
        training = await service.create_lora_training_client(
            settings.model, rank=settings.rank, seed=settings.seed, train_unembed=False
        )
        study = Study(settings, training.get_tokenizer(), agda)
        drawn = islice(
            theorems(
                settings.seed,
                atoms_used=settings.atoms,
                sizes=settings.sizes,
                lengths=(14, settings.longest),
            ),
            settings.theorems + settings.held_out,
        )
        known = list(drawn)
        verdicts = await asyncio.gather(*(agda.check(t.statement, t.proof) for t in known))
        known = [t for t, verdict in zip(known, verdicts, strict=True) if verdict.holds]
        held_out, rest = known[: settings.held_out], known[settings.held_out :]
        fifth, others = rest[: len(rest) // 5], rest[len(rest) // 5 :]
        console.print(
            f"{len(rest)} theorems with proofs that Agda accepts, {len(held_out)} held out"
        )
        results: dict[str, Any] = {}

        base = await service.create_sampling_client(base_model=settings.model)
        before = await study.attempts_at_all(
            base, held_out, settings.samples, FEW_SHOTS, "base model, few-shot"
        )
        results["base, few-shot"] = pass_rates(before)
        show(results)

        examples = [study.example(ask(t), t.proof) for t in rest]
        started = time.monotonic()
        await study.fine_tune(training, examples[: len(fifth)], settings.epochs, "LoRA SFT")
        results["LoRA seconds"] = time.monotonic() - started
        lora = await training.save_weights_and_get_sampling_client()
        after = await study.attempts_at_all(lora, held_out, settings.samples, "", "LoRA")
        results["LoRA on a fifth"] = pass_rates(after)
        show(results)

        tried = await study.attempts_at_all(
            lora, others, settings.correction_attempts, "", "attempts to learn correction from"
        )
        untaught = await self_corrected(study, lora, after, "correction before learning it")
        found = corrections(tried)
        chosen = random.Random(settings.seed).sample(found, min(settings.corrections, len(found)))
        pairs = [study.example(*pair) for pair in chosen]
        console.print(f"{len(pairs)} corrections to learn from")
        mixed = pairs + examples[: len(fifth)]
        await study.fine_tune(training, mixed, settings.correction_epochs, "learning correction")
        corrector = await training.save_weights_and_get_sampling_client()
        first = await study.attempts_at_all(corrector, held_out, settings.samples, "", "first try")
        taught = await self_corrected(study, corrector, first, "correction")
        results["corrector, first try"] = pass_rates(first)
        results["self-correction"] = {"before learning it": untaught, "after": taught}
        show(results)
        await training.save_state("final")

        started = time.monotonic()
        path = await asyncio.to_thread(
            train_all_parameters,
            str(tinsmith.resolve_model(settings.model, service.home)),
            examples,
            folder / "full",
            epochs=max(1, math.ceil(settings.epochs / 5)),
            batch_size=settings.batch_size,
            learning_rate=settings.full_learning_rate,
            seed=settings.seed,
        )
        results["full seconds"] = time.monotonic() - started
        full = await service.create_sampling_client(base_model=path)
        results["all parameters on all"] = pass_rates(
            await study.attempts_at_all(full, held_out, settings.samples, "", "all parameters")
        )
        show(results)
    return {"settings": asdict(settings), **plain(results)}


def show(results: dict[str, Any]) -> None:
    name, rates = list(results.items())[-1]
    told = ", ".join(f"{k} {e.value:.3f} ({e.low:.3f} to {e.high:.3f})" for k, e in rates.items())
    console.print(f"{name}: {told}", highlight=False)


def plain(results: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value if isinstance(value, float) else {k: asdict(e) for k, e in value.items()}
        for name, value in results.items()
    }


def main(
    preset: Literal["laptop", "gpu"] = "laptop",
    model: Annotated[str | None, typer.Option(help="folder, name or Hugging Face id")] = None,
    theorems: Annotated[int | None, typer.Option(help="to train on")] = None,
    held_out: int | None = None,
    samples: Annotated[int | None, typer.Option(help="n of pass@n")] = None,
    epochs: int | None = None,
    seed: int | None = None,
    folder: Annotated[Path | None, typer.Option(help="for the full-parameter model")] = None,
) -> None:
    given = dict(
        model=model,
        theorems=theorems,
        held_out=held_out,
        samples=samples,
        epochs=epochs,
        seed=seed,
    )
    settings = replace(PRESETS[preset], **{k: v for k, v in given.items() if v is not None})
    with tempfile.TemporaryDirectory() as temporary:
        print(json.dumps(asyncio.run(run(settings, folder or Path(temporary)))), flush=True)


if __name__ == "__main__":
    typer.run(main)
