"""Tools, most simply plain typed Python functions, and environments around them.

    def add(a: int, b: int) -> int:
        '''Add two numbers.

        Args:
            a: the first.
            b: the second.
        '''
        return a + b

    ToolSet([add]).schemas     # for the chat template
    await ToolSet([add]).run('<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>')

A tool may also be a schema and what answers its calls (`SchemaTool`), and come from a provider that
is opened with the episode (`ToolProvider`; `mcp_tools.MCPTools` is one). Whatever the model writes is answered with a text that it can read; nothing that it writes raises.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,
    Protocol,
    Required,
    get_type_hints,
    runtime_checkable,
)

import docstring_parser
from pydantic import ConfigDict, Field, PydanticUserError, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from ..primitives.errors import InvalidInput
from .core import Env, Observation, ResetResult, StepResult

Syntax = Literal["json", "plain"]
"""`json`: `<tool_call>{"name": …, "arguments": {…}}</tool_call>` (Hermes, Qwen);
`plain`: `name(1, key="value")` with literals of Python."""

CALL_MARK = "<tool_call>"
_JSON_CALL = re.compile(r"<tool_call>(.*?)(</tool_call>|$)", re.DOTALL)
_LONE_CALL = re.compile(r"^\s*([A-Za-z_]\w*)\(.*\)\s*$", re.MULTILINE)
_MAX_PARENTHESES = 64
_JSON_TYPES = str | int | float | None | list | dict


@dataclass(frozen=True)
class ToolResult:
    """What a call gave: a text for the model; `ok` is false where that is an error message."""

    name: str
    text: str
    ok: bool = True


@runtime_checkable
class AnyTool(Protocol):
    """What a `ToolSet` holds."""

    name: str
    schema: dict[str, Any]

    async def call(self, positional: Sequence[Any], keywords: dict[str, Any]) -> ToolResult: ...


@runtime_checkable
class ToolProvider(Protocol):
    """Tools that exist while an episode lasts."""

    async def open(self) -> Sequence[AnyTool]:
        """Start what the tools need, and list them.

        Raises:
            EnvironmentFailure: it does not start.
        """

    async def close(self) -> None: ...


ToolLike = Callable[..., Any] | AnyTool
"""A typed function, or a tool."""


class Tool:
    """One function with its JSON schema.

    Raises:
        InvalidInput: a parameter without type, `*args`, `**kwargs`, or a type without schema.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.name = function.__name__
        self.signature = inspect.signature(function)
        docs = docstring_parser.parse(inspect.getdoc(function) or "")
        described = {parameter.arg_name: parameter.description for parameter in docs.params}
        hints = get_type_hints(function, include_extras=True)
        fields: dict[str, Any] = {}
        for parameter in self.signature.parameters.values():
            where = f"tool {self.name!r}: parameter {parameter.name!r}"
            if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                raise InvalidInput(f"{where} must have a name of its own that calls can use")
            if parameter.name not in hints:
                raise InvalidInput(f"{where} has no type annotation")
            given = parameter.default is not parameter.empty
            shown = given and isinstance(parameter.default, _JSON_TYPES)
            note = Field(
                description=described.get(parameter.name),
                json_schema_extra={"default": parameter.default} if shown else None,
            )
            kind: Any = Annotated[hints[parameter.name], note]  # type: ignore[valid-type, name-defined]
            fields[parameter.name] = NotRequired[kind] if given else Required[kind]
        arguments: Any = TypedDict(self.name, fields)  # type: ignore[operator, misc]
        arguments.__pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[attr-defined]
        try:
            self.arguments = TypeAdapter(arguments)
            parameters = self.arguments.json_schema()
        except PydanticUserError as error:
            raise InvalidInput(f"tool {self.name!r}: no JSON schema: {error}") from error
        parameters.pop("title", None)
        for schema in parameters.get("properties", {}).values():
            schema.pop("title", None)
        description = "\n\n".join(filter(None, [docs.short_description, docs.long_description]))
        self.schema = _schema(self.name, description, parameters)

    async def call(self, positional: Sequence[Any], keywords: dict[str, Any]) -> ToolResult:
        """Validate and call. A refused argument or a raising tool gives a result that says so."""
        try:
            given = dict(self.signature.bind_partial(*positional, **keywords).arguments)
            arguments = self.arguments.validate_python(given)
        except TypeError as error:
            return _failed(self.name, f"{error}")
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"
                for problem in error.errors(include_url=False)
            )
            return _failed(self.name, problems)
        try:
            value = self.function(**arguments)
            if inspect.isawaitable(value):
                value = await value
        except Exception as error:
            return _failed(self.name, f"{type(error).__name__}: {error}")
        text = value if isinstance(value, str) else json.dumps(value, default=str)
        return ToolResult(self.name, text)


class ToolError(Exception):
    """What a tool raises to tell the model something, without the error's type in front."""


class SchemaTool:
    """A tool given by its JSON schema and an async function that answers a call.

    `answer` takes the arguments by name, as the model wrote them: checking them against the
    schema is its own affair. What it raises becomes an error message for the model.
    """

    def __init__(
        self,
        name: str,
        description: str,
        parameters: dict[str, Any],
        answer: Callable[[dict[str, Any]], Awaitable[str]],
    ) -> None:
        self.name = name
        self.answer = answer
        self.schema = _schema(name, description, parameters)
        self._names = list(parameters.get("properties") or {})

    async def call(self, positional: Sequence[Any], keywords: dict[str, Any]) -> ToolResult:
        named = dict(zip(self._names, positional, strict=False))
        if len(positional) > len(self._names):
            return _failed(self.name, f"takes {len(self._names)} arguments, got {len(positional)}")
        if twice := named.keys() & keywords.keys():
            return _failed(self.name, f"multiple values for argument {min(twice)!r}")
        try:
            return ToolResult(self.name, await self.answer(named | keywords))
        except ToolError as error:
            return _failed(self.name, f"{error}")
        except Exception as error:
            return _failed(self.name, f"{type(error).__name__}: {error}")


def _schema(name: str, description: str, parameters: dict[str, Any]) -> dict[str, Any]:
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": function}


def _failed(name: str, what: str) -> ToolResult:
    return ToolResult(name, f"Error in {name}: {what}", ok=False)


@dataclass(frozen=True)
class Call:
    """A call as the model wrote it."""

    name: str
    positional: Sequence[Any]
    keywords: dict[str, Any]


class ToolSet:
    """The tools of an environment, and the syntax in which the model calls them."""

    def __init__(self, tools: Sequence[ToolLike], syntax: Syntax = "json") -> None:
        if syntax not in ("json", "plain"):
            raise InvalidInput(f'syntax must be "json" or "plain", got {syntax!r}')
        self.syntax = syntax
        made = [tool if isinstance(tool, AnyTool) else Tool(tool) for tool in tools]
        self.tools: dict[str, AnyTool] = {tool.name: tool for tool in made}
        if len(self.tools) != len(tools):
            raise InvalidInput("two tools have the same name")

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """One OpenAI-style function schema per tool, as chat templates take them."""
        return [tool.schema for tool in self.tools.values()]

    async def run(self, text: str) -> list[ToolResult]:
        """Run every call found in the model's turn, in order; none if it calls nothing."""
        calls = _json_calls(text) if self.syntax == "json" else self._plain_calls(text)
        results = []
        for call in calls:
            if isinstance(call, ToolResult):
                results.append(call)
            elif call.name not in self.tools:
                known = ", ".join(self.tools)
                message = f"Error: there is no tool {call.name!r}; the tools are: {known}"
                results.append(ToolResult(call.name, message, ok=False))
            else:
                results.append(await self.tools[call.name].call(call.positional, call.keywords))
        return results

    def _plain_calls(self, text: str) -> Iterator[Call | ToolResult]:
        names = "|".join(map(re.escape, self.tools))
        known = re.compile(rf"\b({names})\(")
        position = 0
        while match := known.search(text, position):
            call, position = _plain_call(text, match.start(), match.end())
            yield call
        if position == 0:
            for lone in _LONE_CALL.finditer(text):
                yield Call(lone[1], (), {})


def _json_calls(text: str) -> Iterator[Call | ToolResult]:
    form = '<tool_call>{"name": "...", "arguments": {...}}</tool_call>'
    for match in _JSON_CALL.finditer(text):
        try:
            call = json.loads(match[1])
            arguments = call.get("arguments", {})
            if isinstance(arguments, str):
                arguments = json.loads(arguments)
            if not isinstance(call["name"], str) or not isinstance(arguments, dict):
                raise TypeError("name must be a string and arguments an object")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            message = f"Error: malformed tool call ({error}); write {form}"
            yield ToolResult("", message, ok=False)
        else:
            yield Call(call["name"], (), arguments)


def split_json_calls(text: str) -> tuple[str, list[Call]]:
    """A turn's text outside its calls, and the calls; all of it is text if any is malformed."""
    calls = [call for call in _json_calls(text) if isinstance(call, Call)]
    matches = list(_JSON_CALL.finditer(text))
    if not calls or len(calls) < len(matches):
        return text, []
    before, rest = text[: matches[0].start()], text[matches[0].start() :]
    return before.rstrip() + _JSON_CALL.sub("", rest).rstrip(), calls


def _plain_call(text: str, start: int, inside: int) -> tuple[Call | ToolResult, int]:
    """The call at `start` and where it ends. Its end is the first closing parenthesis up to which
    it is an expression of Python."""
    name = text[start : inside - 1]
    stop = inside
    for _ in range(_MAX_PARENTHESES):
        closing = text.find(")", stop)
        if closing < 0:
            break
        stop = closing + 1
        try:
            call = ast.parse(text[start:stop], mode="eval").body
            assert isinstance(call, ast.Call)
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            continue
        try:
            positional = [ast.literal_eval(value) for value in call.args]
            keywords = {k.arg or "**": ast.literal_eval(k.value) for k in call.keywords}
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            message = f"Error in {name}: arguments must be plain values, got {text[start:stop]}"
            return ToolResult(name, message, ok=False), stop
        return Call(name, positional, keywords), stop
    message = f"Error in {name}: malformed call; write {name}(value, key=value)"
    return ToolResult(name, message, ok=False), max(stop, inside)


class ToolEnv(Env):
    """An environment in which the model calls tools until it answers.

    A turn with calls is answered with their results; a turn without is the answer, and ends the
    episode with its score. Subclasses give the task in `begin` and judge the answer in `score`;
    either may be `async`.

    Args:
        tools: functions with types and a docstring, tools, and providers of tools, which are
            opened in `reset` and closed in `close`.
        syntax: how the model writes calls.
        result_role: role of the messages that hold results: "tool", or "user" for chat templates
            that know no tools.
        max_turns: turns after which an episode without answer is truncated.
    """

    def __init__(
        self,
        tools: Sequence[ToolLike | ToolProvider],
        *,
        syntax: Syntax = "json",
        result_role: Literal["tool", "user"] = "tool",
        max_turns: int = 8,
    ) -> None:
        self.providers = [tool for tool in tools if isinstance(tool, ToolProvider)]
        self.own_tools = [tool for tool in tools if not isinstance(tool, ToolProvider)]
        self.tool_set = ToolSet(self.own_tools, syntax)
        self.tool_schemas = self.tool_set.schemas
        self.result_role = result_role
        self.max_turns = max_turns

    def begin(
        self, seed: int | None, options: dict[str, Any] | None
    ) -> Observation | Awaitable[Observation]:
        """The task of this seed."""
        raise NotImplementedError

    def score(self, answer: str) -> float | Awaitable[float]:
        """The reward of the model's last turn."""
        raise NotImplementedError

    async def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> ResetResult:
        self.turns = 0
        self.results: list[ToolResult] = []
        if self.providers:
            provided = [tool for provider in self.providers for tool in await provider.open()]
            self.tool_set = ToolSet([*self.own_tools, *provided], self.tool_set.syntax)
            self.tool_schemas = self.tool_set.schemas
        return await _settled(self.begin(seed, options)), {}

    async def step(self, action: str) -> StepResult:
        self.turns += 1
        results = await self.tool_set.run(action)
        self.results += results
        info = {
            "calls": len(self.results),
            "failed_calls": sum(not result.ok for result in self.results),
        }
        if not results:
            return "", await _settled(self.score(action)), True, False, info
        messages = []
        for result in results:
            name = {"name": result.name} if self.result_role == "tool" and result.name else {}
            messages.append({"role": self.result_role, **name, "content": result.text})
        return messages, 0.0, False, self.turns >= self.max_turns, info

    async def close(self) -> None:
        for provider in self.providers:
            await provider.close()


async def _settled(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value
