"""Learning from preferences between answers, without a reward model: DPO, IPO, KTO.

The losses are in `preference_losses.py`. The reference is the policy as it starts; each answer's
logprob under it is computed once, by a sampler.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..primitives.client import SamplingClient, ServiceClient, TrainingClient
from ..primitives.errors import InvalidInput
from ..primitives.op import Op
from ..primitives.types import Datum, ForwardBackwardOutput, Message, TrainingInfo
from . import preference_losses
from .chat_data import (
    AnswerRenderer,
    answer_datum,
    answer_messages,
    fingerprint,
    messages_of,
    prompt_messages,
    trained_tokens,
)
from .estimates import rate_interval
from .fit import (
    FitResult,
    FitWatcher,
    Objective,
    Prepare,
    Prepared,
    gather_bounded,
    resume_fit,
    split,
    start_fit,
)
from .fit_config import PreferenceConfig
from .rows import DataReport, Source, TooLong, collect, given_or_named

REFERENCE = "reference.npy"


@dataclass(frozen=True, eq=False)
class Comparison:
    """Answers whose logprobs a loss compares, as datums with weight 1 on their tokens, and the
    logprobs of these answers under the reference, float64 `[answers]`.

    Of a pair: the chosen and the rejected answer. For KTO: an answer, `desirable` or not, and the
    next row's answer to this row's prompt.
    """

    row: int
    datums: tuple[Datum, ...]
    desirable: bool = True
    reference: np.ndarray | None = None


async def train_preferences(
    service: ServiceClient,
    config: PreferenceConfig,
    rows: Source | None = None,
    *,
    run_dir: str | Path | None = None,
    watch: FitWatcher | None = None,
) -> FitResult:
    """Start a run on `rows` (default: `config.data`): `{"prompt" or "messages", "chosen",
    "rejected"}`, for KTO `{"prompt" or "messages", "completion", "label"}`.

    Raises:
        InvalidInput: the config or the data cannot be used.
        NotFound: there is no such model, checkpoint or file.
    """
    about = {"algorithm": config.loss, "data": config.data or "rows given in code"}
    return await start_fit(
        service, config, _prepare(config, rows), about=about, run_dir=run_dir, watch=watch
    )


async def resume_preferences(
    service: ServiceClient,
    run_dir: str | Path,
    rows: Source | None = None,
    *,
    steps: int | None = None,
    watch: FitWatcher | None = None,
) -> FitResult:
    """Go on with the run in `run_dir` from its last checkpoint, as `resume_supervised` does."""

    def prepare(config: PreferenceConfig) -> Prepare[Comparison]:
        return _prepare(config, rows)

    return await resume_fit(service, run_dir, PreferenceConfig, prepare, steps=steps, watch=watch)


def _prepare(config: PreferenceConfig, rows: Source | None) -> Prepare[Comparison]:
    async def prepare(
        training: TrainingClient, info: TrainingInfo, folder: Path
    ) -> Prepared[Comparison]:
        renderer = AnswerRenderer.from_model(info.model_path, config.template_kwargs)
        comparisons, report = await asyncio.to_thread(
            load_comparisons, config, renderer, info.max_context_length, rows
        )
        digest = fingerprint(datum for c in comparisons for datum in c.datums)
        if info.version == 0 or not (folder / REFERENCE).exists():
            policy = await training.save_weights_and_get_sampling_client()
            comparisons = await with_reference(policy, comparisons)
            np.save(folder / REFERENCE, np.array([c.reference for c in comparisons]))
        else:  # going on: the policy is no longer the one that it started as
            kept = np.load(folder / REFERENCE)
            if len(kept) == len(comparisons):
                pairs = zip(comparisons, kept, strict=True)
                comparisons = [replace(c, reference=reference) for c, reference in pairs]
        train, held_out = split(comparisons, config.validation, config.seed)
        return Prepared(Preferences(config), train, held_out, digest, {"train": report})

    return prepare


# ---- data ----


def prompt_of(row: Any) -> list[Message]:
    """The messages that a row's answers answer: its `prompt`, a text or messages, or `messages`.

    Raises:
        InvalidInput: there are none.
    """
    if not isinstance(row, Mapping):
        raise InvalidInput(f"a row must be an object, got {type(row).__name__}")
    if row.get("prompt") is not None:
        return prompt_messages(row["prompt"])
    if row.get("messages") is not None:
        return messages_of(row["messages"])
    raise InvalidInput(f"a row needs a prompt or messages; it has {', '.join(row) or 'nothing'}")


def answer_of(row: Any, name: str) -> Message:
    """The answer that a row calls `name`: a text, or messages that end with the answer.

    Raises:
        InvalidInput: it is missing, or no answer of the assistant.
    """
    if row.get(name) is None:
        raise InvalidInput(f"a row needs {name}; it has {', '.join(row)}")
    answer = answer_messages(row[name])[-1]
    if answer["role"] != "assistant":
        raise InvalidInput(f"{name} must end with the assistant's answer, not {answer['role']}'s")
    return answer


@dataclass(frozen=True)
class Judged:
    """A row as messages: an answer (of a pair, the chosen one) and the other one."""

    row: int
    prompt: list[Message]
    answer: Message
    other: Message | None = None
    desirable: bool = True


def judged_pair(number: int, row: Any) -> Judged:
    """`{"prompt" or "messages", "chosen", "rejected"}`. Where a row has no prompt, it is what
    `chosen` says before its last message, as in many public data sets."""
    if isinstance(row, Mapping) and row.get("prompt") is None and row.get("messages") is None:
        chosen = row.get("chosen")
        if isinstance(chosen, list) and len(chosen) > 1:
            row = {**row, "messages": chosen[:-1]}
    prompt = prompt_of(row)
    chosen, rejected = answer_of(row, "chosen"), answer_of(row, "rejected")
    if chosen["content"] == rejected["content"]:
        raise InvalidInput("chosen and rejected are the same")
    return Judged(number, prompt, chosen, rejected)


def judged_answer(number: int, row: Any) -> Judged:
    """`{"prompt" or "messages", "completion", "label"}`."""
    prompt, answer = prompt_of(row), answer_of(row, "completion")
    if row.get("label") not in (True, False):
        raise InvalidInput(f"label must be true or false, got {row.get('label')!r}")
    return Judged(number, prompt, answer, desirable=bool(row["label"]))


def load_comparisons(
    config: PreferenceConfig,
    renderer: AnswerRenderer,
    max_context: int,
    rows: Source | None = None,
) -> tuple[list[Comparison], DataReport]:
    """The comparisons of `rows`, or of the config's file, without reference logprobs.

    Raises:
        InvalidInput: the data cannot be used.
        NotFound: there is no such file.
    """
    source = given_or_named(rows, config.data, "PreferenceConfig.data")
    limit = min(config.max_length or max_context, max_context)

    def datum(judged: Judged, answer: Message) -> Datum:
        made = answer_datum(renderer, judged.prompt, answer)
        if made.model_input.length >= limit:
            raise TooLong(f"{made.model_input.length + 1} tokens; at most {limit} fit")
        return made

    def pair(number: int, row: Any) -> Comparison:
        judged = judged_pair(number, row)
        assert judged.other is not None
        answers = (datum(judged, judged.answer), datum(judged, judged.other))
        return Comparison(number, answers)

    def single(number: int, row: Any) -> tuple[Judged, Datum]:
        judged = judged_answer(number, row)
        return judged, datum(judged, judged.answer)

    if config.loss != "kto":
        comparisons, report = collect(source, pair, strict=config.strict)
    else:
        singles, report = collect(source, single, strict=config.strict)
        if len(singles) < 2:
            raise InvalidInput("KTO needs at least two rows: it answers one's prompt by another's")
        following = [*singles[1:], singles[0]]
        comparisons = [
            Comparison(
                judged.row,
                (own, answer_datum(renderer, judged.prompt, other.answer)),
                judged.desirable,
            )
            for (judged, own), (other, _) in zip(singles, following, strict=True)
        ]
    report.datums = sum(len(c.datums) for c in comparisons)
    report.tokens = sum(d.model_input.length + 1 for c in comparisons for d in c.datums)
    report.trained_tokens = sum(trained_tokens(d) for c in comparisons for d in c.datums)
    return comparisons, report


# ---- logprobs of answers ----


async def answer_logprobs(policy: SamplingClient, datums: Sequence[Datum]) -> np.ndarray:
    """The summed logprob of every datum's weighted tokens under a sampler's policy, float64
    `[datums]`."""

    async def one(datum: Datum) -> float:
        used = datum.loss_fn_inputs["weights"] != 0
        tokens = np.append(datum.model_input.tokens, datum.loss_fn_inputs["target_tokens"][-1])
        last_n = int(len(used) - np.flatnonzero(used)[0])
        logprobs = await policy.compute_logprobs(tokens, prompt_logprobs_last_n=last_n)
        return float(logprobs[1:][used].sum(dtype=np.float64))

    return np.array(await gather_bounded(one, datums))


async def with_reference(
    policy: SamplingClient, comparisons: Sequence[Comparison]
) -> list[Comparison]:
    """The comparisons with their answers' logprobs under `policy`, the reference."""
    logprobs = iter(await answer_logprobs(policy, [d for c in comparisons for d in c.datums]))
    return [replace(c, reference=np.array([next(logprobs) for _ in c.datums])) for c in comparisons]


def summed(datums: Sequence[Datum], logprobs: Sequence[Tensor]) -> Tensor:
    """The summed logprob of every datum's weighted tokens, `[datums]`."""
    return torch.stack(
        [
            p[torch.from_numpy(datum.loss_fn_inputs["weights"] != 0)].sum()
            for datum, p in zip(datums, logprobs, strict=True)
        ]
    )


# ---- the objective ----


@dataclass(frozen=True)
class Preferences(Objective[Comparison]):
    """A preference loss, averaged over a batch of comparisons."""

    config: PreferenceConfig

    async def submit(
        self, training: TrainingClient, batch: Sequence[Comparison], step: int
    ) -> Op[ForwardBackwardOutput]:
        def loss(
            datums: Sequence[Datum], logprobs: list[Tensor]
        ) -> tuple[Tensor, dict[str, float]]:
            return self.loss(batch, summed(datums, logprobs))

        return training.forward_backward_custom([d for c in batch for d in c.datums], loss)

    def loss(self, batch: Sequence[Comparison], policy: Tensor) -> tuple[Tensor, dict[str, float]]:
        """The mean loss of the answers' logprobs `[2 B]`, and what there is to say of them."""
        beta = self.config.beta
        reference = torch.tensor(
            np.concatenate([c.reference for c in batch if c.reference is not None])
        )
        first, second = policy[0::2], policy[1::2]
        ref_first, ref_second = (r.to(policy.dtype) for r in (reference[0::2], reference[1::2]))
        rewards = beta * (first - ref_first).detach()
        if self.config.loss == "kto":
            desirable = torch.tensor([c.desirable for c in batch])
            per_answer = preference_losses.kto(
                first,
                ref_first,
                desirable,
                second,
                ref_second,
                beta,
                self.config.desirable_weight,
                self.config.undesirable_weight,
            )
            good, bad = rewards[desirable], rewards[~desirable]
            metrics = {"kl": float((second - ref_second).detach().mean())}
            if len(good) and len(bad):
                metrics["accuracy"] = float((good[:, None] > bad).float().mean())
        else:
            given = (first, second, ref_first, ref_second, beta)
            if self.config.loss == "dpo":
                per_answer = preference_losses.dpo(*given, self.config.label_smoothing)
            else:
                per_answer = preference_losses.ipo(*given)
            good, bad = rewards, beta * (second - ref_second).detach()
            metrics = {"accuracy": float((good > bad).float().mean())}
        for name, values in (("chosen_reward", good), ("rejected_reward", bad)):
            if len(values):
                metrics[name] = float(values.mean())
        if len(good) and len(bad):
            metrics["margin"] = float(good.mean() - bad.mean())
        return per_answer.mean(), metrics

    def metrics(
        self, batch: Sequence[Comparison], output: ForwardBackwardOutput
    ) -> dict[str, float]:
        told = {k: v for k, v in output.metrics.items() if ":" not in k}
        return {"loss": output.metrics["custom_loss:sum"], **told}

    async def evaluate(
        self, training: TrainingClient, held_out: Sequence[Comparison]
    ) -> dict[str, Any]:
        """Loss and metrics of what is held out; the accuracy of pairs with its 95% interval
        (Wilson's)."""
        datums = [d for c in held_out for d in c.datums]
        output = await training.forward(datums, "cross_entropy", logprobs="loss")
        logprobs = [torch.tensor(out["logprobs"]) for out in output.loss_fn_outputs]
        loss, metrics = self.loss(held_out, summed(datums, logprobs))
        result: dict[str, Any] = {**metrics, "loss": float(loss), "examples": len(held_out)}
        if self.config.loss != "kto":
            right = round(metrics["accuracy"] * len(held_out))
            interval = rate_interval(right, len(held_out))
            result["accuracy_low"] = interval.low
            result["accuracy_high"] = interval.high
        return result
