"""The vocabulary: frozen dataclasses over numpy arrays, coerced and checked once, here.

Dimension names: T tokens of one sequence, K alternatives per token, V vocabulary, R LoRA rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from .arguments import check_flag, check_integer, check_number, check_text
from .errors import InvalidInput

Message: TypeAlias = dict[str, Any]
"""A chat message: at least `role` and `content`, as chat templates read them."""

StopReason = Literal["stop", "length"]
ExpertAdapters = Literal["each", "shared"]
MAX_SEED = (1 << 63) - 1
ROUTED_EXPERTS = "routed_experts"


def as_array(values: Any, what: str) -> np.ndarray:
    """
    Raises:
        InvalidInput: lists of several lengths, or nothing that numpy takes.
    """
    try:
        return np.asarray(values)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise InvalidInput(f"{what} is no array: {error}") from None


def token_array(tokens: Any, what: str = "tokens") -> np.ndarray:
    """Coerce token ids to int64 `[T]`.

    Raises:
        InvalidInput: not one-dimensional, not integers, or a negative id.
    """
    if isinstance(tokens, ModelInput):
        return tokens.tokens
    array = as_array(tokens, what)
    if array.size == 0:
        array = array.astype(np.int64)
    if array.ndim != 1:
        raise InvalidInput(f"{what} must be one-dimensional, got shape {array.shape}")
    if not np.issubdtype(array.dtype, np.integer):
        raise InvalidInput(f"{what} must be integer token ids, got dtype {array.dtype}")
    array = array.astype(np.int64, copy=False)
    if array.size and array.min() < 0:  # or beyond int64, in uint64
        raise InvalidInput(f"{what} holds a negative token id at position {int(array.argmin())}")
    return array


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
    `advantages`, ... float32). For `cross_entropy`, `target_tokens` and `weights` may also be
    `[T, K]`: K weighted targets per position (soft targets), with weight 0 where there are fewer.
    For mixtures of experts, `routed_experts` `[T, layers, k]` may be there too, integers: the experts that
    each token is to go through, as a `SampledSequence` has them; -1 where the router is to choose.
    torch tensors and lists are accepted and copied to numpy.
    """

    model_input: ModelInput
    loss_fn_inputs: Mapping[str, np.ndarray]

    def __post_init__(self) -> None:
        if not isinstance(self.model_input, ModelInput):
            object.__setattr__(self, "model_input", ModelInput(self.model_input))
        if not isinstance(self.loss_fn_inputs, Mapping):
            raise InvalidInput(
                f"loss_fn_inputs must map names to arrays, got {self.loss_fn_inputs!r}"
            )
        inputs = {}
        for name, value in self.loss_fn_inputs.items():
            check_text("the name of a loss_fn_input", name)
            array = as_array(value, f"loss_fn_inputs[{name!r}]")
            if array.dtype.kind not in "biuf":
                raise InvalidInput(f"loss_fn_inputs[{name!r}] is not numeric: dtype {array.dtype}")
            if array.dtype.kind == "f":
                array = array.astype(np.float32, copy=False)
            inputs[name] = array
        object.__setattr__(self, "loss_fn_inputs", inputs)

    @property
    def nbytes(self) -> int:
        arrays = self.loss_fn_inputs.values()
        return 8 * self.model_input.length + sum(array.nbytes for array in arrays)


def _check_seed(seed: int | None) -> None:
    if seed is not None:
        check_integer("seed", seed)
    if seed is not None and not 0 <= seed <= MAX_SEED:
        raise InvalidInput(f"seed must be between 0 and 2**63 - 1, got {seed}")


@dataclass(frozen=True)
class LoraConfig:
    """What a run trains: `W + alpha / rank * B A` on the chosen groups of linear layers.

    `alpha` defaults to 32 whatever the rank, so that one learning rate serves all ranks
    (Schulman et al., "LoRA Without Regret", 2025).

    Attributes:
        train_mlp: the MLP layers, routed experts among them.
        train_router: the routers of a mixture-of-experts model, which choose experts.
        experts: "each" routed expert has an A and B of this rank of its own, or all those of a layer
            have "shared" ones, E times fewer parameters.
    """

    rank: int = 32
    alpha: float = 32.0
    seed: int | None = None
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True
    train_router: bool = False
    experts: ExpertAdapters = "each"

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise InvalidInput(f"rank must be an integer of at least 1, got {self.rank!r}")
        check_number("alpha", self.alpha)
        if not np.isfinite(float(self.alpha)) or self.alpha <= 0:
            raise InvalidInput(f"alpha must be a positive number, got {self.alpha!r}")
        if not isinstance(self.experts, str) or self.experts not in get_args(ExpertAdapters):
            raise InvalidInput(f'experts must be "each" or "shared", got {self.experts!r}')
        groups = ("train_attn", "train_mlp", "train_unembed", "train_router")
        for group in groups:
            check_flag(group, getattr(self, group))
        if not any(getattr(self, group) for group in groups):
            raise InvalidInput(f"set at least one of {', '.join(groups)}")
        _check_seed(self.seed)


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
            check_number(f"AdamParams.{name}", value)
            if not np.isfinite(float(value)) or value < 0:
                raise InvalidInput(f"AdamParams.{name} must be finite and >= 0, got {value!r}")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            check_number(f"AdamParams.{name}", value)
            if not 0 <= value < 1:
                raise InvalidInput(f"AdamParams.{name} must be in [0, 1), got {value!r}")


@dataclass(frozen=True)
class SamplingParams:
    """How to sample. Stop tokens and stop strings are part of the returned tokens.

    `stop=None` stops at the tokenizer's end tokens; `stop=[]` at nothing but `max_tokens`;
    strings or token ids replace the end tokens. `temperature=0` is greedy. `top_k=-1` and
    `top_p=1` are off. `seed` makes a request repeatable whatever else is in the batch; sample
    `i` of a request uses a stream of its own.

    `return_routed_experts`: of a mixture of experts on the torch engine, tell with each sample which experts
    its tokens went through, so that training can replay them.
    """

    max_tokens: int | None = None
    seed: int | None = None
    stop: str | Sequence[str | int] | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    return_routed_experts: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            check_integer("max_tokens", self.max_tokens)
        check_number("temperature", self.temperature)
        check_integer("top_k", self.top_k)
        check_number("top_p", self.top_p)
        check_flag("return_routed_experts", self.return_routed_experts)
        if self.max_tokens is not None and self.max_tokens < 1:
            raise InvalidInput(f"max_tokens must be at least 1, got {self.max_tokens}")
        if not np.isfinite(float(self.temperature)) or self.temperature < 0:
            raise InvalidInput(f"temperature must be finite and >= 0, got {self.temperature}")
        if self.top_k != -1 and not 1 <= self.top_k < 2**31:
            raise InvalidInput(f"top_k must be -1 (off) or from 1 to 2**31 - 1, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise InvalidInput(f"top_p must be in (0, 1], got {self.top_p}")
        _check_seed(self.seed)
        listed = isinstance(self.stop, np.ndarray) and self.stop.ndim == 1
        if self.stop is not None and not listed and not isinstance(self.stop, str | Sequence):
            raise InvalidInput(f"stop must be a string or a list, got {self.stop!r}")
        kinds = {type(item) for item in self.stop_list}
        if not (kinds <= {str} or kinds <= {int}):
            raise InvalidInput("stop must hold strings or token ids, not both")
        if any(not 0 <= token < 1 << 31 for token in self.stop_tokens):
            raise InvalidInput(f"stop holds what is no token id: {self.stop!r}")
        for stop in self.stop_strings:
            try:
                stop.encode()
            except UnicodeEncodeError as error:
                raise InvalidInput(f"stop must hold valid Unicode: {error}") from None
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
    """One call of `SamplingClient.sample`, as the sampling engines take it.

    `target_prompt_logprobs` int64 `[T - 1, K]`: row i names tokens to score at prompt position
    i + 1; -1 names none. `request_id` names the request in logs and crash reports, `traceparent` (W3C's)
    the span that it belongs to; neither changes what is sampled.
    """

    prompt: np.ndarray
    params: SamplingParams = SamplingParams()
    policy: PolicyRef = PolicyRef()
    num_samples: int = 1
    prompt_logprobs: bool = False
    topk_prompt_logprobs: int = 0
    prompt_logprobs_last_n: int | None = None
    target_prompt_logprobs: np.ndarray | None = None
    prompt_alt_tokens_k: int = 0
    topk_sample_logprobs: int = 0
    request_id: str = ""
    traceparent: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", token_array(self.prompt, "prompt"))
        if not isinstance(self.params, SamplingParams):
            raise InvalidInput(f"sampling_params must be SamplingParams, got {self.params!r}")
        check_flag("prompt_logprobs", self.prompt_logprobs)
        check_integer("num_samples", self.num_samples)
        length = len(self.prompt)
        if length == 0:
            raise InvalidInput("prompt is empty: give at least one token")
        if self.num_samples < 1:
            raise InvalidInput(f"num_samples must be at least 1, got {self.num_samples}")
        for name in ("topk_prompt_logprobs", "prompt_alt_tokens_k", "topk_sample_logprobs"):
            check_integer(name, getattr(self, name))
            if getattr(self, name) < 0:
                raise InvalidInput(f"{name} must be >= 0, got {getattr(self, name)}")
        last_n = self.prompt_logprobs_last_n
        if last_n is not None:
            check_integer("prompt_logprobs_last_n", last_n)
        if last_n is not None and not (self.prompt_logprobs or self.topk_prompt_logprobs):
            raise InvalidInput("prompt_logprobs_last_n needs prompt_logprobs")
        if last_n is not None and not 1 <= last_n < length:
            raise InvalidInput(
                f"prompt_logprobs_last_n must be from 1 to {length - 1}, one less than the "
                f"prompt's length, got {last_n}"
            )
        if self.target_prompt_logprobs is not None:
            targets = _prompt_targets(self.target_prompt_logprobs, length)
            object.__setattr__(self, "target_prompt_logprobs", targets)


def _prompt_targets(tokens: Any, length: int) -> np.ndarray:
    what = "target_prompt_logprobs"
    array = as_array(tokens, what)
    if array.ndim != 2 or len(array) != length - 1:
        raise InvalidInput(
            f"{what} must have shape [{length - 1}, K], a row for every prompt token but the "
            f"first, got {list(array.shape)}"
        )
    if not np.issubdtype(array.dtype, np.integer):
        raise InvalidInput(f"{what} must be integer token ids, got dtype {array.dtype}")
    if not (array >= 0).any():
        raise InvalidInput(f"{what} names no token: every cell is -1")
    if array.min() < -1:
        row, column = np.argwhere(array < -1)[0].tolist()
        raise InvalidInput(f"{what} holds {array[row, column]} at position {row}, {column}")
    return array.astype(np.int64, copy=False)


@dataclass(frozen=True, eq=False)
class TokenLogprobs:
    """K tokens at each of N positions, int64 `[N, K]`, and their logprobs, float32 `[N, K]`.
    Where nothing was computed: token 0, logprob NaN."""

    tokens: np.ndarray
    logprobs: np.ndarray

    @classmethod
    def empty(cls, positions: int, k: int) -> TokenLogprobs:
        shape = (positions, k)
        return cls(np.zeros(shape, np.int64), np.full(shape, np.nan, np.float32))


@dataclass(frozen=True, eq=False)
class SampledSequence:
    """One completion: tokens int64 `[T]`, logprobs float32 `[T]` of the temperature-scaled
    distribution (before top_k and top_p), versions int32 `[T]` of the policy per token, and, if
    asked for, the K likeliest tokens of that distribution per token, likeliest first.

    `routed_experts`, if asked for: the experts that each of the P prompt tokens and of the sampled ones but
    the last, which is never fed to the model, went through: uint8 or int16 `[P + T - 1, layers, k]`.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    versions: np.ndarray
    stop_reason: StopReason
    topk_logprobs: TokenLogprobs | None = None
    routed_experts: np.ndarray | None = None

    @classmethod
    def of(cls, tokens: Sequence[SampledToken]) -> SampledSequence:
        """What one sequence's streamed tokens make; cut short, it counts as out of length."""
        k = len(tokens[0].topk_logprobs) if tokens else 0
        pairs = np.array([t.topk_logprobs for t in tokens]).reshape(len(tokens), k, 2)
        top = TokenLogprobs(pairs[..., 0].astype(np.int64), pairs[..., 1].astype(np.float32))
        return cls(
            np.array([t.token for t in tokens], np.int64),
            np.array([t.logprob for t in tokens], np.float32),
            np.array([t.version for t in tokens], np.int32),
            (tokens[-1].stop_reason if tokens else None) or "length",
            top if k else None,
        )


@dataclass(frozen=True, eq=False)
class SampleResponse:
    """The samples, and what was asked about the prompt's P tokens; logprobs of prompt tokens are at
    temperature 1 whatever the request's.

    Attributes:
        prompt_logprobs: float32 `[P]`, NaN at position 0 and before the last n, if asked so.
        topk_prompt_logprobs: the K likeliest tokens at each of the P positions, likeliest first;
            empty where `prompt_logprobs` is NaN.
        target_prompt_logprobs: float32 `[P - 1, K]`, 0 where no token was named.
        prompt_alt_tokens: `[P - 1, K]`: row i has K independent draws from the distribution of
            prompt token i + 1, at the request's temperature, with their logprobs at temperature 1.
        prompt_cache_hit_tokens: prompt tokens that were not computed again.
    """

    sequences: list[SampledSequence]
    prompt_logprobs: np.ndarray | None = None
    topk_prompt_logprobs: TokenLogprobs | None = None
    target_prompt_logprobs: np.ndarray | None = None
    prompt_alt_tokens: TokenLogprobs | None = None
    prompt_cache_hit_tokens: int = 0


@dataclass(frozen=True)
class SampledToken:
    """One streamed token; `stop_reason` is set on the last one of its sequence. If asked for,
    `topk_logprobs` are the K likeliest tokens with their logprobs, likeliest first."""

    index: int
    token: int
    logprob: float
    version: int
    stop_reason: StopReason | None = None
    topk_logprobs: tuple[tuple[int, float], ...] = ()


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
class Interrupted:
    """An operation that a process was at when it died: `op` is its number in the run's log, or the
    request's id; `computing`: it was being computed just then, not only held."""

    run: str
    op: int | str
    kind: str
    tokens: int
    seconds: float
    computing: bool

    def __str__(self) -> str:
        named = f" of run {self.run}" if self.run else ""
        what = f" {self.op}" if self.op else ""
        return f"{self.kind}{what}{named}, for {self.seconds:.1f} s"


@dataclass(frozen=True)
class Crash:
    """A process of the service that died, in Unix seconds, and what it was doing."""

    time: float
    process: str
    pid: int
    host: str
    reason: str
    under_way: list[Interrupted]


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
    """An immutable checkpoint; `kind` is `weights` (with optimizer), `sampler_weights`, or
    `external_weights` (a PEFT adapter to take elsewhere).

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
    """`get_info`: the run, its base model's facts, and where its log stands.

    `base_weights`: what the frozen weights are kept in: "fp32", "bf16", "int8" or "nf4".
    """

    run_id: str
    base_model: str
    model_path: str
    lora: LoraConfig
    version: int
    max_context_length: int
    vocab_size: int
    num_parameters: int
    base_weights: str


@dataclass(frozen=True, eq=False)
class Segment:
    """One growing token sequence of a trajectory, all arrays `[T]`.

    `tokens` int64; `mask` bool, true where the policy sampled; `logprobs` float32 and
    `versions` int32 as sampled, 0 and -1 where `mask` is false. If the sampler told,
    `routed_experts` int16 `[T, layers, k]`: the experts that each token went through when it was first
    computed, -1 for those that never were.
    """

    tokens: np.ndarray
    mask: np.ndarray
    logprobs: np.ndarray
    versions: np.ndarray
    routed_experts: np.ndarray | None = None


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


@dataclass(frozen=True, eq=False)
class Match:
    """One episode of a game: every agent's own trajectory, with its own tokens, masks, logprobs
    and rewards. A scripted agent's has messages and rewards but no segments.

    Attributes:
        trajectories: by agent, in the game's order.
        live: the agents played by live policies, whose staleness counts.
        forfeits: why agents could not act, of those that could not.
    """

    trajectories: dict[str, Trajectory]
    live: list[str] = field(default_factory=list)
    forfeits: dict[str, str] = field(default_factory=dict)
    seed: int | None = None
    seconds: float = 0.0

    @property
    def rewards(self) -> dict[str, float]:
        """Every agent's undiscounted return."""
        return {agent: trajectory.reward for agent, trajectory in self.trajectories.items()}

    @property
    def oldest_version(self) -> int:
        """The oldest version of a live policy that sampled a token; -1 when none did."""
        versions = [self.trajectories[agent].oldest_version for agent in self.live]
        return min((version for version in versions if version >= 0), default=-1)
