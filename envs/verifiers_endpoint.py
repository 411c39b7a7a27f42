"""An OpenAI-compatible model endpoint whose completions are an episode's turns.

A library that drives itself against a model sends its requests here, over the loopback interface of
the environment's process. `turn` gives what the conversation grew by; `answer` replies to it.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from typing import Any

from aiohttp import web

from ..primitives.errors import InvalidInput
from .tools import split_json_calls


class Endpoint:
    """Serves `POST /v1/chat/completions`, whole or streamed, of one growing conversation.

    An async context manager; `base_url` is what clients need.
    """

    def __init__(self) -> None:
        self.tools: list[dict[str, Any]] | None = None
        self._requests: asyncio.Queue[tuple[dict[str, Any], asyncio.Future[str]]] = asyncio.Queue()
        self._answered: list[dict[str, Any]] = []
        self._pending: asyncio.Future[str] | None = None

    async def __aenter__(self) -> Endpoint:
        app = web.Application(client_max_size=1 << 28)
        app.router.add_post("/v1/chat/completions", self._complete)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.base_url = f"http://127.0.0.1:{self._runner.addresses[0][1]}/v1"
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._runner.cleanup()

    async def turn(self) -> list[dict[str, Any]]:
        """Wait for the next request; the messages that are new in it.

        Raises:
            InvalidInput: it does not go on from the conversation so far.
        """
        body, self._pending = await self._requests.get()
        messages = [_plain(message) for message in body["messages"]]
        # A model's own turn may come back in another form: what was called, not how it was said.
        known = len(self._answered)
        same = messages[:known] == self._answered
        if known and (not same or len(messages) <= known + 1 or not _is_reply(messages[known])):
            raise InvalidInput(
                "a request to the model does not go on from the last one; environments that "
                "rewrite their conversation, or hold several, cannot be played as one episode"
            )
        self._answered = messages
        self.tools = body.get("tools") or self.tools
        new = messages[known + 1 :] if known else messages
        return [_named(message, messages) for message in new]

    def answer(self, text: str) -> None:
        """Reply to the pending request."""
        assert self._pending is not None
        if not self._pending.done():
            self._pending.set_result(text)

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        reply: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        await self._requests.put((body, reply))
        completion = _completion(await reply, body)
        if not body.get("stream"):
            return web.json_response(completion)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for chunk in _chunks(completion):
            await response.write(f"data: {chunk}\n\n".encode())
        return response


def _completion(text: str, body: dict[str, Any]) -> dict[str, Any]:
    content, calls = split_json_calls(text) if body.get("tools") else (text, [])
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if calls:
        message["tool_calls"] = [
            {
                "id": f"call_{uuid.uuid4().hex}",
                "type": "function",
                "function": {"name": call.name, "arguments": json.dumps(call.keywords)},
            }
            for call in calls
        ]
    choice = {
        "index": 0,
        "message": message,
        "finish_reason": "tool_calls" if calls else "stop",
        "logprobs": None,
    }
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": body.get("model", "policy"),
        "choices": [choice],
    }


def _chunks(completion: dict[str, Any]) -> list[str]:
    """The completion as server-sent events: one with all of the turn, one with its end."""
    (choice,) = completion["choices"]
    message = dict(choice["message"])
    if "tool_calls" in message:
        message["tool_calls"] = [
            {"index": index, **call} for index, call in enumerate(message["tool_calls"])
        ]
    chunks = []
    for delta, reason in ((message, None), ({}, choice["finish_reason"])):
        part = {"index": 0, "delta": delta, "finish_reason": reason}
        chunk = completion | {"object": "chat.completion.chunk", "choices": [part]}
        chunks.append(json.dumps(chunk))
    return [*chunks, "[DONE]"]


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    """What is compared and kept of a message, with a text for its content."""
    content = message.get("content") or ""
    if isinstance(content, list):
        if any(part.get("type") != "text" for part in content):
            raise InvalidInput("a message of the environment holds something else than text")
        content = "\n".join(part["text"] for part in content)
    kept = {name: message[name] for name in ("tool_calls", "tool_call_id") if message.get(name)}
    return {"role": message["role"], "content": content, **kept}


def _is_reply(message: dict[str, Any]) -> bool:
    return message.get("role") == "assistant"


def _named(message: dict[str, Any], conversation: list[dict[str, Any]]) -> dict[str, Any]:
    """A tool's result under the tool's name, for templates that know no call ids."""
    named = {"role": message["role"], "content": message["content"]}
    for earlier in conversation:
        for call in earlier.get("tool_calls") or []:
            if message.get("tool_call_id") == call["id"]:
                named["name"] = call["function"]["name"]
    return named
