"""The program that plays a seat in a `verifiers` environment here: its chat loop with tools.

As the library's own "null" harness it sends the conversation to the model, runs the tools that the
model calls on the task's MCP servers, and ends with a turn that calls none; but it runs inside the
environment's process, where the library's starts a Python of its own with `uv` in every episode.
"""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any

import openai
import verifiers.v1 as vf
from verifiers.v1.dialects.chat import message_to_wire

from .mcp_tools import MCPTools
from .tools import AnyTool

__all__ = ["ChatHarness"]

ID = "tinsmith"
# Where the library looks for harnesses by id.
sys.modules.setdefault(f"verifiers.v1.harnesses.{ID}", sys.modules[__name__])


class ChatHarness(vf.Harness[vf.HarnessConfig]):
    APPENDS_SYSTEM_PROMPT = True
    SUPPORTS_MCP = True
    SUPPORTS_RESUME = True
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(
        self,
        ctx: vf.ModelContext,
        trace: vf.Trace,
        runtime: vf.Runtime,
        endpoint: str,
        secret: str,
        mcp_urls: dict[str, str],
        data: vf.TaskData,
    ) -> vf.ProgramResult:
        system, prompt = self.resolve_prompt(data)
        messages: list[Any] = [{"role": "system", "content": system}] if system else []
        if isinstance(prompt, str):
            messages.append({"role": "user", "content": prompt})
        else:
            messages += [message_to_wire(message) for message in prompt or []]
        async with (
            contextlib.AsyncExitStack() as stack,
            openai.AsyncOpenAI(
                base_url=endpoint, api_key=secret, max_retries=0, timeout=None
            ) as client,
        ):
            tools: dict[str, AnyTool] = {}
            for name, url in mcp_urls.items():
                prefix = f"{name}_" if name else ""
                server = MCPTools(url=url, prefix=prefix, call_seconds=self.config.tool_timeout)
                stack.push_async_callback(server.close)
                tools |= {tool.name: tool for tool in await server.open()}
            try:
                await _chat(client, ctx.model, messages, tools)
            except openai.APIStatusError as error:  # a task's @stop refuses the next turn so
                return vf.ProgramResult(1, "", str(error))
        return vf.ProgramResult(0, "", "")


async def _chat(
    client: openai.AsyncOpenAI, model: str, messages: list[Any], tools: dict[str, AnyTool]
) -> None:
    offered: Any = [tool.schema for tool in tools.values()] or openai.omit
    while True:
        completion = await client.chat.completions.create(
            model=model, messages=messages, tools=offered
        )
        reply = completion.choices[0].message
        messages.append(reply.model_dump(exclude_none=True))
        if not reply.tool_calls:
            return
        for call in reply.tool_calls:
            assert call.type == "function"
            result = await _answer(call.function, tools)
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})


async def _answer(call: Any, tools: dict[str, AnyTool]) -> str:
    if call.name not in tools:
        return f"Error: there is no tool {call.name!r}; the tools are: {', '.join(tools)}"
    return (await tools[call.name].call((), json.loads(call.arguments or "{}"))).text
