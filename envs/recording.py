"""What a policy was asked and what it sampled, request by request, as token sequences to train on.

Whoever holds the conversation sends all of it with every request, in messages. A recording finds
the turn that a request goes on from and appends only what is new, so that sampled tokens stay as
they were sampled. Turns form a tree: an agent may go back and try again, or hold several
conversations. Nothing is recorded of a request that was not answered.

Dimension names: T tokens of a segment.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np

from ..primitives.types import Message, SampledSequence, Segment, Trajectory, token_array
from .renderer import ChatRenderer, GrowingSegment, decode, encode

_OVERHEAD = 64


@dataclass(frozen=True, eq=False)
class Prompt:
    """A request: `given` are the tokens after those of `before` where it `grows`, else all.

    `messages` are those after `before`'s; `key` tells the conversation up to here, None for a
    prompt without messages.
    """

    model: str
    given: np.ndarray
    text: str
    before: Turn | None = None
    grows: bool = False
    messages: Sequence[Message] = ()
    key: bytes | None = None

    @property
    def tokens(self) -> np.ndarray:
        """All of the prompt, int64 `[T]`."""
        if not self.grows or self.before is None:
            return self.given
        return np.concatenate([self.before.tokens, self.given])


@dataclass(frozen=True, eq=False)
class Turn:
    """An answered request. `text` is what was sampled, special tokens included; `answer` the
    message that its caller got; `sampled_message` the same before its tool calls were taken out
    and stop strings cut off."""

    prompt: Prompt
    sampled: SampledSequence
    text: str
    answer: Message
    sampled_message: Message
    created: float = field(default_factory=time.time)

    @property
    def before(self) -> Turn | None:
        return self.prompt.before

    def conversation(self) -> list[Turn]:
        """All turns up to this one."""
        return _upwards(self, lambda turn: turn.before)

    def segment(self) -> list[Turn]:
        """The turns up to this one that are one growing token sequence."""
        return _upwards(self, lambda turn: turn.before if turn.prompt.grows else None)

    @property
    def tokens(self) -> np.ndarray:
        """Tokens up to the end of this turn, int64 `[T]`."""
        turns = self.segment()
        return np.concatenate([a for t in turns for a in (t.prompt.given, t.sampled.tokens)])

    @property
    def full_text(self) -> str:
        """What `tokens` say, special tokens included."""
        return "".join(turn.prompt.text + turn.text for turn in self.segment())

    @property
    def size(self) -> int:
        """Tokens that it takes to keep this turn, about."""
        return len(self.prompt.given) + len(self.sampled.tokens) + _OVERHEAD


def _upwards(turn: Turn, above: Callable[[Turn], Turn | None]) -> list[Turn]:
    path: list[Turn] = []
    here: Turn | None = turn
    while here is not None:
        path.append(here)
        here = above(here)
    return path[::-1]


class Recording:
    """The turns of one trajectory. Requests may overlap: each sees what was answered before it."""

    def __init__(self) -> None:
        self.turns: list[Turn] = []
        self.size = _OVERHEAD
        self._by_key: dict[bytes, Turn] = {}

    def chat_prompt(
        self,
        renderer: ChatRenderer,
        model: str,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None = None,
    ) -> Prompt:
        """The prompt of a conversation, going on from the longest part of it that ends with a
        recorded answer."""
        start = _hash(b"", [model, tools, renderer.template_kwargs])
        keys = list(accumulate(map(_compared, messages), _hash, initial=start))
        known = next((k for k in range(len(messages) - 1, 0, -1) if keys[k] in self._by_key), 0)
        new = list(messages[known:])
        if not known:
            text = renderer.text(new, tools)
            given = token_array(renderer.tokens(text))
            return Prompt(model, given, text, messages=new, key=keys[-1])
        before = self._by_key[keys[known]]
        past = [m for t in before.conversation() for m in (*t.prompt.messages, t.sampled_message)]
        recorded = before.full_text
        text, tokens, grows = renderer.extend(recorded, [*past, *new], tools)
        if grows:
            text = text[len(recorded) :]
        return Prompt(model, token_array(tokens), text, before, grows, new, keys[-1])

    def text_prompt(self, tokenizer: Any, model: str, prompt: str | Sequence[int]) -> Prompt:
        """The prompt of a text or of tokens, going on from the longest recorded sequence that it
        begins with."""
        best, length = None, 0
        for turn in self.turns:
            if turn.prompt.key is None and turn.prompt.model == model:
                recorded = turn.full_text if isinstance(prompt, str) else turn.tokens.tolist()
                if len(recorded) >= length and prompt[: len(recorded)] == recorded:
                    best, length = turn, len(recorded)
        rest = prompt[length:]
        if isinstance(rest, str):
            tokens, text = encode(tokenizer, rest, special=best is None), rest
        else:
            tokens, text = list(rest), decode(tokenizer, token_array(rest), special=True)
        return Prompt(model, token_array(tokens), text, best, best is not None)

    def add(
        self, tokenizer: Any, prompt: Prompt, sampled: SampledSequence, answer: Message
    ) -> None:
        """Record what was sampled, and the message that was made of it."""
        said = decode(tokenizer, sampled.tokens, special=False)
        turn = Turn(
            prompt,
            sampled,
            decode(tokenizer, sampled.tokens, special=True),
            answer,
            {"role": "assistant", "content": said},
        )
        self.turns.append(turn)
        self.size += turn.size
        if prompt.key is not None:
            self._by_key[_hash(prompt.key, _compared(answer))] = turn

    def trajectory(self) -> Trajectory:
        """Every sampled token in exactly one place: where sequences part, the common turns are
        masked out of all but the first. `info["turn_info"][i]` tells where turn i is. The messages
        are those of the newest turn's conversation."""
        gone_on = {turn.before for turn in self.turns if turn.prompt.grows}
        segments: list[Segment] = []
        places: dict[Turn, dict[str, int]] = {}
        for leaf in self.turns:
            if leaf in gone_on:
                continue
            segment = GrowingSegment()
            for turn in leaf.segment():
                segment.give(turn.prompt.given.tolist())
                if turn in places:
                    segment.give(turn.sampled.tokens.tolist())
                else:
                    start = len(segment.tokens)
                    segment.sample(turn.sampled)
                    places[turn] = dict(
                        segment=len(segments), start=start, stop=len(segment.tokens)
                    )
            segments.append(segment.segment())
        last = self.turns[-1].conversation() if self.turns else []
        return Trajectory(
            segments=segments,
            rewards=[],
            terminated=False,
            truncated=False,
            messages=[m for turn in last for m in (*turn.prompt.messages, turn.answer)],
            info={
                "turns": len(self.turns),
                "turn_info": [
                    places[turn]
                    | dict(
                        model=turn.prompt.model,
                        created=turn.created,
                        stop_reason=turn.sampled.stop_reason,
                    )
                    for turn in self.turns
                ],
            },
            seconds=self.turns[-1].created - self.turns[0].created if self.turns else 0.0,
        )


def _compared(message: Message) -> list[Any]:
    """What makes two messages the same. Clients may trim what we said, and number calls anew."""
    content = message["content"]
    calls = [call["function"] for call in message.get("tool_calls") or []]
    if message["role"] == "assistant":
        content = content.strip()
    return [
        message["role"],
        content,
        message.get("name"),
        message.get("reasoning_content"),
        [[call["name"], call["arguments"]] for call in calls],
    ]


def _hash(before: bytes, value: Any) -> bytes:
    text = json.dumps(value, sort_keys=True)
    return hashlib.blake2b(before + text.encode(), digest_size=16).digest()
