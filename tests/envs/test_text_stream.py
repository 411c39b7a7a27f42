from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.tiny import tiny_tokenizer
from tinsmith.envs import TextStream

TOKENIZER = tiny_tokenizer()


def pieces(tokens: list[int]) -> list[str]:
    stream = TextStream(TOKENIZER)
    return [*(stream.push(token) for token in tokens), stream.finish()]


@given(st.text())
def test_no_piece_ends_inside_a_character_and_they_join_to_the_text(text):
    tokens = TOKENIZER.encode(text.replace("\ufffd", ""), add_special_tokens=False)
    told = pieces(tokens)
    assert not any("\ufffd" in piece for piece in told)
    assert "".join(told) == TOKENIZER.decode(tokens, skip_special_tokens=True)


@given(st.lists(st.integers(0, len(TOKENIZER) - 1)))
def test_tokens_that_spell_no_character_are_told_too(tokens):
    assert "".join(pieces(tokens)) == TOKENIZER.decode(tokens, skip_special_tokens=True)


def test_a_character_is_told_with_its_last_token():
    tokens = TOKENIZER.encode("é", add_special_tokens=False)
    assert len(tokens) == 2
    assert pieces(tokens) == ["", "é", ""]
