"""Before reinforcement can choose among moves, a player must make some: imitate those of scripts.

The scripts play at random or carelessly, so that this teaches how a move is written and little
about which is good.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import track

import tinsmith
from tinsmith.algorithms.chat_data import AnswerRenderer, Chat, chat_sequences


def imitation_datums(
    renderer: AnswerRenderer, transcripts: Sequence[list[dict[str, Any]]]
) -> list[tinsmith.Datum]:
    """A cross-entropy datum per transcript, in the tokens that sampling would have made; the mean
    over all of an assistant's tokens. Transcripts in which it never spoke are left out."""
    spoken = [chat for chat in transcripts if any(m["role"] == "assistant" for m in chat)]
    sequences = [pair for chat in spoken for pair in chat_sequences(renderer, Chat(chat))]
    total = sum(mask.sum() for _, mask in sequences)
    return [
        tinsmith.Datum(tokens[:-1], {"target_tokens": tokens[1:], "weights": mask[1:] / total})
        for tokens, mask in sequences
    ]


async def imitate(
    training: tinsmith.TrainingClient,
    transcripts: Sequence[list[dict[str, Any]]],
    *,
    steps: int,
    learning_rate: float,
    batch_size: int = 24,
) -> float:
    """`steps` steps of supervised fine-tuning, each on `batch_size` of the transcripts; the last
    loss, in nats per token."""
    renderer = AnswerRenderer.from_model((await training.get_info()).model_path)
    loss = float("nan")
    for step in track(range(steps), "imitating scripts", console=Console(stderr=True)):
        chosen = random.Random(step).sample(transcripts, min(batch_size, len(transcripts)))
        data = imitation_datums(renderer, chosen)
        output = training.forward_backward(data, "cross_entropy", logprobs="loss")
        await training.optim_step(tinsmith.AdamParams(learning_rate, grad_clip_norm=1.0))
        loss = (await output).metrics["loss:sum"]
    return loss
