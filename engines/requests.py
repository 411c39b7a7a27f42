"""What both sampling engines ask of a request, and the rules by which one ends."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import transformers

from ..primitives.errors import InvalidInput
from ..primitives.types import SampleRequest

MAX_ALTERNATIVES = 1 << 14  # draws at a prompt position


def check_request(request: SampleRequest, vocab_size: int, context: int) -> int:
    """How many tokens a sample may have at most.

    Raises:
        InvalidInput: token ids out of range, or beyond the model's context.
    """
    _check_vocabulary(request, vocab_size)
    length = len(request.prompt)
    max_tokens = request.params.max_tokens or max(context - length, 1)
    # The last token drawn is never fed back.
    if length + max_tokens - 1 > context:
        raise InvalidInput(
            f"a prompt of {length} tokens and max_tokens={request.params.max_tokens} do not fit "
            f"into the model's context of {context}"
        )
    return max_tokens


def _check_vocabulary(request: SampleRequest, size: int) -> None:
    asked = [("prompt", request.prompt)]
    if request.target_prompt_logprobs is not None:
        asked.append(("target_prompt_logprobs", request.target_prompt_logprobs))
    for name, tokens in asked:
        outside = np.argwhere(tokens >= size).tolist()
        if outside:
            raise InvalidInput(
                f"{name} holds token {tokens[tuple(outside[0])]} at position "
                f"{', '.join(map(str, outside[0]))}, outside the vocabulary of {size}"
            )
    for name in ("topk_prompt_logprobs", "topk_sample_logprobs"):
        if getattr(request, name) > size:
            raise InvalidInput(
                f"{name}={getattr(request, name)} is more than the vocabulary of {size}"
            )
    if request.prompt_alt_tokens_k > MAX_ALTERNATIVES:
        raise InvalidInput(
            f"prompt_alt_tokens_k must be at most {MAX_ALTERNATIVES}, got {request.prompt_alt_tokens_k}"
        )


def end_tokens(path: str | Path, tokenizer: Any) -> frozenset[int]:
    """End tokens of the tokenizer and of the model's own settings."""
    ends = {tokenizer.eos_token_id}
    sources = [transformers.AutoConfig.from_pretrained(path).eos_token_id]
    if (Path(path) / "generation_config.json").exists():
        sources.append(transformers.GenerationConfig.from_pretrained(path).eos_token_id)
    for source in sources:
        ends |= set(source) if isinstance(source, list) else {source}
    return frozenset(end for end in ends if end is not None)


def ends_with_stop_string(tokenizer: Any, drawn: Sequence[int], stops: Sequence[str]) -> bool:
    """Whether the last of the tokens drawn completed one of the `stops`."""
    if not stops:
        return False
    # Every token adds at least one byte, so older ones cannot take part in a new match.
    reach = max(len(stop.encode()) for stop in stops) + 4
    text = tokenizer.decode(drawn[-reach:], skip_special_tokens=False)
    return any(stop in text for stop in stops)
