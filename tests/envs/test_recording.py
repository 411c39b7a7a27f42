"""A recording finds the turn that a request goes on from; what was sampled is never rewritten."""

from __future__ import annotations

import numpy as np

from tests.envs.scripted import sequence
from tests.envs.test_renderer import FORGETFUL_TEMPLATE, check_lines_up, user
from tests.tiny import tiny_tokenizer
from tinsmith.envs import ChatRenderer
from tinsmith.envs.recording import Recording


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def turn(recording, renderer, messages, answer, version=0, seen=None, **prompt):
    """Ask, have `answer` sampled, record it, and return what was sampled."""
    asked = recording.chat_prompt(renderer, prompt.pop("model", "m"), messages, **prompt)
    sampled = sequence(renderer.tokenizer, answer, version)
    recording.add(renderer.tokenizer, asked, sampled, said(answer if seen is None else seen))
    return sampled


def test_it_records_what_a_conversation_would():
    renderer = ChatRenderer(tiny_tokenizer())
    conversation, recording = renderer.start([user("What is 3 times 4?")]), Recording()
    messages = [user("What is 3 times 4?")]
    for version, (answer, reply) in enumerate([("CALC(3*4)", "RESULT: 12"), ("12", "right")]):
        conversation.add_turn(turn(recording, renderer, messages, answer, version))
        conversation.add_messages([user(reply)], last=answer == "12")
        messages += [said(answer), user(reply)]
    (expected,), (got,) = conversation.segments(), recording.trajectory().segments
    for name in ("tokens", "mask", "logprobs", "versions"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name))


def test_a_template_that_rewrites_its_past_starts_a_new_segment():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = FORGETFUL_TEMPLATE
    renderer, recording = ChatRenderer(tokenizer), Recording()
    thought = "<think>3 * 4</think>CALC(3*4)"
    first = turn(recording, renderer, [user("?")], thought)
    second = turn(recording, renderer, [user("?"), said(thought), user("12")], "12", 1)
    one, other = recording.trajectory().segments
    check_lines_up(one, [first])
    check_lines_up(other, [second])
    assert "<think>" not in tokenizer.decode(other.tokens)


def test_the_policy_goes_on_from_its_own_words_whatever_its_caller_saw():
    renderer, recording = ChatRenderer(tiny_tokenizer()), Recording()
    first = turn(recording, renderer, [user("?")], "12 STOP", seen="12 ")
    second = turn(recording, renderer, [user("?"), said("12"), user("on")], "13")
    (segment,) = recording.trajectory().segments
    check_lines_up(segment, [first, second])


def test_other_tools_or_another_model_or_template_are_another_conversation():
    tokenizer = tiny_tokenizer()
    renderer, recording = ChatRenderer(tokenizer), Recording()
    turn(recording, renderer, [user("?")], "12")
    again = [user("?"), said("12"), user("on")]
    tools = [{"type": "function", "function": {"name": "f"}}]
    turn(recording, renderer, again, "13", model="other")
    turn(recording, renderer, again, "13", tools=tools)
    turn(recording, ChatRenderer(tokenizer, template_kwargs={"x": 1}), again, "13")
    assert len(recording.trajectory().segments) == 4


def test_the_newest_of_two_equal_answers_is_gone_on_from():
    renderer, recording = ChatRenderer(tiny_tokenizer()), Recording()
    turn(recording, renderer, [user("?")], "12", 0)
    second = turn(recording, renderer, [user("?")], "12", 1)
    third = turn(recording, renderer, [user("?"), said("12"), user("on")], "13", 2)
    _, segment = recording.trajectory().segments
    check_lines_up(segment, [second, third])


def test_an_empty_recording_is_an_empty_trajectory():
    trajectory = Recording().trajectory()
    assert trajectory.segments == trajectory.messages == []
    assert trajectory.info["turns"] == 0
