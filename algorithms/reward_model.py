"""Reward models: a scalar reward read off a language model, learnt from preferences.

The reward of an answer is the logit difference of two tokens after it, which is their logprobs'
difference: it needs no head of its own, is trained by LoRA and computed by any sampler. Pairs
teach it by Bradley and Terry's model (Ouyang et al., "Training language models to follow
instructions with human feedback", 2022, eq. 1). `PairwiseJudge` compares two answers by asking.

Dimension names: T tokens before the two tokens.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..primitives.client import SamplingClient, ServiceClient, TrainingClient
from ..primitives.errors import InvalidInput, NotFound
from ..primitives.op import Op
from ..primitives.types import (
    Datum,
    ForwardBackwardOutput,
    Message,
    ModelInput,
    SamplingParams,
    TrainingInfo,
)
from .chat_data import AnswerRenderer, fingerprint, prompt_messages
from .estimates import rate_interval
from .fit import FitResult, FitWatcher, Objective, Prepare, Prepared, resume_fit, split, start_fit
from .fit_config import RewardConfig
from .preference_losses import bradley_terry
from .preferences import judged_pair
from .rows import Source, TooLong, collect, given_or_named
from .run_folder import load_run_of


@dataclass(frozen=True)
class Verdict:
    """Where a reward is read off: the tokens `good` and `bad` after an answer, or after a user's
    `question` about it."""

    renderer: AnswerRenderer
    good: int
    bad: int
    question: str = ""

    @classmethod
    def of(cls, renderer: AnswerRenderer, good: str, bad: str, question: str = "") -> Verdict:
        """Of the first tokens of two texts.

        Raises:
            InvalidInput: they are no two different tokens.
        """
        first, second = renderer.tokens(good)[:1], renderer.tokens(bad)[:1]
        if not first or not second or first == second:
            raise InvalidInput(
                f"{good!r} and {bad!r} must begin with different tokens, got {first} and {second}"
            )
        return cls(renderer, first[0], second[0], question)

    def tokens(self, messages: Sequence[Message], answer: Message) -> np.ndarray:
        """The tokens up to where the reward is read off, int64 `[T]`."""
        if self.question:
            asked = {"role": "user", "content": self.question}
            return self.renderer.prompt([*messages, answer, asked])
        before, said = self.renderer.prompt(messages), self.renderer.answer(messages, answer)
        return np.concatenate([before, said])

    def datum(self, messages: Sequence[Message], answer: Message) -> Datum:
        """The datum whose last position has the two tokens as targets, `[T, 2]`."""
        tokens = self.tokens(messages, answer)
        targets = np.tile(np.array([self.good, self.bad]), (len(tokens), 1))
        weights = np.zeros(targets.shape, np.float32)
        weights[-1] = 1
        return Datum(ModelInput(tokens), {"target_tokens": targets, "weights": weights})


def datum_reward(logprobs: Tensor) -> Tensor:
    """The reward of a `Verdict.datum`, a scalar, from its targets' logprobs `[T, 2]`."""
    return logprobs[-1, 0] - logprobs[-1, 1]


async def verdict_reward(policy: SamplingClient, tokens: np.ndarray, good: int, bad: int) -> float:
    """The logprob of the token `good` after `tokens` `[T]` minus that of `bad`."""
    targets = np.full((len(tokens), 2), -1)
    targets[-1] = good, bad
    response = await policy.sample(
        np.append(tokens, good), 1, SamplingParams(max_tokens=1), target_prompt_logprobs=targets
    )
    assert response.target_prompt_logprobs is not None
    scores = response.target_prompt_logprobs[-1]
    return float(scores[0]) - float(scores[1])


class RewardModel:
    """Scores answers by a trained policy: any number of calls may be under way at once."""

    def __init__(self, policy: SamplingClient, verdict: Verdict) -> None:
        self.policy = policy
        self.verdict = verdict

    async def reward(self, prompt: str | Sequence[Message], answer: str | Message) -> float:
        """How good `answer` is to the messages (or user's text) `prompt`. Differences between
        answers mean something, the level does not.

        Raises:
            InvalidInput: they do not fit in the model's context.
        """
        if isinstance(answer, str):
            answer = {"role": "assistant", "content": answer}
        tokens = self.verdict.tokens(prompt_messages(prompt), answer)
        return await verdict_reward(self.policy, tokens, self.verdict.good, self.verdict.bad)


async def load_reward_model(
    service: ServiceClient, run_dir: str | Path, checkpoint: str | None = None
) -> RewardModel:
    """The reward model of a run of `train_reward_model`, at its newest checkpoint or another.

    Raises:
        NotFound: there is no such run, or it has no checkpoint.
    """
    run_id, config = load_run_of(RewardConfig, run_dir)
    if checkpoint is None:
        saved = await service.list_checkpoints(run_id)
        if not saved:
            raise NotFound(f"run {run_id} has no checkpoint")
        checkpoint = saved[0].path
    policy = await service.create_sampling_client(checkpoint)
    renderer = AnswerRenderer.from_model(
        policy.get_tokenizer().name_or_path, config.template_kwargs
    )
    return RewardModel(policy, Verdict.of(renderer, config.good, config.bad, config.question))


# ---- training ----


@dataclass(frozen=True, eq=False)
class Pair:
    """Verdict datums of the better and the worse answer."""

    row: int
    datums: tuple[Datum, Datum]


async def train_reward_model(
    service: ServiceClient,
    config: RewardConfig,
    rows: Source | None = None,
    *,
    run_dir: str | Path | None = None,
    watch: FitWatcher | None = None,
) -> FitResult:
    """Start a run on `rows` (default: `config.data`): `{"prompt" or "messages", "chosen",
    "rejected"}`. `load_reward_model(service, result.run_dir)` is what it made.

    Raises:
        InvalidInput: the config or the data cannot be used.
        NotFound: there is no such model, checkpoint or file.
    """
    about = {"algorithm": "reward model", "data": config.data or "rows given in code"}
    return await start_fit(
        service, config, _prepare(config, rows), about=about, run_dir=run_dir, watch=watch
    )


async def resume_reward_model(
    service: ServiceClient,
    run_dir: str | Path,
    rows: Source | None = None,
    *,
    steps: int | None = None,
    watch: FitWatcher | None = None,
) -> FitResult:
    """Go on with the run in `run_dir` from its last checkpoint, as `resume_supervised` does."""

    def prepare(config: RewardConfig) -> Prepare[Pair]:
        return _prepare(config, rows)

    return await resume_fit(service, run_dir, RewardConfig, prepare, steps=steps, watch=watch)


def _prepare(config: RewardConfig, rows: Source | None) -> Prepare[Pair]:
    async def prepare(training: TrainingClient, info: TrainingInfo, folder: Path) -> Prepared[Pair]:
        source = given_or_named(rows, config.data, "RewardConfig.data")
        renderer = AnswerRenderer.from_model(info.model_path, config.template_kwargs)
        verdict = Verdict.of(renderer, config.good, config.bad, config.question)
        limit = min(config.max_length or info.max_context_length, info.max_context_length)

        def make(number: int, row: Any) -> Pair:
            judged = judged_pair(number, row)
            assert judged.other is not None
            better, worse = (
                verdict.datum(judged.prompt, answer) for answer in (judged.answer, judged.other)
            )
            longest = max(better.model_input.length, worse.model_input.length)
            if longest >= limit:
                raise TooLong(f"{longest} tokens; at most {limit - 1} fit")
            return Pair(number, (better, worse))

        pairs, report = await asyncio.to_thread(collect, source, make, strict=config.strict)
        report.datums = 2 * len(pairs)
        report.tokens = sum(d.model_input.length for pair in pairs for d in pair.datums)
        train, held_out = split(pairs, config.validation, config.seed)
        digest = fingerprint(datum for pair in pairs for datum in pair.datums)
        return Prepared(BradleyTerry(), train, held_out, digest, {"train": report})

    return prepare


class BradleyTerry(Objective[Pair]):
    """The likelihood of the preferences, averaged over a batch of pairs."""

    async def submit(
        self, training: TrainingClient, batch: Sequence[Pair], step: int
    ) -> Op[ForwardBackwardOutput]:
        def loss(
            datums: Sequence[Datum], logprobs: list[Tensor]
        ) -> tuple[Tensor, dict[str, float]]:
            return self.loss(logprobs)

        return training.forward_backward_custom([d for p in batch for d in p.datums], loss)

    def loss(self, logprobs: Sequence[Tensor]) -> tuple[Tensor, dict[str, float]]:
        rewards = torch.stack([datum_reward(p) for p in logprobs])
        better, worse = rewards[0::2], rewards[1::2]
        margin = (better - worse).detach()
        metrics = {"accuracy": float((margin > 0).float().mean()), "margin": float(margin.mean())}
        return bradley_terry(better, worse).mean(), metrics

    def metrics(self, batch: Sequence[Pair], output: ForwardBackwardOutput) -> dict[str, float]:
        told = {k: v for k, v in output.metrics.items() if ":" not in k}
        return {"loss": output.metrics["custom_loss:sum"], **told}

    async def evaluate(self, training: TrainingClient, held_out: Sequence[Pair]) -> dict[str, Any]:
        """Loss, margin, and the accuracy with its 95% interval (Wilson's)."""
        datums = [datum for pair in held_out for datum in pair.datums]
        output = await training.forward(datums, "cross_entropy", logprobs="loss")
        loss, metrics = self.loss([torch.tensor(o["logprobs"]) for o in output.loss_fn_outputs])
        right, n = round(metrics["accuracy"] * len(held_out)), len(held_out)
        interval = rate_interval(right, n)
        bounds = {"accuracy_low": interval.low, "accuracy_high": interval.high}
        return {**metrics, **bounds, "loss": float(loss), "examples": n}


# ---- comparing by asking ----

COMPARE = """Which of two answers to a question is better?

Question:
{question}

Answer A:
{first}

Answer B:
{second}

Say A or B."""


class PairwiseJudge:
    """Compares answers by asking a policy, in both orders, which one is better (Zheng et al.,
    "Judging LLM-as-a-judge with MT-bench and Chatbot Arena", 2023, section 3.4).

    Args:
        ask: the question put, with `{question}`, `{first}` and `{second}`.
        names: the two texts, by their first tokens, that say first and second.
    """

    def __init__(
        self,
        policy: SamplingClient,
        renderer: AnswerRenderer,
        ask: str = COMPARE,
        names: tuple[str, str] = ("A", "B"),
    ) -> None:
        self.policy, self.ask = policy, ask
        self.verdict = Verdict.of(renderer, *names)

    async def preference(self, question: str, first: str, second: str) -> float:
        """The probability, from 0 to 1, that `first` is better, from the log odds averaged over
        both orders: an answer's place does not count."""
        forwards, backwards = await asyncio.gather(
            self._log_odds(question, first, second), self._log_odds(question, second, first)
        )
        return 1 / (1 + math.exp(-(forwards - backwards) / 2))

    async def _log_odds(self, question: str, first: str, second: str) -> float:
        text = self.ask.format(question=question, first=first, second=second)
        tokens = self.verdict.renderer.prompt([{"role": "user", "content": text}])
        return await verdict_reward(self.policy, tokens, self.verdict.good, self.verdict.bad)
