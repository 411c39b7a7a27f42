"""One answer under way: its tokens, its text, and how it ended."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from ...envs.renderer import decode
from ...envs.text_stream import TextStream
from ...envs.tools import Call
from ...primitives.types import SampledSequence, SampledToken
from .text import AnswerText

FinishReason = Literal["stop", "length", "tool_calls"]


class Choice:
    """Takes the tokens of one sequence: streamed, one at a time, or all at once."""

    def __init__(self, tokenizer: Any, stops: Sequence[str] = (), *, calls: bool = False) -> None:
        self.tokenizer = tokenizer
        self.tokens: list[SampledToken] = []
        self.content = ""
        self.calls: list[Call] = []
        self._pieces = TextStream(tokenizer)
        self._answer = AnswerText(stops, calls=calls)

    @classmethod
    def of(
        cls, sequence: SampledSequence, tokenizer: Any, stops: Sequence[str], *, calls: bool = False
    ) -> Choice:
        """The finished choice of a sequence."""
        choice = cls(tokenizer, stops, calls=calls)
        choice._answer.push(decode(tokenizer, sequence.tokens, special=False))
        choice._finish(sequence)
        return choice

    def push(self, token: SampledToken) -> str:
        """The text to tell with this token; with the last one, all that was held back."""
        self.tokens.append(token)
        text = self._answer.push(self._pieces.push(token.token))
        if token.stop_reason is None:
            return text
        text += self._answer.push(self._pieces.finish())
        return text + self._finish(SampledSequence.of(self.tokens))

    def _finish(self, sequence: SampledSequence) -> str:
        rest, self.content, self.calls = self._answer.finish()
        self.sequence = sequence
        return rest

    @property
    def finish_reason(self) -> FinishReason:
        if self._answer.stopped or self.sequence.stop_reason == "stop":
            return "tool_calls" if self.calls else "stop"
        return "length"


def token_text(tokenizer: Any, token: int) -> str:
    return tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)


def number(logprob: float) -> float:
    """A logprob as JSON has it: there is no -inf."""
    return max(float(logprob), -9999.0)


def usage(prompt: int, completion: int, cached: int | None = None) -> dict[str, Any]:
    """`cached`: prompt tokens taken from the sampler's cache, None where it does not tell."""
    counts: dict[str, Any] = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }
    if cached is not None:
        counts["prompt_tokens_details"] = {"cached_tokens": cached}
    return counts


def count_tokens(choices: Iterable[Choice]) -> int:
    return sum(len(choice.sequence.tokens) for choice in choices)
