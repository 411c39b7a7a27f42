"""Before reinforcement can choose among moves, a player must make some: imitate those of scripts.

The scripts play at random or carelessly, so that this teaches how a move is written and little
about which is good.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np

import tinsmith
from tinsmith.envs import ChatRenderer


def imitation_datums(
    renderer: ChatRenderer, transcripts: Sequence[list[dict[str, Any]]]
) -> list[tinsmith.Datum]:
    """A cross-entropy datum per transcript, in the tokens that sampling would have made; the mean
    over all of an assistant's tokens."""
    segments = []
    for messages in transcripts:
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns:
            continue
        conversation = renderer.start(messages[: turns[0]])
        for turn, following in zip(turns, [*turns[1:], len(messages)], strict=True):
            tokens = np.array(renderer.tokens(messages[turn]["content"] + end_of_turn(renderer)))
            zeros = np.zeros(len(tokens))
            conversation.add_turn(tinsmith.SampledSequence(tokens, zeros, zeros, "stop"))
            conversation.add_messages(
                messages[turn + 1 : following], last=following == len(messages)
            )
        segments += conversation.segments()
    total = sum(segment.mask.sum() for segment in segments)
    return [
        tinsmith.Datum(
            s.tokens[:-1], {"target_tokens": s.tokens[1:], "weights": s.mask[1:] / total}
        )
        for s in segments
    ]


def end_of_turn(renderer: ChatRenderer) -> str:
    return renderer.tokenizer.eos_token


async def imitate(
    training: tinsmith.TrainingClient,
    renderer: ChatRenderer,
    transcripts: Sequence[list[dict[str, Any]]],
    *,
    steps: int,
    learning_rate: float,
    batch_size: int = 24,
) -> float:
    """`steps` steps of supervised fine-tuning, each on `batch_size` of the transcripts; the last
    loss, in nats per token."""
    loss = float("nan")
    for step in range(steps):
        chosen = random.Random(step).sample(transcripts, min(batch_size, len(transcripts)))
        data = imitation_datums(renderer, chosen)
        output = training.forward_backward(data, "cross_entropy", logprobs="loss")
        await training.optim_step(tinsmith.AdamParams(learning_rate, grad_clip_norm=1.0))
        loss = (await output).metrics["loss:sum"]
    return loss
