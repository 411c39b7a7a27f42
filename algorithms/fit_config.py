"""What training on a fixed set of examples is told. Light to import: the command line makes its
flags of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, get_args

from ..primitives.errors import InvalidInput
from ..primitives.types import AdamParams, ExpertAdapters

SCHEDULES = ("constant", "linear", "cosine")


def check_choice(config: Any, name: str, choices: tuple[str, ...]) -> None:
    value = getattr(config, name)
    if value not in choices:
        raise InvalidInput(
            f"{type(config).__name__}.{name} must be {' or '.join(choices)}, got {value!r}"
        )


@dataclass(frozen=True)
class FitConfig:
    """What every such run's course depends on; kept as `run.json` in its folder.

    Attributes:
        model: folder, name or Hugging Face id of the base model.
        start: a checkpoint (tinker://...) whose weights to start from, instead of a new adapter.
        rank: of the LoRA adapter.
        alpha: the adapter is scaled by `alpha / rank`.
        train_attn: adapt the attention layers.
        train_mlp: adapt the MLP layers.
        train_unembed: adapt the output layer too.
        train_router: adapt the routers of a mixture of experts.
        experts: `each` expert of a mixture has an adapter of its own, or those of a layer have a
            `shared` one.
        learning_rate: the highest that the schedule reaches.
        schedule: `constant`, `linear` or `cosine`: how the learning rate falls after the warm-up.
        warmup: share of the steps over which the learning rate rises linearly from 0.
        final_learning_rate: where `linear` and `cosine` end, as a share of `learning_rate`.
        grad_clip_norm: largest L2 norm of the gradient (0: no clipping).
        weight_decay: of AdamW.
        epochs: how often every example is trained on.
        steps: optimizer steps in all, instead of `epochs` (0: as many as `epochs` make).
        batch_size: examples per step.
        seed: of the adapter's start, the split and the shuffling.
        validation: share of the rows held out, where no file of them is given.
        eval_every: steps between evaluations on what is held out (0: only before and after).
        checkpoint_every: steps between checkpoints.
        strict: refuse the data at the first row that cannot be used, instead of leaving it out.
        template_kwargs: further variables of the chat template.
    """

    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    start: str = ""
    rank: int = 32
    alpha: float = 32.0
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True
    train_router: bool = False
    experts: str = "each"
    learning_rate: float = 2e-4
    schedule: str = "linear"
    warmup: float = 0.05
    final_learning_rate: float = 0.0
    grad_clip_norm: float = 1.0
    weight_decay: float = 0.0
    epochs: int = 1
    steps: int = 0
    batch_size: int = 16
    seed: int = 0
    validation: float = 0.0
    eval_every: int = 0
    checkpoint_every: int = 50
    strict: bool = False
    template_kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        name = type(self).__name__
        for attribute in ("epochs", "batch_size", "checkpoint_every"):
            if getattr(self, attribute) < 1:
                raise InvalidInput(f"{name}.{attribute} must be at least 1")
        for attribute in ("steps", "eval_every"):
            if getattr(self, attribute) < 0:
                raise InvalidInput(f"{name}.{attribute} must not be negative")
        for attribute in ("warmup", "final_learning_rate"):
            if not 0 <= getattr(self, attribute) <= 1:
                raise InvalidInput(f"{name}.{attribute} must be from 0 to 1")
        if not 0 <= self.validation < 1:
            raise InvalidInput(f"{name}.validation must be at least 0 and below 1")
        check_choice(self, "schedule", SCHEDULES)
        check_choice(self, "experts", get_args(ExpertAdapters))
        self.adam(0, 1)

    def total_steps(self, examples: int) -> int:
        return self.steps or self.epochs * math.ceil(examples / self.batch_size)

    def adam(self, step: int, total: int) -> AdamParams:
        """Of optimizer step `step` (from 0) of `total`."""
        rate = self.learning_rate * learning_rate_factor(
            self.schedule, step, total, round(self.warmup * total), self.final_learning_rate
        )
        return AdamParams(rate, weight_decay=self.weight_decay, grad_clip_norm=self.grad_clip_norm)


def learning_rate_factor(
    schedule: str, step: int, total: int, warmup_steps: int = 0, final: float = 0.0
) -> float:
    """The share of the highest learning rate at optimizer step `step`, 0 to `total` - 1.

    It rises as `(step + 1) / (warmup_steps + 1)`, is 1 at `warmup_steps`, and then falls to `final`
    at `total`, where training has ended: on a line, or on half a cosine (Loshchilov & Hutter,
    "SGDR", 2017, eq. 5).
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    gone = (step - warmup_steps) / max(total - warmup_steps, 1)
    if schedule == "linear":
        return 1 - (1 - final) * gone
    if schedule == "cosine":
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * gone))
    return 1.0


@dataclass(frozen=True)
class SupervisedConfig(FitConfig):
    """Supervised fine-tuning.

    Attributes:
        data: a JSONL file, `hf:NAME[:SPLIT]`; empty where rows are given in code.
        validation_data: the same, of rows to evaluate on.
        train_on: `all_assistant`, every turn of the assistant, or `last_assistant`.
        completions: how prompt and completion texts are read: `chat`, a user's turn and its
            answer, or `text`, a raw text and how it goes on.
        max_length: most tokens of a sequence (0: the model's context).
        too_long: `skip` or `truncate` rows that are longer.
        weighting: `token`, every trained token of a batch counts the same, or `example`, every
            example does.
    """

    data: str = ""
    validation_data: str = ""
    train_on: str = "all_assistant"
    completions: str = "chat"
    max_length: int = 0
    too_long: str = "skip"
    weighting: str = "token"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "train_on", ("all_assistant", "last_assistant"))
        check_choice(self, "completions", ("chat", "text"))
        check_choice(self, "too_long", ("skip", "truncate"))
        check_choice(self, "weighting", ("token", "example"))
        if self.max_length < 0 or self.max_length == 1:
            raise InvalidInput("SupervisedConfig.max_length must be 0 or at least 2")


@dataclass(frozen=True)
class PreferenceConfig(FitConfig):
    """Learning from preferences.

    Attributes:
        data: a JSONL file, `hf:NAME[:SPLIT]`; empty where rows are given in code.
        loss: `dpo`, `ipo` or `kto`.
        beta: how dear it is to leave the reference.
        label_smoothing: share of the labels taken to be swapped (dpo).
        desirable_weight: of desirable answers (kto).
        undesirable_weight: of undesirable answers (kto).
        max_length: most tokens of a prompt with its answer (0: the model's context); rows with
            more are left out.
    """

    data: str = ""
    learning_rate: float = 5e-5
    loss: str = "dpo"
    beta: float = 0.1
    label_smoothing: float = 0.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    max_length: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "loss", ("dpo", "ipo", "kto"))
        if not self.beta > 0:
            raise InvalidInput("PreferenceConfig.beta must be positive")
        if not 0 <= self.label_smoothing < 0.5:
            raise InvalidInput("PreferenceConfig.label_smoothing must be at least 0 and below 0.5")


@dataclass(frozen=True)
class RewardConfig(FitConfig):
    """A reward model, learnt from preferences.

    Attributes:
        data: a JSONL file, `hf:NAME[:SPLIT]`; empty where rows are given in code.
        good: the text whose first token speaks for an answer.
        bad: that whose first token speaks against it.
        question: what a user asks after the answer, to be answered by `good` or `bad`; empty: the
            two tokens are compared right after the answer's end.
        max_length: most tokens of a prompt with its answer (0: the model's context); rows with
            more are left out.
    """

    data: str = ""
    learning_rate: float = 1e-4
    good: str = "Yes"
    bad: str = "No"
    question: str = ""
    max_length: int = 0


@dataclass(frozen=True)
class DistillConfig(FitConfig):
    """Distillation: a student learns from a teacher, any policy that can be sampled from.

    Attributes:
        method: `on_policy`, the reverse KL on the student's own samples; `samples`, cross-entropy
            on the teacher's; `top_k`, cross-entropy with the teacher's likeliest tokens at every
            position of its samples.
        samples_per_prompt: samples of one prompt, per step (`on_policy`) or in all.
        max_tokens: of a sample.
        temperature: at which the teacher samples (the student does at 1).
        top_k: how many likeliest tokens are learnt from (`top_k`).
        teacher_system: a system prompt that the teacher sees and the student does not.
        loss_fn: of `on_policy`.
    """

    method: str = "on_policy"
    samples_per_prompt: int = 1
    max_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 16
    teacher_system: str = ""
    loss_fn: str = "importance_sampling"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "method", ("on_policy", "samples", "top_k"))
        check_choice(self, "loss_fn", ("importance_sampling", "ppo", "cispo"))
        for attribute in ("samples_per_prompt", "max_tokens", "top_k"):
            if getattr(self, attribute) < 1:
                raise InvalidInput(f"DistillConfig.{attribute} must be at least 1")
