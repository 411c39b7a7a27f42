"""The JSON requests of the Tinker API. Unknown fields are ignored, as clients grow before servers.

Values are checked where they are used, so that a bad one fails its own operation and takes its
place in the run's log.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from ..primitives.errors import InvalidInput
from ..primitives.types import AdamParams, LoraConfig, SamplingParams
from .wire import fill_csr


def _sendable(value: Any) -> Any:
    """What came in as JSON must go out as JSON: no NaN, no half of a surrogate pair."""
    json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    return value


MAX_SEQ_ID = 1 << 62
Name = Annotated[str, Field(min_length=1, max_length=512), AfterValidator(_sendable)]
SeqId = Annotated[int, Field(ge=0, lt=MAX_SEQ_ID)]
Metadata = Annotated[dict[str, Any], AfterValidator(_sendable)]
Text = Annotated[str, AfterValidator(_sendable)]
MAX_RANK = 4096


def strings(metadata: Metadata) -> dict[str, str]:
    """Metadata as the API keeps it: its values are texts."""
    return {key: str(value) for key, value in metadata.items()}


class Body(BaseModel):
    model_config = ConfigDict(protected_namespaces=())


class CreateSession(Body):
    tags: list[str] = []
    user_metadata: Metadata | None = None
    sdk_version: str = ""
    project_id: str | None = None
    display_name: Text | None = None


class SessionRef(Body):
    session_id: Name


class FinishReason(Body):
    type: Literal["success", "errored", "interrupted"] = "success"


class FinishSession(Body):
    reason: FinishReason = FinishReason()
    detail: Text | None = None


class Lora(Body):
    rank: int = 32
    seed: int | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True

    def config(self) -> LoraConfig:
        """
        Raises:
            InvalidInput: settings that cannot be, or a rank that would fill the server's memory.
        """
        if self.rank > MAX_RANK:
            raise InvalidInput(f"rank must be at most {MAX_RANK}, got {self.rank}")
        return LoraConfig(
            rank=self.rank,
            seed=self.seed,
            train_attn=self.train_attn,
            train_mlp=self.train_mlp,
            train_unembed=self.train_unembed,
        )


class OptimizerConfig(BaseModel):
    model_config = ConfigDict(extra="allow")
    type: str = "adamw"

    def check(self) -> None:
        """
        Raises:
            InvalidInput: an optimizer that there is not.
        """
        if self.type != "adamw":
            raise InvalidInput(f"optimizer {self.type!r} is not supported: use adamw")


class CreateModel(Body):
    session_id: Name
    model_seq_id: SeqId
    base_model: Name
    user_metadata: Metadata | None = None
    lora_config: Lora | None = None
    optimizer_config: OptimizerConfig = OptimizerConfig()


class LoadWeights(Body):
    path: Name
    optimizer: bool = False
    session_id: Name | None = None
    model_seq_id: SeqId | None = None
    model_id: Name | None = None
    seq_id: SeqId | None = None
    base_model: Name | None = None
    user_metadata: Metadata | None = None
    optimizer_config: OptimizerConfig | None = None
    weights_access_token: str | None = None


class ModelRef(Body):
    model_id: Name


class Adam(Body):
    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0

    def params(self) -> AdamParams:
        return AdamParams(**self.model_dump())


class OptimStep(Body):
    model_id: Name
    seq_id: SeqId
    adam_params: Adam | None = None
    optimizer_params: OptimizerConfig | None = None

    def params(self) -> AdamParams:
        """
        Raises:
            InvalidInput: an optimizer that there is not, or bad settings.
        """
        if self.optimizer_params is not None:
            self.optimizer_params.check()
        return (self.adam_params or Adam()).params()


class SaveWeights(Body):
    model_id: Name
    seq_id: SeqId
    path: Name | None = None
    ttl_seconds: int | None = None
    overwrite: bool = False
    user_metadata: Metadata | None = None
    sampling_session_seq_id: SeqId | None = None
    kind: Literal["snapshot", "inflight"] = "snapshot"
    age_encryption_recipients: list[str] | None = None


class CreateSamplingSession(Body):
    session_id: Name
    sampling_session_seq_id: SeqId
    base_model: Name | None = None
    model_path: Name | None = None


class SamplingSessionRef(Body):
    sampling_session_id: Name


class Chunk(BaseModel):
    model_config = ConfigDict(extra="allow")
    type: str = "encoded_text"
    tokens: list[Annotated[int, Field(ge=0, lt=1 << 31)]] | None = None


class Prompt(Body):
    chunks: list[Chunk]

    @property
    def size(self) -> int:
        """Tokens of all its chunks."""
        return sum(len(chunk.tokens or ()) for chunk in self.chunks)

    def tokens(self) -> np.ndarray:
        """Int64 `[T]`.

        Raises:
            InvalidInput: a chunk that is not text, or no token at all.
        """
        tokens: list[int] = []
        for index, chunk in enumerate(self.chunks):
            if chunk.type != "encoded_text" or chunk.tokens is None:
                raise InvalidInput(
                    f"prompt chunk {index} is of kind {chunk.type!r}: only encoded_text is supported"
                )
            tokens += chunk.tokens
        if not tokens:
            raise InvalidInput("the prompt is empty")
        return np.array(tokens, np.int64)


class Sampling(Body):
    max_tokens: int | None = None
    seed: int | None = None
    stop: str | list[str] | list[int] | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0

    def params(self) -> SamplingParams:
        return SamplingParams(**self.model_dump())


class Tensor(Body):
    """A tensor in JSON, dense or in compressed sparse rows."""

    data: list[int] | list[float]
    dtype: Literal["int64", "float32"]
    shape: list[Annotated[int, Field(ge=0, lt=1 << 31)]] | None = None
    sparse_crow_indices: list[int] | None = None
    sparse_col_indices: list[int] | None = None

    def array(self, pad: int, max_size: int) -> np.ndarray:
        """The dense array, `pad` where nothing is listed.

        Raises:
            InvalidInput: data that do not fit the shape, or more than `max_size` values.
        """
        try:
            values = np.array(self.data, self.dtype)
        except OverflowError:
            raise InvalidInput(f"a value does not fit {self.dtype}") from None
        shape = tuple(self.shape) if self.shape is not None else values.shape
        if int(np.prod(shape, dtype=object)) > max_size:
            raise InvalidInput(f"shape {list(shape)} has more than {max_size} values")
        if self.sparse_crow_indices is None:
            if int(np.prod(shape)) != values.size:
                raise InvalidInput(f"{values.size} values do not fill shape {list(shape)}")
            return values.reshape(shape)
        if len(shape) != 2:
            raise InvalidInput("a sparse tensor needs a shape of two dimensions")
        try:
            rows = np.array(self.sparse_crow_indices, np.int64)
            columns = np.array(self.sparse_col_indices or [], np.int64)
        except OverflowError:
            raise InvalidInput("an index does not fit int64") from None
        return fill_csr(values, rows, columns, shape, pad)


class Sample(Body):
    sampling_session_id: Name
    seq_id: SeqId
    prompt: Prompt
    num_samples: Annotated[int, Field(ge=1, le=4096)] = 1
    sampling_params: Sampling = Sampling()
    prompt_logprobs: bool | None = None
    topk_prompt_logprobs: Annotated[int, Field(ge=0, le=1024)] = 0
    topk_sample_logprobs: Annotated[int, Field(ge=0, le=1024)] = 0
    target_prompt_logprobs: Tensor | None = None
    prompt_alt_tokens_k: Annotated[int, Field(ge=0, le=1024)] = 0
    prompt_logprobs_last_n: int | None = None
    record_stability_info: bool | None = None


class RetrieveFuture(Body):
    request_id: Name
    allow_metadata_only: bool = False


class FuturesTarget(Body):
    sampling_session_id: Name
    cloned_sampler_id: SeqId = 0


class RetrieveFutures(Body):
    target: FuturesTarget
    prev_cursor: SeqId = 0
    timeout: float | None = None
    retrieved_request_ids: list[str] = []


class RequestRef(Body):
    request_id: Name


class WeightsInfo(Body):
    tinker_path: Name


class CopyWeights(Body):
    source_path: Name
    session_id: Name | None = None
    model_seq_id: SeqId | None = None
    destination_project_id: str | None = None
    ttl_seconds: int | None = None


class SetTtl(Body):
    ttl_seconds: int | None = None


class StatusQuery(Body):
    type: str = ""
    reasons: list[str] | None = None


class SearchSessions(Body):
    session_id: str | None = None
    display_name: Text | None = None
    user_metadata: Metadata = {}
    limit: Annotated[int, Field(ge=1, le=200)] = 50
    cursor: dict[str, Any] | None = None
    statuses: list[StatusQuery] | None = None
