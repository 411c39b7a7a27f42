"""The training client that a new run begins with: a fresh adapter, or a checkpoint's weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from ..primitives.client import ServiceClient, TrainingClient
from ..primitives.errors import InvalidInput
from ..primitives.types import ExpertAdapters
from .config import TrainConfig
from .fit_config import FitConfig


async def new_training_client(
    service: ServiceClient, config: TrainConfig | FitConfig, about: Mapping[str, Any]
) -> TrainingClient:
    """`about` becomes the run's `user_metadata`.

    Raises:
        InvalidInput: `config.start` is a checkpoint of another base model.
        NotFound: there is no such checkpoint or model.
    """
    if not config.start:
        return await service.create_lora_training_client(
            config.model,
            rank=config.rank,
            alpha=config.alpha,
            seed=config.seed,
            train_attn=config.train_attn,
            train_mlp=config.train_mlp,
            train_unembed=config.train_unembed,
            train_router=config.train_router,
            experts=cast(ExpertAdapters, config.experts),
            user_metadata=about,
        )
    training = await service.create_training_client_from_state(config.start, user_metadata=about)
    if training.base_model != config.model:
        await service.delete_training_run(training.run_id)
        raise InvalidInput(
            f"{type(config).__name__}.start is a checkpoint of {training.base_model}, "
            f"not of {config.model}"
        )
    return training
