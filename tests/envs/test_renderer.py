from __future__ import annotations

import numpy as np
import pytest

from tests.envs.scripted import sequence
from tests.tiny import tiny_tokenizer
from tinsmith.envs import ChatRenderer
from tinsmith.primitives.errors import InvalidInput
from tinsmith.primitives.types import SampledSequence

FORGETFUL_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def renderer() -> ChatRenderer:
    return ChatRenderer(tiny_tokenizer())


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def check_lines_up(segment, turns: list[SampledSequence]) -> None:
    """The sampled parts of a segment are exactly the turns; the rest holds 0 and -1."""
    mask = segment.mask
    for name in ("tokens", "logprobs", "versions"):
        expected = np.concatenate([getattr(turn, name) for turn in turns])
        np.testing.assert_array_equal(getattr(segment, name)[mask], expected)
    assert (segment.logprobs[~mask] == 0).all()
    assert (segment.versions[~mask] == -1).all()
    assert [a.dtype.name for a in (segment.tokens, mask, segment.logprobs, segment.versions)] == [
        "int64",
        "bool",
        "float32",
        "int32",
    ]


def test_a_conversation_is_one_growing_sequence_equal_to_the_template(renderer):
    conversation = renderer.start([user("What is 3 times 4?")])
    turns = [sequence(renderer.tokenizer, "CALC(3*4)", 0), sequence(renderer.tokenizer, "12", 1)]
    before = conversation.prompt
    assert conversation.add_turn(turns[0]) == "CALC(3*4)"
    conversation.add_messages([user("RESULT: 12")])
    np.testing.assert_array_equal(conversation.prompt[: len(before)], before)
    conversation.add_turn(turns[1])
    conversation.add_messages([user("right")], last=True)
    (segment,) = conversation.segments()
    check_lines_up(segment, turns)
    rendered = renderer.tokenizer.apply_chat_template(conversation.messages[:-1], tokenize=False)
    assert renderer.tokenizer.decode(segment.tokens) + "\n" == rendered
    assert [m["role"] for m in conversation.messages] == ["user", "assistant"] * 2 + ["user"]


def test_a_turn_cut_by_its_length_gets_its_end_token_unsampled(renderer):
    conversation = renderer.start([user("Hello")])
    turn = sequence(renderer.tokenizer, "the quick brown~")
    conversation.add_turn(turn)
    conversation.add_messages([user("go on")])
    conversation.add_turn(sequence(renderer.tokenizer, "fox"))
    (segment,) = conversation.segments()
    after = int(np.flatnonzero(segment.mask)[0]) + len(turn.tokens)
    assert segment.tokens[after] == renderer.tokenizer.eos_token_id
    assert not segment.mask[after]


def test_sampled_tokens_stay_as_sampled_where_the_tokenizer_would_choose_others(renderer):
    tokenizer = renderer.tokenizer
    letters = [tokenizer.encode(c, add_special_tokens=False)[0] for c in "question"]
    assert len(tokenizer.encode("question", add_special_tokens=False)) < len(letters)
    tokens = np.asarray([*letters, tokenizer.eos_token_id])
    turn = SampledSequence(
        tokens, np.zeros(len(tokens), np.float32), np.zeros(len(tokens), np.int32), "stop"
    )
    conversation = renderer.start([user("Hello")])
    conversation.add_turn(turn)
    conversation.add_messages([user("yes?")])
    (segment,) = conversation.segments()
    check_lines_up(segment, [turn])


def test_bytes_that_are_no_text_stay_one_segment(renderer):
    half = renderer.tokenizer.encode("é", add_special_tokens=False)[:1]
    turn = SampledSequence(
        np.asarray(half), np.zeros(1, np.float32), np.zeros(1, np.int32), "length"
    )
    conversation = renderer.start([user("Hello")])
    assert conversation.add_turn(turn) == "\N{REPLACEMENT CHARACTER}"
    conversation.add_messages([user("pardon?")])
    conversation.add_turn(sequence(renderer.tokenizer, "12"))
    assert len(conversation.segments()) == 1


def test_a_template_that_rewrites_its_past_starts_a_new_segment():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = FORGETFUL_TEMPLATE
    conversation = ChatRenderer(tokenizer).start([user("What is 3 times 4?")])
    turns = [sequence(tokenizer, "<think>3 * 4</think>CALC(3*4)", 0), sequence(tokenizer, "12", 1)]
    conversation.add_turn(turns[0])
    conversation.add_messages([user("RESULT: 12")])
    conversation.add_turn(turns[1])
    first, second = conversation.segments()
    check_lines_up(first, turns[:1])
    check_lines_up(second, turns[1:])
    assert "<think>" in tokenizer.decode(first.tokens)
    assert "<think>" not in tokenizer.decode(second.tokens)
    assert "CALC(3*4)" in tokenizer.decode(second.tokens)


def test_a_special_token_in_the_middle_of_a_turn_starts_a_new_segment(renderer):
    turn = sequence(renderer.tokenizer, "12<|im_start|>user")
    conversation = renderer.start([user("Hello")])
    assert conversation.add_turn(turn) == "12user"
    conversation.add_messages([user("pardon?")])
    conversation.add_turn(sequence(renderer.tokenizer, "12"))
    assert len(conversation.segments()) == 2


def test_a_tokenizer_without_a_template_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(InvalidInput, match="no chat template"):
        ChatRenderer(tokenizer)


def test_a_template_that_refuses_a_role_is_reported():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(InvalidInput, match="roles system: no system role"):
        ChatRenderer(tokenizer).start([{"role": "system", "content": "x"}])
