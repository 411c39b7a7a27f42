"""What a training run is told. Light to import: the command line makes its flags of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..envs.episode import EpisodeLimits
from ..primitives.errors import InvalidInput
from ..primitives.types import AdamParams
from .advantages import get_advantage


@dataclass(frozen=True)
class TrainConfig:
    """Everything that a run's course depends on; kept as `run.json` in its folder.

    The default loss, `cispo`, is the policy gradient with truncated importance weights, which
    corrects stale data and trainer-sampler mismatch alike. `proximal_cap > 0` selects the
    decoupled form instead: an extra forward pass gives the proximal policy around which `ppo`
    clips, and importance weights against the sampler are truncated at `proximal_cap`.

    Attributes:
        model: folder, name or Hugging Face id of the base model.
        env: a registered name, `gymnasium:<id>` or `package.module:Class`.
        env_kwargs: arguments of the environment.
        eval_env_kwargs: laid over `env_kwargs` for evaluation (a held-out split, for instance).
        start: path of a checkpoint whose weights the run begins with (empty: a fresh adapter);
            `rank`, `alpha` and `train_unembed` are then the checkpoint's.
        rank: of the LoRA adapter.
        alpha: the adapter is scaled by `alpha / rank`.
        train_unembed: adapt the output layer too.
        grad_clip_norm: largest L2 norm of the gradient (0: no clipping).
        steps: optimizer steps in all.
        groups_per_step: groups of episodes that a step trains on.
        group_size: episodes of one task, compared with one another.
        max_staleness: largest number of optimizer steps between the oldest token of a
            trajectory and the step that trains on it. 0 is strictly on-policy.
        oversubscription: groups played beyond what a step needs, as a share of it; whatever is
            left too old afterwards is dropped and counted.
        max_replaced: groups without signal (all rewards equal) that are replaced per step, as a
            share of it; more of them are trained on as they are.
        loss_fn: name of the loss.
        loss_fn_config: the loss's parameters.
        proximal_cap: above 0, the decoupled form, with this cap on the importance weights.
        advantage: name of the advantage estimator.
        max_tokens: per model turn.
        max_turns: the model's turns in an episode, at most.
        step_seconds: time limit of one step of the environment.
        episode_seconds: time limit of an episode.
        num_env_workers: actors that play episodes.
        deterministic: play one episode at a time. With `max_staleness=0` and no evaluation in
            between, a seed then gives the same adapter bit for bit; otherwise it gives the same
            draws, but what else is in the sampler's batch shows in the last bits of logprobs.
        eval_every: steps between evaluations (0: only before and after).
        eval_episodes: size of the held-out set (0: no evaluation).
        checkpoint_every: steps between checkpoints.
    """

    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    env: str = "calculator"
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    eval_env_kwargs: dict[str, Any] = field(default_factory=dict)
    start: str = ""
    rank: int = 32
    alpha: float = 32.0
    train_unembed: bool = True
    learning_rate: float = 1e-4
    grad_clip_norm: float = 1.0
    steps: int = 50
    groups_per_step: int = 8
    group_size: int = 8
    max_staleness: int = 1
    oversubscription: float = 0.0
    max_replaced: float = 1.0
    loss_fn: str = "cispo"
    loss_fn_config: dict[str, float] = field(default_factory=dict)
    proximal_cap: float = 0.0
    advantage: str = "grpo"
    max_tokens: int = 64
    max_turns: int = 8
    temperature: float = 1.0
    seed: int = 0
    step_seconds: float = 30.0
    episode_seconds: float = 300.0
    num_env_workers: int = 1
    deterministic: bool = False
    eval_every: int = 0
    eval_episodes: int = 200
    checkpoint_every: int = 10

    def __post_init__(self) -> None:
        positive = ("steps", "groups_per_step", "group_size", "checkpoint_every", "max_tokens")
        for name in (*positive, "num_env_workers"):
            if getattr(self, name) < 1:
                raise InvalidInput(f"TrainConfig.{name} must be at least 1")
        for name in (
            "max_staleness",
            "oversubscription",
            "max_replaced",
            "eval_every",
            "eval_episodes",
        ):
            if getattr(self, name) < 0:
                raise InvalidInput(f"TrainConfig.{name} must not be negative")
        from .losses import get_loss  # loads torch

        get_loss(self.loss_fn).fill_config(self.loss_fn_config)
        get_advantage(self.advantage)

    def adam(self) -> AdamParams:
        return AdamParams(self.learning_rate, grad_clip_norm=self.grad_clip_norm)

    def limits(self) -> EpisodeLimits:
        return EpisodeLimits(
            max_turns=self.max_turns,
            step_seconds=self.step_seconds,
            episode_seconds=self.episode_seconds,
        )
