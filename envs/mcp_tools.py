"""The tools of an MCP server, beside or instead of Python functions.

    class Files(ToolEnv):
        def __init__(self, folder):
            super().__init__([count_words, MCPTools("my-file-server", ["--root", folder])])

`MCPEnv` is such an environment, ready made: questions and answers from a file, tools from servers.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import IO, Any

import pydantic

from ..primitives.errors import EnvironmentFailure, InvalidInput
from .extras import extra
from .tools import SchemaTool, ToolError

# At import, so that the process that forks an environment's episodes does it once for all of them.
mcp = extra("mcp", "an MCP server")

# The server must not outlive its episode, however that ends; closing its input may not be enough.
_DIE_WITH_PARENT = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
os.execvp(sys.argv[1], sys.argv[1:])
"""


class MCPTools:
    """One MCP server, started or connected to with the episode and left with it.

    Whatever a call comes to is a text for the model: the tool's own errors, no answer in time, an
    answer that breaks the protocol, a server that is gone.

    Args:
        command: the server's program, spoken to over its standard input and output.
        args: its arguments.
        env: variables to add to the few that it inherits (HOME, PATH and the like).
        cwd: its working directory.
        url: instead of `command`, the address of a running server (streamable HTTP).
        headers: HTTP headers for `url`.
        prefix: put before each tool's name, to tell servers with equal names apart.
        only: names of the tools to offer; None: all.
        start_seconds: how long starting and listing the tools may take.
        call_seconds: how long a call may take.

    Raises:
        InvalidInput: both or neither of `command` and `url`.
    """

    def __init__(
        self,
        command: str | None = None,
        args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        *,
        cwd: str | None = None,
        url: str | None = None,
        headers: Mapping[str, str] | None = None,
        prefix: str = "",
        only: Sequence[str] | None = None,
        start_seconds: float = 20.0,
        call_seconds: float = 20.0,
    ) -> None:
        if (command is None) == (url is None):
            raise InvalidInput("an MCP server needs a command or a url, and not both")
        self.command = command
        self.args = list(args)
        self.env = dict(env or {})
        self.cwd = cwd
        self.url = url
        self.headers = dict(headers or {})
        self.prefix = prefix
        self.only = only
        self.start_seconds = start_seconds
        self.call_seconds = call_seconds
        self._owner: asyncio.Task[None] | None = None

    async def open(self) -> list[SchemaTool]:
        """Start or reach the server, and list its tools.

        Raises:
            EnvironmentFailure: that failed, or took too long; with the end of what it wrote to its
                standard error.
            InvalidInput: a tool of `only` that it does not have.
        """
        await self.close()
        ready: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        self._leave = asyncio.Event()
        self._owner = asyncio.create_task(self._own(ready))
        try:
            async with asyncio.timeout(self.start_seconds):
                listed = await asyncio.shield(ready)
        except TimeoutError:
            self._owner.cancel()
            await self.close()
            raise EnvironmentFailure(
                f"{self._where()} did not list its tools within {self.start_seconds:g} s"
            ) from None
        names = {tool.name for tool in listed}
        if self.only is not None and not names.issuperset(self.only):
            await self.close()
            missing = ", ".join(sorted(set(self.only) - names))
            raise InvalidInput(f"{self._where()} has no tool {missing}; it has {sorted(names)}")
        return [
            SchemaTool(
                self.prefix + tool.name,
                tool.description or "",
                tool.input_schema,
                self._answerer(tool.name),
            )
            for tool in listed
            if self.only is None or tool.name in self.only
        ]

    async def close(self) -> None:
        """Stop the server, or leave it where it was reached by `url`."""
        if self._owner is None:
            return
        owner, self._owner = self._owner, None
        self._leave.set()
        await asyncio.wait([owner])

    async def _own(self, ready: asyncio.Future[list[Any]]) -> None:
        """The life of the connection, in one task: its scopes must be left where they were
        entered."""
        with tempfile.TemporaryFile("w+") as errors:
            try:
                async with self._connected(errors) as self.client:
                    ready.set_result(await self._listed())
                    await self._leave.wait()
            except (Exception, asyncio.CancelledError) as error:
                # Once the tools are listed, the calls tell the model what is wrong.
                if not ready.done():
                    message = f"{self._where()} does not start: {_root(error)}{_tail(errors)}"
                    ready.set_exception(EnvironmentFailure(message))
                    ready.exception()  # seen, also where nobody waits any more
                if isinstance(error, asyncio.CancelledError):
                    raise

    @contextlib.asynccontextmanager
    async def _connected(self, errors: IO[str]) -> AsyncIterator[Any]:
        if self.url is not None:
            http = extra("mcp.client.streamable_http", "an MCP server")
            async with (
                http.create_mcp_http_client(headers=self.headers) as connection,
                mcp.Client(http.streamable_http_client(self.url, http_client=connection)) as client,
            ):
                yield client
            return
        assert self.command is not None
        if shutil.which(self.command) is None:
            raise FileNotFoundError(f"there is no program {self.command!r}")
        parameters = mcp.StdioServerParameters(
            command=sys.executable,
            args=["-c", _DIE_WITH_PARENT, self.command, *self.args],
            env=self.env,
            cwd=self.cwd,
        )
        async with mcp.Client(mcp.stdio_client(parameters, errlog=errors)) as client:
            yield client

    async def _listed(self) -> list[Any]:
        page = await self.client.list_tools()
        tools = list(page.tools)
        while page.next_cursor:
            page = await self.client.list_tools(cursor=page.next_cursor)
            tools += page.tools
        return tools

    def _answerer(self, name: str) -> Any:
        async def answer(arguments: dict[str, Any]) -> str:
            if self._owner is None or self._owner.done():
                raise ToolError("its server is gone")
            try:
                async with asyncio.timeout(self.call_seconds):
                    result = await self.client.call_tool(name, arguments)
            except TimeoutError:
                raise ToolError(f"no answer within {self.call_seconds:g} s") from None
            except pydantic.ValidationError as error:
                problem = error.errors(include_url=False)[0]["msg"]
                raise ToolError(f"the server's answer is malformed: {problem}") from None
            except mcp.MCPError as error:
                raise ToolError(error.message) from None
            text = result_text(result)
            if result.is_error:
                raise ToolError(text)
            return text

        return answer

    def _where(self) -> str:
        return f"MCP server {self.url or ' '.join([self.command or '', *self.args])!r}"


def result_text(result: Any) -> str:
    """What a `CallToolResult` says, as text; what is no text is named."""
    parts = []
    for block in result.content:
        if block.type == "text":
            parts.append(block.text)
        elif block.type == "resource" and hasattr(block.resource, "text"):
            parts.append(block.resource.text)
        elif block.type == "resource_link":
            parts.append(f"[{block.uri}]")
        else:
            parts.append(f"[{block.type}, which is no text]")
    if not parts and result.structured_content is not None:
        parts.append(json.dumps(result.structured_content))
    return "\n".join(parts)


def _root(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return str(error) or type(error).__name__


def _tail(errors: IO[str], characters: int = 1000) -> str:
    errors.flush()
    errors.seek(0)
    text = errors.read().strip()
    return f"; it wrote:\n{text[-characters:]}" if text else ""
