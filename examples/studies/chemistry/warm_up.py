"""A short supervised warm-up: a small model that has never answered right has nothing to reinforce.

A few batches of the environment's own training questions with their right answers, and no more:
what the model then reaches is where the reinforcement starts from, and is measured as such.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

import tinsmith
from tinsmith.envs import ChatRenderer

from .name_to_formula import NameToFormula

BATCH = 8
LEARNING_RATE = 1e-3


async def warm_up(
    service: tinsmith.ServiceClient, config: tinsmith.TrainConfig, steps: int
) -> tuple[str, list[float]]:
    """The path of a checkpoint after `steps` batches, and each one's loss in nats per token."""
    training = await service.create_lora_training_client(
        config.model,
        rank=config.rank,
        alpha=config.alpha,
        seed=config.seed,
        train_unembed=config.train_unembed,
    )
    folder = tinsmith.resolve_model(config.model, tinsmith.default_home())
    renderer = ChatRenderer.from_model(str(folder))
    env = NameToFormula(**config.env_kwargs)
    losses = []
    for step in track(range(steps), "supervised warm-up", console=Console(stderr=True)):
        seeds = [config.seed * 1_000_003 + step * BATCH + number for number in range(BATCH)]
        data = [answered(renderer, env, seed) for seed in seeds]
        output = training.forward_backward(data, "cross_entropy")  # queued, not awaited
        await training.optim_step(tinsmith.AdamParams(LEARNING_RATE, grad_clip_norm=1.0))
        losses.append((await output).metrics["loss:sum"])
    saved = await training.save_state("warm-up")
    return saved.path, losses


def answered(renderer: ChatRenderer, env: NameToFormula, seed: int) -> tinsmith.Datum:
    """A question with its right answer and the end of the turn, whose tokens weigh alike."""
    messages, _ = env.reset(seed=seed)
    prompt: list[int] = renderer.tokens(renderer.text(messages))
    end: Any = renderer.tokenizer.eos_token_id
    answer = [*renderer.tokens(env.row["formula"]), end]
    tokens = np.array([*prompt, *answer])
    weights = np.zeros(len(tokens) - 1)
    weights[-len(answer) :] = 1 / (len(answer) * BATCH)
    return tinsmith.Datum(tokens[:-1], {"target_tokens": tokens[1:], "weights": weights})
