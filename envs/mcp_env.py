"""Questions answered with the tools of MCP servers: `make("tinsmith.envs.mcp_env:MCPEnv", …)`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ..primitives.errors import InvalidInput
from .core import Observation, message
from .jsonl import read_jsonl
from .mcp_tools import MCPTools
from .splits import Rows
from .tools import Syntax, ToolEnv

ANSWER = re.compile(r"<answer>\s*(.*?)\s*</answer>", re.DOTALL)


class MCPEnv(ToolEnv):
    """Answer a question with the tools of MCP servers.

    The turn without a tool call is the answer. What stands in it between `<answer>` tags counts,
    or else all of it: it must equal the row's answer up to case and white space around it
    (`match="exact"`), or the row's answer must be found in it as a regular expression ("regex").

    Args:
        tasks: path of a JSONL file; each line holds a `question` and an `answer`.
        servers: for each server the arguments of `MCPTools`, such as `{"command": "my-server"}`
            or `{"url": "http://127.0.0.1:8000/mcp"}`.
        match: how an answer is compared.
        split: "eval": the last fifth of the rows, "train": the others; None: all.
        system_prompt: the system message, if any.
        strict: refuse rows that cannot be used, instead of skipping them with a warning.
        syntax, result_role, max_turns: as of `ToolEnv`.

    Raises:
        NotFound: no such file.
        InvalidInput: no row can be used; with `strict`, the first that cannot, with its line.
    """

    def __init__(
        self,
        tasks: str,
        servers: Sequence[Mapping[str, Any]],
        *,
        match: Literal["exact", "regex"] = "exact",
        split: Literal["train", "eval"] | None = None,
        system_prompt: str | None = None,
        strict: bool = False,
        syntax: Syntax = "json",
        result_role: Literal["tool", "user"] = "tool",
        max_turns: int = 8,
    ) -> None:
        if match not in ("exact", "regex"):
            raise InvalidInput(f'match must be "exact" or "regex", got {match!r}')
        super().__init__(
            [MCPTools(**server) for server in servers],
            syntax=syntax,
            result_role=result_role,
            max_turns=max_turns,
        )
        self.match = match
        self.system_prompt = system_prompt
        self.tasks = read_tasks(tasks, regex=match == "regex", strict=strict)
        self.rows = Rows(len(self.tasks), split, f"tasks {tasks!r}")

    def begin(self, seed: int | None, options: dict[str, Any] | None) -> Observation:
        self.row = self.tasks[self.rows.pick(seed)]
        system = [message("system", self.system_prompt)] if self.system_prompt else []
        return [*system, message("user", self.row["question"])]

    def score(self, answer: str) -> float:
        tagged = ANSWER.findall(answer)
        given = tagged[-1] if tagged else answer.strip()
        if self.match == "regex":
            return float(re.search(self.row["answer"], given) is not None)
        return float(given.casefold() == self.row["answer"].strip().casefold())


def read_tasks(path: str, *, regex: bool = False, strict: bool = False) -> list[dict[str, str]]:
    """The rows of a JSONL file with `question` and `answer`, both texts (numbers are taken too).

    Lines that are no such row, or hold no regular expression where `regex`, are skipped with a
    warning that names them, or refused with `strict`.
    """

    def parse(line: int, row: dict[str, Any]) -> dict[str, str]:
        task = {name: _text(name, row.get(name)) for name in ("question", "answer")}
        if regex:
            try:
                re.compile(task["answer"])
            except re.error as error:
                raise ValueError(f"`answer` is no regular expression: {error}") from None
        return task

    return read_jsonl(path, parse, strict=strict)[0]


def _text(name: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"`{name}` must be a text, got {value!r:.100}")
    return str(value)
