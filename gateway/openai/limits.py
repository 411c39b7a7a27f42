"""What fits into a model's context."""

from __future__ import annotations

from .errors import InvalidRequest
from .policies import ServedPolicy


def check_room(policy: ServedPolicy, prompt_tokens: int, max_tokens: int | None) -> None:
    """
    Raises:
        InvalidRequest: with the code that agent frameworks shorten their conversation for.
    """
    context = policy.max_context
    # The last token drawn is never fed back.
    if context is not None and prompt_tokens + (max_tokens or 1) - 1 > context:
        raise InvalidRequest(
            f"a prompt of {prompt_tokens} tokens and max_tokens={max_tokens} do not fit into the "
            f"model's maximum context length of {context} tokens",
            "max_tokens" if max_tokens else None,
            "context_length_exceeded",
        )
