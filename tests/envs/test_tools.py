from __future__ import annotations

from typing import Literal

import pytest

from tinsmith.envs import ToolEnv, ToolSet
from tinsmith.primitives.errors import InvalidInput


def add(a: int, b: int = 1) -> int:
    """Add two numbers.

    Args:
        a: the first one.
        b: the second one.
    """
    return a + b


async def look_up(word: str, language: Literal["en", "de"] = "en") -> dict[str, str]:
    """Look a word up."""
    if word == "boom":
        raise KeyError("no such page")
    return {language: word.upper()}


def test_schemas_come_from_signature_and_docstring():
    schema = ToolSet([add]).schemas[0]
    assert schema == {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add two numbers.",
            "parameters": {
                "type": "object",
                "properties": {
                    "a": {"type": "integer", "description": "the first one."},
                    "b": {"type": "integer", "description": "the second one.", "default": 1},
                },
                "required": ["a"],
                "additionalProperties": False,
            },
        },
    }
    language = ToolSet([look_up]).schemas[0]["function"]["parameters"]["properties"]["language"]
    assert language["enum"] == ["en", "de"]


def call(text: str) -> str:
    return f"<tool_call>{text}</tool_call>"


@pytest.mark.parametrize(
    ("turn", "texts"),
    [
        ("just words", []),
        (call('{"name": "add", "arguments": {"a": 1, "b": 2}}'), ["3"]),
        (call('\n{"name": "add", "arguments": "{\\"a\\": \\"4\\"}"}\n'), ["5"]),
        (
            "First " + call('{"name": "add", "arguments": {"a": 1}}')
            + call('{"name": "look_up", "arguments": {"word": "ox", "language": "de"}}'),
            ["2", '{"de": "OX"}'],
        ),
        (call("{name: add}"), ["Error: malformed tool call (Expecting property name"]),
        (call('["add"]'), ["Error: malformed tool call"]),
        ('<tool_call>{"name": "add"', ["Error: malformed tool call"]),
        (call('{"name": "sub", "arguments": {}}'), ["there is no tool 'sub'; the tools are: add, l"]),
        (call('{"name": "add", "arguments": {"a": "x"}}'), ["Error in add: a: Input should be a v"]),
        (call('{"name": "add", "arguments": {}}'), ["Error in add: a: Field required"]),
        (call('{"name": "add", "arguments": {"a": 1, "c": 2}}'), ["unexpected keyword argument 'c'"]),
        (call('{"name": "look_up", "arguments": {"word": "boom"}}'), ["KeyError: 'no such page'"]),
    ],
)  # fmt: skip
async def test_json_calls_are_run_or_answered_with_a_readable_error(turn, texts):
    results = await ToolSet([add, look_up]).run(turn)
    assert len(results) == len(texts)
    for result, text in zip(results, texts, strict=True):
        assert text in result.text
        assert result.ok != ("Error" in result.text)


@pytest.mark.parametrize(
    ("turn", "texts"),
    [
        ("just words (and more)", []),
        ("I call add(1, 2).", ["3"]),
        ("add(a=-4)", ["-3"]),
        ('look_up("a ) in (it")\nadd(1, b=1)', ['{"en": "A ) IN (IT"}', "2"]),
        ("add(1+2)", ["Error in add: arguments must be plain values, got add(1+2)"]),
        ("add(x)", ["Error in add: arguments must be plain values"]),
        ("add(**{})", ["Error in add: got an unexpected keyword argument '**'"]),
        ("add(1, 2", ["Error in add: malformed call; write add(value, key=value)"]),
        ("add(1, 2, 3)", ["Error in add: too many positional arguments"]),
        ("add(1, a=2)", ["Error in add: multiple values for argument 'a'"]),
        ("sub(1, 2)", ["Error: there is no tool 'sub'"]),
        ("add(" * 500, ["Error in add: malformed call"] * 500),
    ],
)
async def test_plain_calls_are_run_or_answered_with_a_readable_error(turn, texts):
    results = await ToolSet([add, look_up], syntax="plain").run(turn)
    assert len(results) == len(texts)
    for result, text in zip(results, texts, strict=True):
        assert text in result.text


def test_functions_that_cannot_be_tools_are_refused():
    def untyped(a):
        pass

    def starred(*numbers: int):
        pass

    with pytest.raises(InvalidInput, match="'untyped': parameter 'a' has no type"):
        ToolSet([untyped])
    with pytest.raises(InvalidInput, match="'starred': parameter 'numbers'"):
        ToolSet([starred])
    with pytest.raises(InvalidInput, match="same name"):
        ToolSet([add, add])


class Sum(ToolEnv):
    def __init__(self, **options):
        super().__init__([add], max_turns=2, **options)

    def begin(self, seed, options):
        return f"add 1 to {seed}"

    async def score(self, answer):
        return float("4" in answer and self.results[-1].text == "4")


async def test_a_tool_environment_answers_calls_and_scores_the_answer():
    env = Sum()
    assert await env.reset(seed=3) == ("add 1 to 3", {})
    observation, reward, terminated, truncated, info = await env.step(
        call('{"name": "add", "arguments": {"a": 3}}')
    )
    assert observation == [{"role": "tool", "name": "add", "content": "4"}]
    assert (reward, terminated, truncated) == (0.0, False, False)
    assert info == {"calls": 1, "failed_calls": 0}
    assert (await env.step("It is 4"))[1:4] == (1.0, True, False)
    assert env.tool_schemas[0]["function"]["name"] == "add"


async def test_a_tool_environment_is_truncated_after_its_turns():
    env = Sum(syntax="plain", result_role="user")
    await env.reset(seed=3)
    observation, *_ = await env.step("add(")
    assert observation[0]["role"] == "user"
    assert (await env.step("add(1)"))[1:4] == (0.0, False, True)
