"""Conversations and completions as datums: the very tokens that the model would be given and would
sample.

An answer is rendered by the model's own chat template as the last turn of its conversation, cut
after the end token that ends a sampled turn, and appended to the prompt's tokens as
`envs/renderer.py` does with sampled ones. Where the template rewrites its past (Qwen3's drops
earlier reasoning), a conversation makes several datums.

Dimension names: T tokens of a sequence; a datum has T - 1 positions, each predicting the next.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..envs.renderer import ChatRenderer, encode
from ..primitives.errors import InvalidInput
from ..primitives.types import Datum, Message, ModelInput, SampledSequence
from .rows import DataReport, TooLong

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}


class Chat(NamedTuple):
    """A conversation, and the tools that its template is told of."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True, eq=False)
class Example:
    """What a row makes: datums of `cross_entropy` whose weights are 1 on the targets to train on
    and 0 elsewhere."""

    row: int
    datums: tuple[Datum, ...]
    truncated: bool = False

    @property
    def trained_tokens(self) -> int:
        return sum(trained_tokens(datum) for datum in self.datums)


def trained_tokens(datum: Datum) -> int:
    """Positions that are trained on. (The weights of soft targets add up to 1 at each.)"""
    return round(float(datum.loss_fn_inputs["weights"].sum(dtype=np.float64)))


# ---- rows to conversations ----


def chat_of(row: Any) -> Chat:
    """The conversation of `{"messages": [{"role", "content"}]}`, ShareGPT's `{"conversations":
    [{"from", "value"}]}` or `{"prompt", "completion"}`, whose prompt is a user's turn or messages
    and whose completion is the answer's text or message. A row may give `tools`.

    Raises:
        InvalidInput: saying what is wrong with the row.
    """
    if not isinstance(row, Mapping):
        raise InvalidInput(f"a row must be an object, got {type(row).__name__}")
    if row.get("messages") is not None:
        messages = messages_of(row["messages"])
    elif row.get("conversations") is not None:
        messages = messages_of(row["conversations"])
    elif row.get("prompt") is not None and row.get("completion") is not None:
        messages = [*prompt_messages(row["prompt"]), *answer_messages(row["completion"])]
    else:
        raise InvalidInput(
            "a row needs messages, conversations, or prompt and completion; "
            f"it has {', '.join(map(str, row)) or 'nothing'}"
        )
    tools = row.get("tools") or None
    if tools is not None and not isinstance(tools, list):
        raise InvalidInput("tools must be a list")
    return Chat(messages, tools)


def messages_of(value: Any) -> list[Message]:
    """Messages of `role` and `content`, or ShareGPT's `from` and `value`, checked."""
    if isinstance(value, str) or not isinstance(value, Sequence | np.ndarray) or len(value) == 0:
        raise InvalidInput("messages must be a list of at least one message")
    return [_message(index, message) for index, message in enumerate(value)]


def _message(index: int, message: Any) -> Message:
    where = f"message {index}"
    if not isinstance(message, Mapping):
        raise InvalidInput(f"{where} must be an object, got {type(message).__name__}")
    if "role" not in message and "from" in message:
        message = {"role": message["from"], "content": message.get("value")}
    role = SHAREGPT_ROLES.get(str(message.get("role")), message.get("role"))
    if role not in ROLES:
        raise InvalidInput(f"{where} has the role {role!r}; known are {', '.join(ROLES)}")
    if message.get("weight") not in (None, 0, 1):
        raise InvalidInput(f"{where}: weight must be 0 or 1, got {message['weight']!r}")
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        content = ""
    if isinstance(content, list):
        content = _joined(where, content)
    if not isinstance(content, str):
        raise InvalidInput(f"{where} ({role}): content must be text, got {content!r:.80}")
    if role == "assistant" and not (content.strip() or message.get("tool_calls")):
        raise InvalidInput(f"{where} (assistant) is empty")
    given = {key: value for key, value in message.items() if value is not None}
    return {**given, "role": role, "content": content}


def _joined(where: str, parts: list[Any]) -> str:
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            raise InvalidInput(f"{where}: of content in parts only text can be used")
        texts.append(text)
    return "".join(texts)


def prompt_messages(prompt: Any) -> list[Message]:
    """A text as the user's turn, or messages as they are."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return messages_of(prompt)


def answer_messages(answer: Any) -> list[Message]:
    """A text as the assistant's turn, or messages, of which one is the assistant's."""
    if isinstance(answer, str):
        answer = {"role": "assistant", "content": answer}
    return messages_of([answer] if isinstance(answer, Mapping) else answer)


# ---- conversations to tokens ----


def end_tokens(tokenizer: Any, model_path: str | Path | None = None) -> tuple[int, ...]:
    """Tokens that end a sampled turn: the tokenizer's, then those of the model folder's configs."""
    ends = [tokenizer.eos_token_id]
    for name in ("config.json", "generation_config.json"):
        path = Path(model_path or "", name)
        if model_path is not None and path.exists():
            eos = json.loads(path.read_text()).get("eos_token_id")
            ends += eos if isinstance(eos, list) else [eos]
    return tuple(dict.fromkeys(end for end in ends if end is not None))


class AnswerRenderer(ChatRenderer):
    """A renderer that also knows the tokens of an answer: those the model would sample to say it.

    Args:
        ends: tokens that end a turn; by default the tokenizer's end token.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_context: int | None = None,
        template_kwargs: dict[str, Any] | None = None,
        ends: Sequence[int] = (),
    ) -> None:
        super().__init__(tokenizer, max_context, template_kwargs)
        self.ends = tuple(ends) or end_tokens(tokenizer)

    @classmethod
    def from_model(
        cls, model_path: str, template_kwargs: dict[str, Any] | None = None
    ) -> AnswerRenderer:
        """The renderer of a resolved model folder."""
        plain = ChatRenderer.from_model(model_path)
        ends = end_tokens(plain.tokenizer, model_path)
        return cls(plain.tokenizer, plain.max_context, template_kwargs, ends)

    def prompt(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None = None
    ) -> np.ndarray:
        """The tokens that ask for the model's next turn, int64 `[T]`."""
        return np.asarray(self.tokens(self.text(messages, tools)), np.int64)

    def answer(
        self,
        before: Sequence[Message],
        answer: Message,
        tools: Sequence[dict[str, Any]] | None = None,
    ) -> np.ndarray:
        """The tokens that say `answer` after the messages `before`, end token included, int64
        `[T]`.

        Raises:
            InvalidInput: the chat template refuses the messages.
        """
        prompt = self.text(before, tools)
        whole = self.text([*before, answer], tools, generation_prompt=False)
        # A template may prompt for an answer otherwise than it writes one (with an opened <think>,
        # say); then the answer's own text follows the prompt.
        text = whole[len(prompt) :] if whole.startswith(prompt) else answer["content"]
        return np.asarray(ended(self.tokens(text), self.ends), np.int64)


def ended(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """`tokens` up to their last end token; with one appended where there is none."""
    last = max((i for i, token in enumerate(tokens) if token in ends), default=None)
    return [*tokens, *ends[:1]] if last is None else tokens[: last + 1]


def supervised_datum(tokens: np.ndarray, mask: np.ndarray) -> Datum:
    """The `cross_entropy` datum of tokens `[T]`, with weight 1 on those that `mask` (bool `[T]`)
    marks."""
    return Datum(
        ModelInput(tokens[:-1]),
        {"target_tokens": tokens[1:], "weights": np.asarray(mask[1:], np.float32)},
    )


def answer_datum(
    renderer: AnswerRenderer,
    before: Sequence[Message],
    answer: Message,
    tools: Sequence[dict[str, Any]] | None = None,
) -> Datum:
    """The datum that trains on one answer to the messages `before`."""
    return completion_datum(renderer.prompt(before, tools), renderer.answer(before, answer, tools))


def completion_datum(prompt: np.ndarray, completion: np.ndarray) -> Datum:
    """The datum that trains on the tokens `completion` after the tokens `prompt`."""
    tokens = np.concatenate([prompt, completion])
    return supervised_datum(tokens, np.arange(len(tokens)) >= len(prompt))


def chat_sequences(
    renderer: AnswerRenderer, chat: Chat, train_on: str = "all_assistant"
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(tokens int64 `[T]`, which to train on bool `[T]`) of a conversation: all of the assistant's
    turns but those of weight 0, or only the last. One pair, or several where the template rewrites
    its past.

    Raises:
        InvalidInput: there is nothing to train on, or the template refuses the conversation.
    """
    messages = chat.messages
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if train_on == "last_assistant":
        turns = turns[-1:]
    if not any(messages[i].get("weight", 1) for i in turns):
        raise InvalidInput("there is no turn of the assistant to train on")
    if turns[0] == 0:
        raise InvalidInput("the conversation begins with the assistant: nothing to answer")
    conversation = renderer.start(messages[: turns[0]], chat.tools)
    for turn, after in zip(turns, [*turns[1:], None], strict=True):
        tokens = renderer.answer(conversation.messages, messages[turn], chat.tools)
        # What `versions` tells apart here is which turns to train on.
        trained = np.full(len(tokens), messages[turn].get("weight", 1), np.int32)
        conversation.add_turn(
            SampledSequence(tokens, np.zeros(len(tokens), np.float32), trained, "stop")
        )
        if after is not None:
            conversation.add_messages(messages[turn + 1 : after])
    pairs = [(s.tokens, s.mask & (s.versions == 1)) for s in conversation.segments()]
    return [(tokens, mask) for tokens, mask in pairs if mask.any()]


def text_sequence(
    tokenizer: Any, ends: Sequence[int], prompt: str, completion: str
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, which to train on) of a raw text and its continuation, which an end token ends."""
    before = encode(tokenizer, prompt, special=True)
    tokens = encode(tokenizer, completion)
    if not tokens or tokens[-1] not in ends:
        tokens = [*tokens, *ends[:1]]
    whole = np.asarray([*before, *tokens], np.int64)
    return whole, np.arange(len(whole)) >= len(before)


@dataclass(frozen=True)
class ExampleMaker:
    """Makes an `Example` of a row; `collect` takes it.

    Attributes:
        tokenizer: the model's.
        ends: tokens that end a turn.
        max_length: most tokens of a sequence.
        train_on: `all_assistant` or `last_assistant`.
        completions: how prompt and completion texts are read: `chat`, a user's turn and its
            answer, or `text`, a raw text and how it goes on.
        too_long: `skip` or `truncate` what is longer.
        template_kwargs: further variables of the chat template.
    """

    tokenizer: Any
    ends: Sequence[int]
    max_length: int
    train_on: str = "all_assistant"
    completions: str = "chat"
    too_long: str = "skip"
    template_kwargs: Mapping[str, Any] | None = None

    def __call__(self, number: int, row: Any) -> Example:
        """
        Raises:
            InvalidInput: the row cannot be used; `TooLong` for its length.
        """
        sequences = self.sequences(row)
        longest = max(len(tokens) for tokens, _ in sequences)
        truncated = longest > self.max_length
        if truncated and self.too_long == "skip":
            raise TooLong(f"{longest} tokens; at most {self.max_length} fit")
        cut = [(tokens[: self.max_length], mask[: self.max_length]) for tokens, mask in sequences]
        datums = tuple(supervised_datum(*pair) for pair in cut if pair[1][1:].any())
        if not datums:
            raise TooLong(f"nothing to train on in the first {self.max_length} tokens")
        return Example(number, datums, truncated)

    def sequences(self, row: Any) -> list[tuple[np.ndarray, np.ndarray]]:
        raw = self.completions == "text" and isinstance(row, Mapping)
        if raw and isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
            return [text_sequence(self.tokenizer, self.ends, row["prompt"], row["completion"])]
        kwargs = dict(self.template_kwargs or {})
        renderer = AnswerRenderer(self.tokenizer, None, kwargs, self.ends)
        return chat_sequences(renderer, chat_of(row), self.train_on)


def count_examples(report: DataReport, examples: Sequence[Example]) -> DataReport:
    """Fill in what the examples tell."""
    datums = [datum for example in examples for datum in example.datums]
    report.datums = len(datums)
    report.tokens = sum(datum.model_input.length + 1 for datum in datums)
    report.trained_tokens = sum(map(trained_tokens, datums))
    report.truncated = [e.row for e in examples if e.truncated]
    report.rewritten = [e.row for e in examples if len(e.datums) > 1]
    return report


def fingerprint(datums: Iterable[Datum]) -> str:
    """A digest of tokens and inputs: a resumed run must train on the same."""
    digest = hashlib.blake2b(digest_size=16)
    for datum in datums:
        digest.update(datum.model_input.tokens.tobytes())
        for name in sorted(datum.loss_fn_inputs):
            digest.update(np.ascontiguousarray(datum.loss_fn_inputs[name]).tobytes())
    return digest.hexdigest()
