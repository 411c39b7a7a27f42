"""A policy that says what it is told, in the shape of `SamplingClient.sample`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tinsmith.primitives.types import SampledSequence, SampleResponse, SamplingParams


class Scripted:
    """Turn t of every conversation says `turns[t]`, tokenized, with the end token appended
    unless the text ends in `~`. Logprobs count tokens, versions count turns."""

    def __init__(self, tokenizer: Any, turns: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.turns = list(turns)
        self.prompts: list[np.ndarray] = []
        self.params: list[SamplingParams] = []

    async def sample(
        self, prompt: np.ndarray, num_samples: int = 1, sampling_params: Any = None
    ) -> SampleResponse:
        assert num_samples == 1
        turn = len(self.prompts) % len(self.turns)
        self.prompts.append(prompt)
        self.params.append(sampling_params)
        return SampleResponse([sequence(self.tokenizer, self.turns[turn], turn)])


def sequence(tokenizer: Any, text: str, version: int = 0) -> SampledSequence:
    ended = not text.endswith("~")
    tokens = tokenizer.encode(text.removesuffix("~"), add_special_tokens=False)
    tokens = np.asarray([*tokens, *([tokenizer.eos_token_id] if ended else [])])
    return SampledSequence(
        tokens,
        -np.arange(1, len(tokens) + 1, dtype=np.float32),
        np.full(len(tokens), version, np.int32),
        "stop" if ended else "length",
    )
