"""Tinsmith: asynchronous, actor-based RL post-training of language models, in four primitives.

Names are loaded when first used, so that `import tinsmith` is cheap (environment processes
import it by the dozen).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .actors.cluster import connect
    from .actors.placement import Placement
    from .actors.scaling import Replicas
    from .algorithms.config import TrainConfig
    from .algorithms.evaluate import EvalResult, evaluate
    from .algorithms.train import TrainResult, Watcher, resume, train
    from .engines.models import resolve_model
    from .engines.vllm_start import VllmOptions
    from .envs.episode import EpisodeLimits, EpisodeSpec
    from .envs.match import MatchSpec
    from .envs.scripted import Scripted
    from .primitives.client import EnvClient, SamplingClient, ServiceClient, TrainingClient
    from .primitives.errors import (
        Busy,
        CorruptLog,
        EnvironmentFailure,
        InvalidInput,
        NotFound,
        OpCancelled,
        OperationCrashed,
        OutOfCapacity,
        RolloutFailure,
        StorageFailure,
        TinsmithError,
        Unavailable,
    )
    from .primitives.op import Op
    from .primitives.paths import default_home
    from .primitives.trajectory_json import trajectory_from_json
    from .primitives.types import (
        AdamParams,
        Checkpoint,
        Datum,
        ForwardBackwardOutput,
        LoraConfig,
        Match,
        ModelInput,
        OptimStepResponse,
        PolicyRef,
        SampledSequence,
        SampledToken,
        SampleResponse,
        SamplingParams,
        SaveResponse,
        Segment,
        ServerCapabilities,
        TokenLogprobs,
        TrainingInfo,
        TrainingRun,
        Trajectory,
    )

_HOMES = {
    "actors.cluster": ["connect"],
    "actors.placement": ["Placement"],
    "actors.scaling": ["Replicas"],
    "algorithms.config": ["TrainConfig"],
    "algorithms.evaluate": ["EvalResult", "evaluate"],
    "algorithms.train": ["TrainResult", "Watcher", "resume", "train"],
    "engines.models": ["resolve_model"],
    "engines.vllm_start": ["VllmOptions"],
    "envs.episode": ["EpisodeLimits", "EpisodeSpec"],
    "envs.match": ["MatchSpec"],
    "envs.scripted": ["Scripted"],
    "primitives.client": ["EnvClient", "SamplingClient", "ServiceClient", "TrainingClient"],
    "primitives.errors": [
        "Busy",
        "CorruptLog",
        "EnvironmentFailure",
        "InvalidInput",
        "NotFound",
        "OpCancelled",
        "OperationCrashed",
        "OutOfCapacity",
        "RolloutFailure",
        "StorageFailure",
        "TinsmithError",
        "Unavailable",
    ],
    "primitives.op": ["Op"],
    "primitives.paths": ["default_home"],
    "primitives.trajectory_json": ["trajectory_from_json"],
    "primitives.types": [
        "AdamParams",
        "Checkpoint",
        "Datum",
        "ForwardBackwardOutput",
        "LoraConfig",
        "Match",
        "ModelInput",
        "OptimStepResponse",
        "PolicyRef",
        "SampleResponse",
        "SampledSequence",
        "SampledToken",
        "SamplingParams",
        "SaveResponse",
        "Segment",
        "ServerCapabilities",
        "TokenLogprobs",
        "TrainingInfo",
        "TrainingRun",
        "Trajectory",
    ],
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}
_ROOMS = ("primitives", "envs", "algorithms", "engines", "actors", "gateway", "cli")

__all__ = list(_HOME_OF)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
    if name in _ROOMS:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
