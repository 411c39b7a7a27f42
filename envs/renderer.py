"""Messages to tokens by the model's own chat template, and never back again.

A conversation is one growing token sequence. What comes after a sampled turn is found by
rendering the whole conversation as text: where the text so far, sampled text included, is a
prefix of it, only the new suffix is tokenized and appended. Where the template rewrites its past
(Qwen3's drops the reasoning of earlier turns), a new segment begins with the whole rendered text.
Either way the sampled tokens stay as they were sampled.

Dimension names: T tokens of a segment.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..primitives.client import load_tokenizer
from ..primitives.errors import InvalidInput
from ..primitives.types import Message, SampledSequence, Segment


class Rendered(NamedTuple):
    """A conversation as text. Where `grows`, `tokens` are only those after the text before."""

    text: str
    tokens: list[int]
    grows: bool


class ChatRenderer:
    """Renders conversations for one model.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.
        max_context: tokens that the model takes, None if not known.
        template_kwargs: further variables of the chat template (`enable_thinking=False`, ...).

    Raises:
        InvalidInput: the tokenizer has no chat template.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_context: int | None = None,
        template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise InvalidInput(
                "the model's tokenizer has no chat template, so messages cannot be rendered; "
                "use an instruction-tuned model, or save a template with the tokenizer"
            )
        self.tokenizer = tokenizer
        self.max_context = max_context
        self.template_kwargs = dict(template_kwargs or {})

    @classmethod
    def from_model(cls, model_path: str) -> ChatRenderer:
        """The renderer of a resolved model folder."""
        config = json.loads((Path(model_path) / "config.json").read_text())
        return cls(load_tokenizer(model_path), config.get("max_position_embeddings"))

    def start(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None = None
    ) -> Conversation:
        """A conversation whose next turn is the model's."""
        return Conversation(self, messages, tools)

    def text(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None = None,
        *,
        generation_prompt: bool = True,
    ) -> str:
        """The prompt for the model's next turn; without `generation_prompt`, the conversation as it
        stands.

        Raises:
            InvalidInput: the chat template refuses these messages.
        """
        try:
            return self.tokenizer.apply_chat_template(
                list(messages),
                tools=None if tools is None else list(tools),
                add_generation_prompt=generation_prompt,
                tokenize=False,
                **self.template_kwargs,
            )
        except Exception as error:  # a template may fail in any way that jinja can
            roles = ", ".join(str(m.get("role")) for m in messages)
            raise InvalidInput(
                f"the chat template refuses a conversation of the roles {roles}: {error}"
            ) from error

    def extend(
        self,
        before: str,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None = None,
    ) -> Rendered:
        """The prompt for the model's next turn, going on from the text `before` if the template
        lets it stand."""
        text = self.text(messages, tools)
        grows = text.startswith(before)
        return Rendered(text, self.tokens(text[len(before) :] if grows else text), grows)

    def tokens(self, text: str) -> list[int]:
        """Token ids of rendered text: special tokens in it count as such, none are added."""
        return encode(self.tokenizer, text)


def encode(tokenizer: Any, text: str, *, special: bool = False) -> list[int]:
    """Token ids of a text. `special` adds those that a text of its own begins with.

    Raises:
        InvalidInput: the text holds half a character, as JSON can (a lone surrogate).
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidInput(f"a text to tokenize is not valid Unicode: {error}") from None
    return tokenizer.encode(text, add_special_tokens=special)


def decode(tokenizer: Any, tokens: np.ndarray, *, special: bool) -> str:
    """The text of sampled tokens, with or without special ones."""
    return tokenizer.decode(
        tokens.tolist(), skip_special_tokens=not special, clean_up_tokenization_spaces=False
    )


class Conversation:
    """One growing conversation: `prompt` goes to the sampler, its answer to `add_turn`, what the
    environment says to `add_messages`, and so on. Tokens, mask, logprobs and versions grow
    together and so line up."""

    def __init__(
        self,
        renderer: ChatRenderer,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None = None,
    ) -> None:
        self.renderer = renderer
        self.tools = tools
        self.messages: list[Message] = list(messages)
        self._finished: list[GrowingSegment] = []
        self._text = renderer.text(self.messages, tools)
        self._open = GrowingSegment(renderer.tokens(self._text))

    @property
    def prompt(self) -> np.ndarray:
        """Tokens up to here, int64 `[T]`."""
        return np.asarray(self._open.tokens, np.int64)

    def __len__(self) -> int:
        """T of `prompt`."""
        return len(self._open.tokens)

    def add_turn(self, sequence: SampledSequence) -> str:
        """Append the sampled turn; returns its text without special tokens."""
        self._text += decode(self.renderer.tokenizer, sequence.tokens, special=True)
        action = decode(self.renderer.tokenizer, sequence.tokens, special=False)
        self._open.sample(sequence)
        self.messages.append({"role": "assistant", "content": action})
        return action

    def add_messages(self, messages: Sequence[Message], *, last: bool = False) -> None:
        """Append what the environment said. `last`: no turn of the model follows, so that only
        the transcript needs it."""
        self.messages.extend(messages)
        if last:
            return
        self._text, tokens, grows = self.renderer.extend(self._text, self.messages, self.tools)
        if grows:
            self._open.give(tokens)
        else:
            self._finished.append(self._open)
            self._open = GrowingSegment(tokens)

    def segments(self) -> list[Segment]:
        """Every segment in which something was sampled."""
        return [s.segment() for s in (*self._finished, self._open) if s.sampled]


class GrowingSegment:
    """A segment under way: what was given to the policy and what it sampled, in turn."""

    def __init__(self, prompt: Sequence[int] = ()) -> None:
        self.tokens: list[int] = []
        self.mask: list[bool] = []
        self.logprobs: list[float] = []
        self.versions: list[int] = []
        self.routed: list[np.ndarray] = []  # a token's each, of the first ones
        self.sampled = False
        self.give(prompt)

    def give(self, tokens: Sequence[int]) -> None:
        self.tokens.extend(tokens)
        self.mask.extend([False] * len(tokens))
        self.logprobs.extend([0.0] * len(tokens))
        self.versions.extend([-1] * len(tokens))

    def sample(self, sequence: SampledSequence) -> None:
        if sequence.routed_experts is not None:  # of all tokens up to here, and the new ones
            self.routed.extend(sequence.routed_experts[len(self.routed) :])
        self.tokens.extend(sequence.tokens.tolist())
        self.mask.extend([True] * len(sequence.tokens))
        self.logprobs.extend(sequence.logprobs.tolist())
        self.versions.extend(sequence.versions.tolist())
        self.sampled = self.sampled or len(sequence.tokens) > 0

    def segment(self) -> Segment:
        return Segment(
            np.asarray(self.tokens, np.int64),
            np.asarray(self.mask, bool),
            np.asarray(self.logprobs, np.float32),
            np.asarray(self.versions, np.int32),
            self._routed_experts(),
        )

    def _routed_experts(self) -> np.ndarray | None:
        if not self.routed:
            return None
        known = np.stack(self.routed).astype(np.int16)
        rest = np.full((len(self.tokens) - len(known), *known.shape[1:]), -1, np.int16)
        return np.concatenate([known, rest])
