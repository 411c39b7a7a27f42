"""What a stream tells is what the whole answer says, in whatever pieces it comes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tinsmith.gateway.openai.text import AnswerText

CALL = '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>'
WORDS = st.lists(
    st.sampled_from([CALL, "<tool_call>", "</tool_call>", "<tool", "_call>", " ", "\n", "a", "ab"]),
    max_size=8,
)


def told(pieces: list[str], stops: list[str], calls: bool):
    answer = AnswerText(stops, calls=calls)
    parts = [answer.push(piece) for piece in pieces]
    rest, content, found = answer.finish()
    assert "".join([*parts, rest]) == content
    return content, found


@given(WORDS, st.lists(st.sampled_from(["b", "a\n", "ab a", "<tool"]), max_size=2), st.booleans())
def test_the_pieces_told_join_to_the_whole(words, stops, calls):
    text = "".join(words)
    assert told(words, stops, calls) == told(list(text), stops, calls) == told([text], stops, calls)


@given(WORDS, st.sampled_from(["b", "a\n", "ab a"]))
def test_the_text_ends_before_the_first_stop_string(words, stop):
    text = "".join(words)
    assert told(list(text), [stop], False)[0] == text.split(stop)[0]


def test_calls_are_taken_out_with_the_space_around_them():
    content, calls = told(["Hm. ", CALL, "\n", CALL, "\n"], [], True)
    assert content == "Hm."
    assert [call.keywords for call in calls] == [{"x": 1}] * 2


def test_a_malformed_call_is_text():
    text = CALL + "<tool_call>{nothing"
    assert told(list(text), [], True) == (text, [])


def test_a_possible_beginning_of_a_mark_is_told_when_it_is_none():
    answer = AnswerText(["STOP"], calls=True)
    pieces = [answer.push(piece) for piece in ("a ", "<to", "ast> ST", "OX")]
    assert pieces == ["a", "", " <toast> ", "STOX"]
