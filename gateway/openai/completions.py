"""`POST /v1/completions`."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import numpy as np
from fastapi import Response
from fastapi.responses import JSONResponse

from ...envs.recording import Prompt
from ...envs.renderer import decode
from ...primitives.types import SampledSequence, SampleResponse, TokenLogprobs
from .choice import Choice, count_tokens, number, token_text, usage
from .errors import InvalidRequest
from .limits import check_room
from .policies import ServedPolicy
from .requests import CompletionRequest
from .sessions import Session
from .streaming import event_stream, merged


async def completion(body: CompletionRequest, policy: ServedPolicy, session: Session) -> Response:
    given = body.prompts()
    if session.name is not None and len(given) > 1:
        raise InvalidRequest("a trajectory goes on with one prompt at a time", "prompt")
    prompts = [
        session.recording.text_prompt(policy.tokenizer, body.model, prompt) for prompt in given
    ]
    if body.max_tokens == 0 and not body.echo:
        raise InvalidRequest("max_tokens=0 asks for nothing without echo", "max_tokens")
    if body.stream and body.echo and (body.logprobs is not None or body.max_tokens == 0):
        raise InvalidRequest("a prompt's logprobs do not stream: leave out stream", "stream")
    for prompt in prompts:
        check_room(policy, len(prompt.tokens), body.max_tokens)
    answer = _Answer(body, policy, session, prompts)
    return await (event_stream(answer.chunks()) if body.stream else answer.whole())


class _Answer:
    def __init__(
        self,
        body: CompletionRequest,
        policy: ServedPolicy,
        session: Session,
        prompts: Sequence[Prompt],
    ) -> None:
        self.body, self.policy, self.session, self.prompts = body, policy, session, prompts
        self.tokenizer = policy.tokenizer
        # What is asked for without tokens, the prompt's logprobs, comes with one to be dropped.
        self.params = body.sampling_params(policy.tokenizer, max(body.max_tokens, 1))
        self.head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": body.model,
        }

    async def whole(self) -> Response:
        body = self.body
        prompt_logprobs = body.echo and body.logprobs is not None
        responses = await asyncio.gather(
            *(
                self.policy.client.sample(
                    prompt.tokens,
                    body.n,
                    self.params,
                    include_prompt_logprobs=prompt_logprobs,
                    topk_prompt_logprobs=(body.logprobs or 0) if body.echo else 0,
                    topk_sample_logprobs=body.logprobs or 0,
                )
                for prompt in self.prompts
            )
        )
        choices: list[Choice] = []
        shown: list[dict[str, Any]] = []
        for prompt, response in zip(self.prompts, responses, strict=True):
            for sequence in response.sequences:
                choice = Choice.of(self._asked_for(sequence), self.tokenizer, body.stop)
                self._settle(choice, prompt)
                choices.append(choice)
                shown.append(
                    {
                        "index": len(shown),
                        "text": self._echo(prompt) + choice.content,
                        "logprobs": self._whole_logprobs(prompt, response, choice.sequence),
                        "finish_reason": choice.finish_reason,
                    }
                )
        counts = usage(
            self._prompt_tokens(),
            count_tokens(choices),
            sum(response.prompt_cache_hit_tokens for response in responses),
        )
        return JSONResponse({**self.head, "choices": shown, "usage": counts})

    async def chunks(self) -> AsyncGenerator[dict[str, Any]]:
        n = self.body.n
        choices = [Choice(self.tokenizer, self.body.stop) for _ in range(n * len(self.prompts))]
        offsets = [0] * len(choices)
        streams = [
            self.policy.client.sample_stream(
                prompt.tokens, n, self.params, topk_sample_logprobs=self.body.logprobs or 0
            )
            for prompt in self.prompts
        ]
        async for which, token in merged(streams):
            index = which * n + token.index
            choice, prompt = choices[index], self.prompts[which]
            text = "" if choice.tokens else self._echo(prompt)
            text += choice.push(token)
            logprobs = None
            if self.body.logprobs is not None:
                logprobs = self._logprobs(SampledSequence.of([token]), offsets[index])
                offsets[index] += sum(map(len, logprobs["tokens"]))
            done = token.stop_reason is not None
            if done:
                self._settle(choice, prompt)
            if text or logprobs or done:
                shown = {
                    "index": index,
                    "text": text,
                    "logprobs": logprobs,
                    "finish_reason": choice.finish_reason if done else None,
                }
                yield {**self.head, "choices": [shown]}
        if self.body.stream_options.include_usage:
            counts = usage(self._prompt_tokens(), count_tokens(choices))
            yield {**self.head, "choices": [], "usage": counts}

    def _asked_for(self, sequence: SampledSequence) -> SampledSequence:
        return sequence if self.body.max_tokens else SampledSequence.of([])

    def _prompt_tokens(self) -> int:
        return sum(len(prompt.tokens) for prompt in self.prompts)

    def _echo(self, prompt: Prompt) -> str:
        return decode(self.tokenizer, prompt.tokens, special=False) if self.body.echo else ""

    def _settle(self, choice: Choice, prompt: Prompt) -> None:
        message = {"role": "assistant", "content": choice.content}
        self.session.add(self.tokenizer, prompt, choice.sequence, message)

    def _whole_logprobs(
        self, prompt: Prompt, response: SampleResponse, sequence: SampledSequence
    ) -> dict[str, Any] | None:
        if self.body.logprobs is None:
            return None
        if response.prompt_logprobs is None:
            return self._logprobs(sequence)
        tops = [response.topk_prompt_logprobs, sequence.topk_logprobs]
        both = SampledSequence(
            np.concatenate([prompt.tokens, sequence.tokens]),
            np.concatenate([response.prompt_logprobs, sequence.logprobs]),
            sequence.versions,
            sequence.stop_reason,
            _joined([top for top in tops if top is not None]),
        )
        return self._logprobs(both)

    def _logprobs(self, sequence: SampledSequence, offset: int = 0) -> dict[str, Any]:
        """OpenAI's older form of logprobs; a prompt's first token has none."""
        texts = [token_text(self.tokenizer, int(token)) for token in sequence.tokens]
        values = [None if np.isnan(value) else number(value) for value in sequence.logprobs]
        top, named = sequence.topk_logprobs, None
        if top is not None:
            # The token itself is always among them.
            named = [
                None if value is None else {**self._named(top, at), text: value}
                for at, (text, value) in enumerate(zip(texts, values, strict=True))
            ]
        return {
            "tokens": texts,
            "token_logprobs": values,
            "top_logprobs": named,
            "text_offset": np.cumsum([offset, *map(len, texts)])[:-1].tolist(),
        }

    def _named(self, top: TokenLogprobs, at: int) -> dict[str, float]:
        return {
            token_text(self.tokenizer, int(token)): number(logprob)
            for token, logprob in zip(top.tokens[at], top.logprobs[at], strict=True)
        }


def _joined(tops: Sequence[TokenLogprobs]) -> TokenLogprobs | None:
    if not tops:
        return None
    return TokenLogprobs(
        np.concatenate([top.tokens for top in tops]), np.concatenate([top.logprobs for top in tops])
    )
