"""Distillation: a student learns from a teacher, any policy that a sampler serves.

On-policy, the student samples and the teacher scores every token: the policy gradient with the
advantage `-(log student - log teacher)` descends the reverse KL (Agarwal et al., "On-policy
distillation of language models", 2023; Gu et al., "MiniLLM", 2023). Off-policy, the teacher samples
and the student imitates: the samples (Kim & Rush, "Sequence-level knowledge distillation", 2016),
or the teacher's likeliest tokens at each position (Hinton et al., "Distilling the knowledge in a
neural network", 2015). Where the teacher sees more of a prompt than the student, the prompt itself
is distilled (Askell et al., "A general language assistant as a laboratory for alignment", 2021).

Dimension names: T tokens of a segment, N tokens of a completion, K likeliest tokens.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..primitives.client import SamplingClient, ServiceClient, TrainingClient
from ..primitives.codec import decode, encode
from ..primitives.errors import InvalidInput
from ..primitives.op import Op
from ..primitives.types import (
    Datum,
    ForwardBackwardOutput,
    ModelInput,
    SampledSequence,
    SamplingParams,
    Segment,
    TokenLogprobs,
    TrainingInfo,
)
from .chat_data import AnswerRenderer, Example, completion_datum, fingerprint
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
from .fit_config import DistillConfig
from .preferences import prompt_of
from .rows import Source, TooLong, collect
from .run_files import write_file
from .seeds import derived_seed
from .supervised import Supervised, ratio_interval

Teachers = SamplingClient | Mapping[str, SamplingClient]
SAMPLES = "teacher_samples.msgpack"

# ---- what a teacher says of a student's tokens ----


def sample_segment(prompt: np.ndarray, sample: SampledSequence) -> Segment:
    """A prompt and what was sampled after it, as a segment of T tokens."""
    before = len(prompt)
    return Segment(
        np.concatenate([prompt, sample.tokens]),
        np.arange(before + len(sample.tokens)) >= before,
        np.concatenate([np.zeros(before, np.float32), sample.logprobs]),
        np.concatenate([np.full(before, -1, np.int32), sample.versions]),
    )


async def teacher_logprobs(
    teacher: SamplingClient, segment: Segment, prompt: np.ndarray | None = None
) -> np.ndarray:
    """The teacher's logprobs of a segment's sampled tokens, float32 `[T]`, 0 elsewhere. With
    `prompt`, the teacher sees that in place of what stands before the first sampled token."""
    first = int(np.flatnonzero(segment.mask)[0])
    before = segment.tokens[:first] if prompt is None else prompt
    scored = np.concatenate([before, segment.tokens[first:]])
    after = len(segment.tokens) - first
    logprobs = await teacher.compute_logprobs(scored, prompt_logprobs_last_n=after)
    whole = np.zeros(len(segment.tokens), np.float32)
    whole[first:] = logprobs[-after:]
    return np.where(segment.mask, whole, np.float32(0))


def reverse_kl_datum(
    segment: Segment, teacher: np.ndarray, scale: float = 1.0, rewards: float = 0.0
) -> Datum:
    """The policy-gradient datum of a segment whose tokens a teacher scored (`[T]`): the advantage
    of a sampled token is `scale (rewards - (log student - log teacher))`. `rewards` mixes in an
    advantage from elsewhere."""
    stop = int(np.flatnonzero(segment.mask)[-1]) + 1
    gap = (segment.logprobs - teacher)[1:stop]
    return Datum(
        ModelInput(segment.tokens[: stop - 1]),
        {
            "target_tokens": segment.tokens[1:stop],
            "logprobs": segment.logprobs[1:stop],
            "advantages": np.where(segment.mask[1:stop], scale * (rewards - gap), 0),
        },
    )


def soft_datum(prompt: np.ndarray, tokens: np.ndarray, top: TokenLogprobs) -> Datum:
    """The `cross_entropy` datum whose targets at the positions of `tokens` `[N]` after `prompt` are
    the teacher's K likeliest tokens `[N, K]`, weighted by their probabilities, which are made to
    add up to 1."""
    chance = np.exp(top.logprobs - top.logprobs.max(-1, keepdims=True))
    chance /= chance.sum(-1, keepdims=True)
    before = np.zeros((len(prompt) - 1, top.tokens.shape[1]))
    return Datum(
        ModelInput(np.concatenate([prompt, tokens])[:-1]),
        {
            "target_tokens": np.concatenate([before.astype(np.int64), top.tokens]),
            "weights": np.concatenate([before, chance]),
        },
    )


# ---- the loop ----


@dataclass(frozen=True, eq=False)
class Prompt:
    """What the student and its teacher are asked, int64 `[T]` each."""

    row: int
    student: np.ndarray
    teacher: np.ndarray
    teacher_name: str = ""


async def distill(
    service: ServiceClient,
    config: DistillConfig,
    teachers: Teachers,
    rows: Source,
    *,
    run_dir: str | Path | None = None,
    watch: FitWatcher | None = None,
) -> FitResult:
    """Start a run on prompts: `{"prompt" or "messages"}`, with `teacher` (a name) where there are
    several. `teacher_prompt` (a text or messages) is what the teacher sees instead.

    Raises:
        InvalidInput: the config or the data cannot be used.
        NotFound: there is no such model, checkpoint or file.
    """
    about = {"algorithm": f"distillation, {config.method}", "data": "prompts given in code"}
    prepare = _prepare(config, teachers, rows)
    return await start_fit(service, config, prepare, about=about, run_dir=run_dir, watch=watch)


async def resume_distill(
    service: ServiceClient,
    run_dir: str | Path,
    teachers: Teachers,
    rows: Source,
    *,
    steps: int | None = None,
    watch: FitWatcher | None = None,
) -> FitResult:
    """Go on with the run in `run_dir` from its last checkpoint, as `resume_supervised` does."""

    def prepare(config: DistillConfig) -> Prepare[Any]:
        return _prepare(config, teachers, rows)

    return await resume_fit(service, run_dir, DistillConfig, prepare, steps=steps, watch=watch)


def _prepare(config: DistillConfig, teachers: Teachers, rows: Source) -> Prepare[Any]:
    async def prepare(training: TrainingClient, info: TrainingInfo, folder: Path) -> Prepared[Any]:
        renderer = AnswerRenderer.from_model(info.model_path, config.template_kwargs)
        named = dict(teachers) if isinstance(teachers, Mapping) else {"": teachers}
        make = PromptMaker(config, renderer, info.max_context_length, tuple(named))
        prompts, report = await asyncio.to_thread(collect, rows, make, strict=config.strict)
        digest = fingerprint(Datum(ModelInput(p.student), {}) for p in prompts)
        train, held_out = split(prompts, config.validation, config.seed)
        reports = {"train": report}
        if config.method == "on_policy":
            student = await training.live_sampling_client().ready()
            return Prepared(ReverseKL(config, student, named), train, held_out, digest, reports)
        kept = folder / SAMPLES
        if not kept.exists():
            examples = [await teacher_examples(config, named, part) for part in (train, held_out)]
            write_file(kept, encode(examples))
        train_examples, held_examples = decode(kept.read_bytes(), list[list[Example]])
        return Prepared(Supervised(), train_examples, held_examples, digest, reports)

    return prepare


@dataclass(frozen=True)
class PromptMaker:
    """Makes a `Prompt` of a row; `collect` takes it."""

    config: DistillConfig
    renderer: AnswerRenderer
    max_context: int
    teachers: Sequence[str]

    def __call__(self, number: int, row: Any) -> Prompt:
        """
        Raises:
            InvalidInput: the row cannot be used.
        """
        messages = prompt_of(row)
        seen = messages
        if row.get("teacher_prompt") is not None:
            seen = prompt_of({"prompt": row["teacher_prompt"]})
        if self.config.teacher_system:
            rest = seen[1:] if seen[0]["role"] == "system" else seen
            seen = [{"role": "system", "content": self.config.teacher_system}, *rest]
        name = "" if tuple(self.teachers) == ("",) else str(row.get("teacher"))
        if name not in self.teachers:
            raise InvalidInput(f"no teacher {name!r}; there are {', '.join(self.teachers)}")
        student, teacher = self.renderer.prompt(messages), self.renderer.prompt(seen)
        needed = max(len(student), len(teacher)) + self.config.max_tokens
        if needed > self.max_context:
            raise TooLong(f"{needed} tokens with max_tokens; at most {self.max_context} fit")
        return Prompt(number, student, teacher, name)


async def teacher_examples(
    config: DistillConfig, teachers: Mapping[str, SamplingClient], prompts: Sequence[Prompt]
) -> list[Example]:
    """What the teachers sample, as examples for the student: hard targets, or the K likeliest."""

    async def one(prompt: Prompt) -> list[Example]:
        response = await teachers[prompt.teacher_name].sample(
            prompt.teacher,
            config.samples_per_prompt,
            SamplingParams(
                config.max_tokens,
                seed=derived_seed(config.seed, 5, prompt.row),
                temperature=config.temperature,
            ),
            topk_sample_logprobs=config.top_k if config.method == "top_k" else 0,
        )
        return [_example(prompt, sample) for sample in response.sequences]

    return [e for made in await gather_bounded(one, prompts) for e in made]


def _example(prompt: Prompt, sample: SampledSequence) -> Example:
    if sample.topk_logprobs is None:
        datum = completion_datum(prompt.student, sample.tokens)
    else:
        datum = soft_datum(prompt.student, sample.tokens, sample.topk_logprobs)
    return Example(prompt.row, (datum,))


class ReverseKL(Objective[Prompt]):
    """The reverse KL of the student from its teachers, on its own samples, per token."""

    waits = True  # for the weights to sample from

    def __init__(
        self,
        config: DistillConfig,
        student: SamplingClient,
        teachers: Mapping[str, SamplingClient],
    ) -> None:
        self.config, self.student, self.teachers = config, student, teachers
        self.told: dict[str, float] = {}

    async def submit(
        self, training: TrainingClient, batch: Sequence[Prompt], step: int
    ) -> Op[ForwardBackwardOutput]:
        scored = await self.scored_samples(batch, step)
        tokens = sum(int(segment.mask.sum()) for segment, _ in scored)
        gaps = [(s.logprobs - t)[s.mask] for s, t in scored]
        self.told = {
            "reverse_kl": float(np.concatenate(gaps).mean()),
            "sampled_tokens": float(tokens),
            "sample_length": tokens / len(scored),
        }
        datums = [reverse_kl_datum(segment, t, 1 / tokens) for segment, t in scored]
        return training.forward_backward(datums, self.config.loss_fn, logprobs="loss")

    async def scored_samples(
        self, prompts: Sequence[Prompt], step: int
    ) -> list[tuple[Segment, np.ndarray]]:
        """The student's samples with the teachers' logprobs `[T]` of their tokens."""

        async def one(prompt: Prompt) -> list[tuple[Segment, np.ndarray]]:
            config = self.config
            params = SamplingParams(
                config.max_tokens, seed=derived_seed(config.seed, 4, step, prompt.row)
            )
            response = await self.student.sample(prompt.student, config.samples_per_prompt, params)
            segments = [sample_segment(prompt.student, s) for s in response.sequences]
            teacher = self.teachers[prompt.teacher_name]
            scores = await asyncio.gather(
                *(teacher_logprobs(teacher, segment, prompt.teacher) for segment in segments)
            )
            return list(zip(segments, scores, strict=True))

        return [pair for pairs in await asyncio.gather(*map(one, prompts)) for pair in pairs]

    def metrics(self, batch: Sequence[Prompt], output: ForwardBackwardOutput) -> dict[str, float]:
        return {"loss": self.told["reverse_kl"], **self.told}

    async def evaluate(
        self, training: TrainingClient, held_out: Sequence[Prompt]
    ) -> dict[str, Any]:
        """The reverse KL per token on held-out prompts, with its 95% interval over samples."""
        scored = await self.scored_samples(held_out, -1 % 2**32)
        sums = np.array([(s.logprobs - t)[s.mask].sum(dtype=np.float64) for s, t in scored])
        counts = np.array([float(s.mask.sum()) for s, _ in scored])
        mean, low, high = ratio_interval(sums, counts)
        return {"loss": mean, "low": low, "high": high, "examples": len(scored)}
