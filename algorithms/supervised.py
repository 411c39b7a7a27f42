"""Supervised fine-tuning: cross-entropy on the answers of conversations or completions.

Full-sequence maximum likelihood on demonstrations, as in Ouyang et al., "Training language models
to follow instructions with human feedback", 2022, section 3.5, with LoRA adapters (Hu et al., 2021).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student_t

from ..primitives.client import ServiceClient, TrainingClient, load_tokenizer
from ..primitives.op import Op
from ..primitives.types import Datum, ForwardBackwardOutput, TrainingInfo
from .chat_data import (
    Example,
    ExampleMaker,
    count_examples,
    end_tokens,
    fingerprint,
    trained_tokens,
)
from .fit import FitResult, FitWatcher, Objective, Prepare, Prepared, resume_fit, split, start_fit
from .fit_config import SupervisedConfig
from .rows import DataReport, Source, collect, given_or_named


async def train_supervised(
    service: ServiceClient,
    config: SupervisedConfig,
    rows: Source | None = None,
    validation_rows: Source | None = None,
    *,
    run_dir: str | Path | None = None,
    watch: FitWatcher | None = None,
) -> FitResult:
    """Start a run on `rows` (default: `config.data`). `run_dir` defaults to `<home>/runs/<run id>`.

    Ctrl-C and SIGTERM end it with a checkpoint, after the steps under way.

    Raises:
        InvalidInput: the config or the data cannot be used.
        NotFound: there is no such model, checkpoint or file.
    """
    prepare = _prepare(config, rows, validation_rows)
    about = {"algorithm": "supervised", "data": config.data or "rows given in code"}
    return await start_fit(service, config, prepare, about=about, run_dir=run_dir, watch=watch)


async def resume_supervised(
    service: ServiceClient,
    run_dir: str | Path,
    rows: Source | None = None,
    validation_rows: Source | None = None,
    *,
    steps: int | None = None,
    watch: FitWatcher | None = None,
) -> FitResult:
    """Go on with the run in `run_dir` from its last checkpoint, as if it had not stopped; `steps`
    sets another end. Rows that were given in code must be given again.

    Raises:
        NotFound: there is no such run in `run_dir`, or the service does not know it.
        InvalidInput: the data is no longer the same.
    """

    def prepare(config: SupervisedConfig) -> Prepare[Example]:
        return _prepare(config, rows, validation_rows)

    return await resume_fit(service, run_dir, SupervisedConfig, prepare, steps=steps, watch=watch)


def load_examples(
    config: SupervisedConfig,
    model_path: str,
    max_context: int,
    rows: Source | None = None,
    validation_rows: Source | None = None,
) -> tuple[list[Example], list[Example], dict[str, DataReport]]:
    """(train, held out, reports) of `rows`, or of the config's files.

    Raises:
        InvalidInput: the data cannot be used.
        NotFound: there is no such file.
    """
    source = given_or_named(rows, config.data, "SupervisedConfig.data")
    tokenizer = load_tokenizer(model_path)
    make = ExampleMaker(
        tokenizer,
        end_tokens(tokenizer, model_path),
        min(config.max_length or max_context, max_context),
        config.train_on,
        config.completions,
        config.too_long,
        config.template_kwargs,
    )
    examples, report = collect(source, make, strict=config.strict)
    reports = {"train": count_examples(report, examples)}
    held_source = config.validation_data if validation_rows is None else validation_rows
    if isinstance(held_source, str) and not held_source:
        return (*split(examples, config.validation, config.seed), reports)
    held_out, held_report = collect(held_source, make, strict=config.strict)
    reports["validation"] = count_examples(held_report, held_out)
    return examples, held_out, reports


def _prepare(
    config: SupervisedConfig, rows: Source | None, validation_rows: Source | None
) -> Prepare[Example]:
    async def prepare(
        training: TrainingClient, info: TrainingInfo, folder: Path
    ) -> Prepared[Example]:
        train, held_out, reports = await asyncio.to_thread(
            load_examples, config, info.model_path, info.max_context_length, rows, validation_rows
        )
        digest = fingerprint(datum for example in train for datum in example.datums)
        return Prepared(Supervised(config.weighting), train, held_out, digest, reports)

    return prepare


# ---- the objective ----


@dataclass(frozen=True)
class Supervised(Objective[Example]):
    """Negative log-likelihood of the trained tokens, averaged over a batch."""

    weighting: str = "token"

    async def submit(
        self, training: TrainingClient, batch: Sequence[Example], step: int
    ) -> Op[ForwardBackwardOutput]:
        datums = weighted(batch, self.weighting)
        return training.forward_backward(datums, "cross_entropy", logprobs="loss")

    def metrics(self, batch: Sequence[Example], output: ForwardBackwardOutput) -> dict[str, float]:
        sums, counts = example_nll(batch, output)
        return {
            "loss": output.metrics["loss:sum"],
            "nll": float(sums.sum() / counts.sum()),
            "trained_tokens": float(counts.sum()),
        }

    async def evaluate(
        self, training: TrainingClient, held_out: Sequence[Example]
    ) -> dict[str, Any]:
        return await held_out_nll(training, held_out)


def weighted(batch: Sequence[Example], weighting: str = "token") -> list[Datum]:
    """The batch's datums with weights that make the summed `cross_entropy` an average: over the
    batch's trained tokens (`token`), or over each example's and then over the examples
    (`example`)."""
    total = sum(example.trained_tokens for example in batch)
    datums = []
    for example in batch:
        share = 1 / total if weighting == "token" else 1 / (len(batch) * example.trained_tokens)
        for datum in example.datums:
            weights = datum.loss_fn_inputs["weights"] * np.float32(share)
            datums.append(Datum(datum.model_input, {**datum.loss_fn_inputs, "weights": weights}))
    return datums


def example_nll(
    examples: Sequence[Example], output: ForwardBackwardOutput
) -> tuple[np.ndarray, np.ndarray]:
    """Per example, the negative log-likelihood of its trained tokens in nats (the cross-entropy of
    soft targets), and their number:
    float64 `[examples]` each. `output` is of the examples' datums, in order."""
    outputs = iter(output.loss_fn_outputs)
    sums, counts = np.zeros(len(examples)), np.zeros(len(examples))
    for i, example in enumerate(examples):
        for datum in example.datums:
            weights = datum.loss_fn_inputs["weights"]
            used = weights != 0
            sums[i] -= (weights * next(outputs)["logprobs"])[used].sum(dtype=np.float64)
            counts[i] += trained_tokens(datum)
    return sums, counts


async def held_out_nll(
    training: TrainingClient, examples: Sequence[Example], batch_size: int = 32
) -> dict[str, Any]:
    """The mean negative log-likelihood per trained token, with its 95% interval over examples."""
    parts = []
    for start in range(0, len(examples), batch_size):
        batch = examples[start : start + batch_size]
        datums = [datum for example in batch for datum in example.datums]
        output = await training.forward(datums, "cross_entropy", logprobs="loss")
        parts.append(example_nll(batch, output))
    sums, counts = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    mean, low, high = ratio_interval(sums, counts)
    return {
        "nll": mean,
        "low": low,
        "high": high,
        "perplexity": float(np.exp(mean)),
        "examples": len(examples),
        "tokens": int(counts.sum()),
    }


def ratio_interval(
    sums: np.ndarray, counts: np.ndarray, confidence: float = 0.95
) -> tuple[float, float | None, float | None]:
    """`sum(sums) / sum(counts)` over N independent examples, and its confidence interval by the
    ratio estimator's linearised variance (Cochran, "Sampling techniques", 1977, eq. 6.9, as for an
    infinite population), None for fewer than two examples."""
    n, ratio = len(sums), float(sums.sum() / counts.sum())
    if n < 2:
        return ratio, None, None
    residuals = sums - ratio * counts
    error = np.sqrt(n / (n - 1) * (residuals**2).sum()) / counts.sum()
    reach = float(student_t.ppf(0.5 + confidence / 2, n - 1) * error)
    return ratio, ratio - reach, ratio + reach
