"""What a training run is told. Light to import: the command line makes its flags of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, get_args

from ..envs.episode import EpisodeLimits
from ..primitives.errors import InvalidInput
from ..primitives.types import AdamParams, ExpertAdapters
from .advantages import get_batch_advantage
from .datums import IMPORTANCE_LEVELS, NORMALIZATIONS

KL_FORMS = ("reward", "k2", "k3")


@dataclass(frozen=True)
class TrainConfig:
    """Everything that a run's course depends on; kept as `run.json` in its folder.

    The default loss, `cispo`, is the policy gradient with truncated importance weights, which
    corrects stale data and trainer-sampler mismatch alike. `proximal_cap > 0` selects the
    decoupled form instead: an extra forward pass gives the proximal policy around which `ppo`
    clips, and importance weights against the sampler are truncated at `proximal_cap`.

    `algorithms/README.md` has the settings that make GRPO, Dr. GRPO, DAPO, GSPO and the others.

    Attributes:
        model: folder, name or Hugging Face id of the base model.
        env: a registered name, `gymnasium:<id>` or `package.module:Class`.
        env_kwargs: arguments of the environment.
        eval_env_kwargs: laid over `env_kwargs` for evaluation (a held-out split, for instance).
        start: path of a checkpoint whose weights the run begins with (empty: a fresh adapter);
            `rank`, `alpha` and the layers to adapt are then the checkpoint's.
        rank: of the LoRA adapter.
        alpha: the adapter is scaled by `alpha / rank`.
        train_attn: adapt the attention layers.
        train_mlp: adapt the MLP layers.
        train_unembed: adapt the output layer too.
        train_router: adapt the routers of a mixture of experts.
        experts: `each` expert of a mixture has an adapter of its own, or those of a layer have a
            `shared` one.
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
        loss_fn: name of the loss; `cross_entropy` is expert iteration, without advantages.
        loss_fn_config: the loss's parameters.
        proximal_cap: above 0, the decoupled form, with this cap on the importance weights.
        importance_level: of what they are the ratio: `token`, `geometric` mean or `sequence`.
        importance_mask: leave out weights beyond the cap, and below its inverse, instead of
            truncating them.
        advantage: name of the advantage estimator: `grpo`, `dr_grpo`, `rloo`, `reinforce_pp` or
            `reinforce_pp_baseline`.
        normalize: how tokens of long and short episodes count: `episode` (all tokens alike),
            `sequence_mean` (GRPO) or `token_mean` (DAPO).
        imitate: with `cross_entropy`, the episodes to learn from: `successful` or `best` of the
            group.
        kl_coeff: above 0, the policy is held near a reference, by this much per nat.
        kl_form: where: in the `reward`, or in the loss as `k2` or `k3`.
        reference: path of the reference's checkpoint (empty: the base model).
        overlong_buffer: above 0, the reward falls by up to 1 over the last so many tokens of
            `max_tokens` (DAPO's soft punishment).
        overlong_filter: leave out of the loss the episodes that were cut off or had a turn of
            `max_tokens`.
        replay_groups: groups of earlier steps that a step trains on besides the fresh ones, each
            up to 4 times.
        replay_staleness: largest number of optimizer steps between the oldest token of a replayed
            group and the step that trains on it.
        router_replay: of a mixture of experts on the torch engine, train every token through the experts
            that it went through when it was sampled.
        max_tokens: per model turn.
        max_turns: the model's turns in an episode, at most.
        step_seconds: time limit of one step of the environment.
        episode_seconds: time limit of an episode.
        num_env_workers: actors that play episodes.
        deterministic: play one episode at a time. With `max_staleness=0` and no evaluation in
            between, a seed then gives the same adapter bit for bit; otherwise it gives the same
            draws, but what else is in the sampler's batch shows in the last bits of logprobs.
        eval_every: steps between evaluations (0: only before and after). Training goes on
            meanwhile, unless `deterministic`.
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
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True
    train_router: bool = False
    experts: str = "each"
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
    importance_level: str = "token"
    importance_mask: bool = False
    advantage: str = "grpo"
    normalize: str = "episode"
    imitate: str = "successful"
    kl_coeff: float = 0.0
    kl_form: str = "reward"
    reference: str = ""
    overlong_buffer: int = 0
    overlong_filter: bool = False
    replay_groups: int = 0
    replay_staleness: int = 4
    router_replay: bool = False
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
            "proximal_cap",
            "kl_coeff",
            "overlong_buffer",
            "replay_groups",
            "replay_staleness",
        ):
            if getattr(self, name) < 0:
                raise InvalidInput(f"TrainConfig.{name} must not be negative")
        for name, choices in (
            ("importance_level", IMPORTANCE_LEVELS),
            ("normalize", NORMALIZATIONS),
            ("kl_form", KL_FORMS),
            ("experts", get_args(ExpertAdapters)),
        ):
            if getattr(self, name) not in choices:
                raise InvalidInput(
                    f"TrainConfig.{name} must be one of {', '.join(choices)}, "
                    f"got {getattr(self, name)!r}"
                )
        get_batch_advantage(self.advantage)
        if self.importance_mask and not self.proximal_cap >= 1:
            raise InvalidInput("TrainConfig.importance_mask needs a proximal_cap of at least 1")
        if self.overlong_buffer > self.max_tokens:
            raise InvalidInput(
                f"TrainConfig.overlong_buffer ({self.overlong_buffer}) must not be above "
                f"max_tokens ({self.max_tokens})"
            )
        self._check_loss()

    def _check_loss(self) -> None:
        from .imitation import get_selection  # loads scipy
        from .losses import get_loss  # loads torch

        get_selection(self.imitate)
        loss = get_loss(self.loss_fn)
        loss.fill_config(self.loss_fn_config)
        if any(self.loss_fn_config.get(f"kl_{form}_coeff") for form in ("k2", "k3")):
            raise InvalidInput("set TrainConfig.kl_coeff and kl_form, not the loss's kl_*_coeff")
        if self.imitates and (self.kl_coeff or self.proximal_cap or self.overlong_buffer):
            raise InvalidInput(
                "TrainConfig: cross_entropy has no advantages, so that kl_coeff, proximal_cap and "
                "overlong_buffer must be 0"
            )
        in_loss = self.kl_coeff > 0 and self.kl_form != "reward"
        if in_loss and "reference_logprobs" not in loss.optional:
            raise InvalidInput(
                f"TrainConfig: the loss {self.loss_fn!r} takes no reference policy; "
                'kl_form="reward" works with any'
            )

    @property
    def imitates(self) -> bool:
        """Expert iteration instead of policy gradients."""
        return self.loss_fn == "cross_entropy"

    def adam(self) -> AdamParams:
        return AdamParams(self.learning_rate, grad_clip_norm=self.grad_clip_norm)

    def limits(self) -> EpisodeLimits:
        return EpisodeLimits(
            max_turns=self.max_turns,
            step_seconds=self.step_seconds,
            episode_seconds=self.episode_seconds,
        )
