"""`POST /v1/chat/completions`."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import Response
from fastapi.responses import JSONResponse

from ...envs.recording import Prompt
from ...envs.renderer import ChatRenderer
from ...envs.text_stream import INCOMPLETE
from ...envs.tools import Call
from ...primitives.types import Message, SampledSequence, SamplingParams
from .choice import Choice, count_tokens, number, token_text, usage
from .errors import InvalidRequest
from .limits import check_room
from .policies import ServedPolicy
from .requests import ChatRequest, tool_call
from .sessions import Session
from .streaming import event_stream, merged


async def chat_completion(body: ChatRequest, policy: ServedPolicy, session: Session) -> Response:
    renderer = policy.renderer(body.chat_template_kwargs)
    messages, tools = [m.for_template() for m in body.messages], body.offered_tools()
    if tools:
        _check_tools_shown(renderer, tools)
    prompt = session.recording.chat_prompt(renderer, body.model, messages, tools)
    max_tokens = body.max_completion_tokens or body.max_tokens
    check_room(policy, len(prompt.tokens), max_tokens)
    params = body.sampling_params(policy.tokenizer, max_tokens)
    answer = _Answer(body, policy, session, prompt, params)
    return await (event_stream(answer.chunks()) if body.stream else answer.whole())


def _check_tools_shown(renderer: ChatRenderer, tools: list[dict[str, Any]]) -> None:
    some = [{"role": "user", "content": "x"}]
    if renderer.text(some, tools) == renderer.text(some):
        raise InvalidRequest(
            "this model's chat template shows no tools to the model; describe them in a message, "
            "or use a model whose template takes `tools`",
            "tools",
        )


class _Answer:
    def __init__(
        self,
        body: ChatRequest,
        policy: ServedPolicy,
        session: Session,
        prompt: Prompt,
        params: SamplingParams,
    ) -> None:
        self.body, self.policy, self.session = body, policy, session
        self.prompt, self.params = prompt, params
        self.tokenizer = policy.tokenizer
        self.calls = body.offered_tools() is not None
        self.head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": body.model,
        }

    async def whole(self) -> Response:
        response = await self.policy.client.sample(
            self.prompt.tokens,
            self.body.n,
            self.params,
            topk_sample_logprobs=self.body.top_logprobs,
        )
        choices = [
            Choice.of(sequence, self.tokenizer, self.body.stop, calls=self.calls)
            for sequence in response.sequences
        ]
        shown = []
        for index, choice in enumerate(choices):
            message = self._settle(choice)
            shown.append(
                {
                    "index": index,
                    "message": _for_client(message),
                    "logprobs": self._logprobs(choice.sequence),
                    "finish_reason": choice.finish_reason,
                }
            )
        counts = usage(
            len(self.prompt.tokens), count_tokens(choices), response.prompt_cache_hit_tokens
        )
        return JSONResponse(
            {**self.head, "object": "chat.completion", "choices": shown, "usage": counts}
        )

    async def chunks(self) -> AsyncGenerator[dict[str, Any]]:
        choices = [
            Choice(self.tokenizer, self.body.stop, calls=self.calls) for _ in range(self.body.n)
        ]
        tokens = self.policy.client.sample_stream(
            self.prompt.tokens,
            self.body.n,
            self.params,
            topk_sample_logprobs=self.body.top_logprobs,
        )
        async for _, token in merged([tokens]):
            choice = choices[token.index]
            delta: dict[str, Any] = {} if choice.tokens else {"role": "assistant"}
            text = choice.push(token)
            if text or "role" in delta:
                delta["content"] = text
            logprobs = self._logprobs(SampledSequence.of([token]))
            if delta or logprobs:
                yield self._chunk(token.index, delta, logprobs)
            if token.stop_reason is not None:
                calls = _for_client(self._settle(choice)).get("tool_calls", [])
                delta = {"tool_calls": [{"index": i} | c for i, c in enumerate(calls)]}
                yield self._chunk(
                    token.index, delta if calls else {}, finish_reason=choice.finish_reason
                )
        if self.body.stream_options.include_usage:
            counts = usage(len(self.prompt.tokens), count_tokens(choices))
            yield {
                **self.head,
                "object": "chat.completion.chunk",
                "choices": [],
                "usage": counts,
            }

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: Any = None,
        finish_reason: str | None = None,
    ) -> dict[str, Any]:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }
        return {**self.head, "object": "chat.completion.chunk", "choices": [choice]}

    def _settle(self, choice: Choice) -> Message:
        """The finished choice's message, recorded."""
        message: Message = {"role": "assistant", "content": choice.content}
        calls = choice.calls if self.body.parallel_tool_calls else choice.calls[:1]
        if calls:
            message["tool_calls"] = [_numbered(call) for call in calls]
        self.session.add(self.tokenizer, self.prompt, choice.sequence, message)
        return message

    def _logprobs(self, sequence: SampledSequence) -> Any:
        if not self.body.logprobs:
            return None
        entries, top = [], sequence.topk_logprobs
        for at, pair in enumerate(zip(sequence.tokens, sequence.logprobs, strict=True)):
            likeliest = zip(top.tokens[at], top.logprobs[at], strict=True) if top else ()
            shown = [self._token_logprob(*other) for other in likeliest]
            entries.append({**self._token_logprob(*pair), "top_logprobs": shown})
        return {"content": entries, "refusal": None}

    def _token_logprob(self, token: int, logprob: float) -> dict[str, Any]:
        text = token_text(self.tokenizer, int(token))
        # Part of a character has bytes that its text does not tell.
        spelled = None if INCOMPLETE in text else list(text.encode())
        return {"token": text, "logprob": number(logprob), "bytes": spelled}


def _numbered(call: Call) -> dict[str, Any]:
    return tool_call(f"call_{uuid.uuid4().hex[:24]}", call.name, call.keywords)


def _for_client(message: Message) -> dict[str, Any]:
    """A message as OpenAI's clients read it: a call's arguments are JSON text."""
    calls = message.get("tool_calls")
    if not calls:
        return message
    return {
        "role": message["role"],
        "content": message["content"] or None,
        "tool_calls": [
            tool_call(
                call["id"],
                call["function"]["name"],
                json.dumps(call["function"]["arguments"], ensure_ascii=False),
            )
            for call in calls
        ],
    }
