"""The vocabulary: frozen dataclasses over numpy arrays, coerced and checked once, here.

Dimension names: T tokens of one sequence, K alternatives per token, V vocabulary, R LoRA rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np

from .errors import InvalidInput

Message: TypeAlias = dict[str, Any]
"""A chat message: at least `role` and `content`, as chat templates read them."""

StopReason = Literal["stop", "length"]


def token_array(tokens: Any, what: str = "tokens") -> np.ndarray:
    """Coerce token ids to int64 `[T]`.

    Raises:
        InvalidInput: not one-dimensional, not integers, or a negative id.
    """
    if isinstance(tokens, ModelInput):
        return tokens.tokens
    array = np.asarray(tokens)
    if array.size == 0:
        array = array.astype(np.int64)
    if array.ndim != 1:
        raise InvalidInput(f"{what} must be one-dimensional, got shape {array.shape}")
    if not np.issubdtype(array.dtype, np.integer):
        raise InvalidInput(f"{what} must be integer token ids, got dtype {array.dtype}")
    if array.size and array.min() < 0:
        raise InvalidInput(f"{what} holds a negative token id at position {int(array.argmin())}")
    return array.astype(np.int64, copy=False)


@dataclass(frozen=True, eq=False)
class ModelInput:
    """Tokens fed to the model, int64 `[T]`."""

    tokens: np.ndarray

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", token_array(self.tokens, "model_input"))

    @classmethod
    def from_ints(cls, tokens: Sequence[int]) -> ModelInput:
        return cls(np.asarray(tokens))

    def to_ints(self) -> list[int]:
        return self.tokens.tolist()

    @property
    def length(self) -> int:
        return len(self.tokens)

    def __len__(self) -> int:
        return len(self.tokens)


TokensLike: TypeAlias = ModelInput | Sequence[int] | np.ndarray


@dataclass(frozen=True, eq=False)
class Datum:
    """One training sequence, already shifted: position `t` of every input belongs to the
    prediction of `target_tokens[t]` from `model_input[: t + 1]`.

    `loss_fn_inputs` holds arrays of length T (`target_tokens` int64; `weights`, `logprobs`,
    `advantages`, ... float32). torch tensors and lists are accepted and copied to numpy.
    """

    model_input: ModelInput
    loss_fn_inputs: Mapping[str, np.ndarray]

    def __post_init__(self) -> None:
        if not isinstance(self.model_input, ModelInput):
            object.__setattr__(self, "model_input", ModelInput(self.model_input))
        inputs = {}
        for name, value in dict(self.loss_fn_inputs).items():
            array = np.asarray(value)
            if array.dtype.kind not in "biuf":
                raise InvalidInput(f"loss_fn_inputs[{name!r}] is not numeric: dtype {array.dtype}")
            if array.dtype.kind == "f":
                array = array.astype(np.float32, copy=False)
            inputs[name] = array
        object.__setattr__(self, "loss_fn_inputs", inputs)


@dataclass(frozen=True)
class LoraConfig:
    """What a run trains: `W + alpha / rank * B A` on the chosen groups of linear layers.

    `alpha` defaults to 32 whatever the rank, so that one learning rate serves all ranks
    (Schulman et al., "LoRA Without Regret", 2025).
    """

    rank: int = 32
    alpha: float = 32.0
    seed: int | None = None
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise InvalidInput(f"rank must be an integer of at least 1, got {self.rank!r}")
        if not np.isfinite(self.alpha) or self.alpha <= 0:
            raise InvalidInput(f"alpha must be a positive number, got {self.alpha!r}")
        if not (self.train_attn or self.train_mlp or self.train_unembed):
            raise InvalidInput("set at least one of train_attn, train_mlp, train_unembed")


@dataclass(frozen=True)
class AdamParams:
    """Adam with decoupled weight decay (Loshchilov & Hutter, 2019), Tinker's defaults.

    `grad_clip_norm` is the largest global L2 norm of the gradient; 0 turns clipping off.
    """

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0

    def __post_init__(self) -> None:
        for name in ("learning_rate", "eps", "weight_decay", "grad_clip_norm"):
            value = getattr(self, name)
            if not np.isfinite(value) or value < 0:
                raise InvalidInput(f"AdamParams.{name} must be finite and >= 0, got {value!r}")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise InvalidInput(f"AdamParams.{name} must be in [0, 1), got {value!r}")


@dataclass(frozen=True)
class SamplingParams:
    """How to sample. Stop tokens and stop strings are part of the returned tokens.

    `stop=None` stops at the tokenizer's end tokens; `stop=[]` at nothing but `max_tokens`;
    strings or token ids replace the end tokens. `temperature=0` is greedy. `top_k=-1` and
    `top_p=1` are off. `seed` makes a request repeatable whatever else is in the batch; sample
    `i` of a request uses a stream of its own.
    """

    max_tokens: int | None = None
    seed: int | None = None
    stop: str | Sequence[str | int] | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise InvalidInput(f"max_tokens must be at least 1, got {self.max_tokens}")
        if not np.isfinite(self.temperature) or self.temperature < 0:
            raise InvalidInput(f"temperature must be finite and >= 0, got {self.temperature}")
        if self.top_k != -1 and self.top_k < 1:
            raise InvalidInput(f"top_k must be -1 (off) or at least 1, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise InvalidInput(f"top_p must be in (0, 1], got {self.top_p}")
        if self.seed is not None and self.seed < 0:
            raise InvalidInput(f"seed must be >= 0, got {self.seed}")
        kinds = {type(item) for item in self.stop_list}
        if not (kinds <= {str} or kinds <= {int}):
            raise InvalidInput("stop must hold strings or token ids, not both")
        if self.stop is not None and not isinstance(self.stop, str):
            object.__setattr__(self, "stop", self.stop_list)

    @property
    def stop_list(self) -> list[Any]:
        if self.stop is None:
            return []
        if isinstance(self.stop, str):
            return [self.stop]
        return [int(s) if isinstance(s, np.integer) else s for s in self.stop]

    @property
    def stop_strings(self) -> list[str]:
        return [s for s in self.stop_list if isinstance(s, str)]

    @property
    def stop_tokens(self) -> list[int]:
        return [s for s in self.stop_list if isinstance(s, int)]


@dataclass(frozen=True)
class PolicyRef:
    """Which weights sample: a base model, or a run's adapter at one version or live.

    `run_id=None` is the bare base model. `version=None` with a run is live: the newest
    published version, also for tokens still to come of a request under way.
    """

    run_id: str | None = None
    version: int | None = None


@dataclass(frozen=True, eq=False)
class SampleRequest:
    """One call of `SamplingClient.sample`, as the sampling engines take it."""

    prompt: np.ndarray
    params: SamplingParams = SamplingParams()
    policy: PolicyRef = PolicyRef()
    num_samples: int = 1
    prompt_logprobs: bool = False
    topk_prompt_logprobs: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", token_array(self.prompt, "prompt"))
        if len(self.prompt) == 0:
            raise InvalidInput("prompt is empty: give at least one token")
        if self.num_samples < 1:
            raise InvalidInput(f"num_samples must be at least 1, got {self.num_samples}")
        if self.topk_prompt_logprobs < 0:
            raise InvalidInput(
                f"topk_prompt_logprobs must be >= 0, got {self.topk_prompt_logprobs}"
            )


@dataclass(frozen=True, eq=False)
class SampledSequence:
    """One completion: tokens int64 `[T]`, logprobs float32 `[T]` of the temperature-scaled
    distribution (before top_k and top_p), versions int32 `[T]` of the policy per token."""

    tokens: np.ndarray
    logprobs: np.ndarray
    versions: np.ndarray
    stop_reason: StopReason


@dataclass(frozen=True, eq=False)
class SampleResponse:
    """`prompt_logprobs` is float32 `[T]`, NaN at position 0; `topk_prompt_logprobs[t]` lists
    (token id, logprob) of the K likeliest tokens at `t`, None at position 0."""

    sequences: list[SampledSequence]
    prompt_logprobs: np.ndarray | None = None
    topk_prompt_logprobs: list[list[tuple[int, float]] | None] | None = None
    prompt_cache_hit_tokens: int = 0


@dataclass(frozen=True)
class SampledToken:
    """One streamed token; `stop_reason` is set on the last one of its sequence."""

    index: int
    token: int
    logprob: float
    version: int
    stop_reason: StopReason | None = None


@dataclass(frozen=True, eq=False)
class ForwardBackwardOutput:
    """`loss_fn_outputs[i]["logprobs"]` is float32 in the shape of datum i's `target_tokens`.
    Metrics are named `name:reduction`, as Tinker's are; `loss:sum` is always there."""

    loss_fn_outputs: list[dict[str, np.ndarray]]
    metrics: dict[str, float]


@dataclass(frozen=True)
class OptimStepResponse:
    """`version` is the run's version after the step."""

    version: int
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class SaveResponse:
    path: str


@dataclass(frozen=True)
class PublishResponse:
    """An adapter version that the samplers now hold in memory."""

    version: int
    seconds: float


@dataclass(frozen=True)
class SupportedModel:
    model_name: str
    max_context_length: int
    trainable: bool = True
    sampleable: bool = True


@dataclass(frozen=True)
class ServerCapabilities:
    supported_models: list[SupportedModel]
    losses: list[str]


@dataclass(frozen=True)
class TrainingRun:
    """What the registry knows of a run. Times are Unix seconds."""

    run_id: str
    base_model: str
    lora: LoraConfig
    created: float
    last_request: float
    user_metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """An immutable checkpoint; `kind` is `weights` (with optimizer) or `sampler_weights`.

    It is deleted at `expires` (Unix seconds; None: never). Where users have keys, a `public` one
    can be read by all of them.
    """

    path: str
    run_id: str
    kind: str
    name: str
    version: int
    created: float
    size_bytes: int
    user_metadata: dict[str, Any] = field(default_factory=dict)
    expires: float | None = None
    public: bool = False


@dataclass(frozen=True)
class TrainingInfo:
    """`get_info`: the run, its base model's facts, and where its log stands."""

    run_id: str
    base_model: str
    model_path: str
    lora: LoraConfig
    version: int
    max_context_length: int
    vocab_size: int
    num_parameters: int


@dataclass(frozen=True, eq=False)
class Segment:
    """One growing token sequence of a trajectory, all arrays `[T]`.

    `tokens` int64; `mask` bool, true where the policy sampled; `logprobs` float32 and
    `versions` int32 as sampled, 0 and -1 where `mask` is false.
    """

    tokens: np.ndarray
    mask: np.ndarray
    logprobs: np.ndarray
    versions: np.ndarray


@dataclass(frozen=True, eq=False)
class Trajectory:
    """One agent's episode. More than one segment means that the chat template rewrote its
    past between turns, so that the token sequence did not simply grow."""

    segments: list[Segment]
    rewards: list[float]
    terminated: bool
    truncated: bool
    messages: list[Message]
    info: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    seconds: float = 0.0

    @property
    def reward(self) -> float:
        """Undiscounted return of the episode."""
        return float(sum(self.rewards))

    @property
    def num_sampled_tokens(self) -> int:
        return int(sum(segment.mask.sum() for segment in self.segments))

    @property
    def oldest_version(self) -> int:
        """The oldest policy version that sampled a token; -1 when nothing was sampled."""
        versions = [s.versions[s.mask] for s in self.segments if s.mask.any()]
        return int(min(v.min() for v in versions)) if versions else -1
