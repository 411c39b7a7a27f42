"""One sample of a request, drawn by vLLM: what is asked of it, and what is kept of its answer."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..engines.adapter_store import AdapterKey
from ..engines.prompt_scores import PromptScores
from ..engines.requests import ends_with_stop_string
from ..primitives.errors import TinsmithError, Unavailable
from ..primitives.types import (
    SampledSequence,
    SampledToken,
    SampleRequest,
    StopReason,
    TokenLogprobs,
)

if TYPE_CHECKING:
    from .vllm_engine import VllmEngine

Listener = Callable[[SampledToken], None]


@dataclass(eq=False)
class Live:
    """What a run's live requests carry.

    Attributes:
        number: integer id of the adapter.
        key: the version that it has now.
        versions: (epoch, version), in order: the version that it had from each of vLLM's epochs on.
        users: vLLM's requests that carry it.
        moved: new ones carry another.
    """

    number: int
    key: AdapterKey
    versions: list[tuple[int, int]]
    users: int = 0
    moved: bool = False

    def version_at(self, epoch: int) -> int:
        return self.versions[bisect_right(self.versions, epoch, key=lambda v: v[0]) - 1][1]


@dataclass(frozen=True)
class Carried:
    """An adapter as a request names it (none: number 0), its version, and the run's `Live` if the
    request is not pinned."""

    name: str
    number: int
    version: int
    live: Live | None = None

    def for_vllm(self) -> Any:
        from vllm.lora.request import LoRARequest

        return LoRARequest(self.name, self.number, "memory") if self.number else None


@dataclass(eq=False)
class Draw:
    """Sample `index` of a request. `scores` are the request's, filled by sample 0."""

    engine: VllmEngine
    request: SampleRequest
    index: int
    max_tokens: int
    scores: PromptScores
    listener: Listener | None = None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    top: list[tuple[list[int], list[float]]] = field(default_factory=list)
    stop_reason: StopReason | None = None
    cached: int = 0
    told: int = 0  # tokens that the listener has heard of

    async def run(self, key: AdapterKey) -> None:
        """`key`: the version that the request began with."""
        while self.stop_reason is None:
            await self._go_on(key)

    async def _go_on(self, key: AdapterKey) -> None:
        """Until the sample is done, or its cache is to be computed anew under other weights."""
        engine, pinned = self.engine, self.request.policy.version is not None
        carried = engine.carried(key, pinned)
        recompute = engine.options.live_cache == "recompute"
        name, begun = next(engine.names), len(self.tokens)
        generating = engine.vllm.generate(
            {"prompt_token_ids": [*self.request.prompt.tolist(), *self.tokens]},
            self._params(stepwise=recompute or self.listener is not None),
            name,
            lora_request=carried.for_vllm(),
        )
        async with engine.carrying(carried), aclosing(_typed(generating)) as outputs:
            async for output in outputs:
                self._take(output, first=not begun)
                if carried.live is None or recompute:
                    self.versions += [carried.version] * (len(self.tokens) - len(self.versions))
                else:
                    self._stamp(_epochs(engine.vllm, name, output), carried.live, begun)
                self._tell()
                if recompute and carried.live is not None and carried.live.moved:
                    return

    def _params(self, stepwise: bool) -> Any:
        from vllm.sampling_params import RequestOutputKind
        from vllm.sampling_params import SamplingParams as VllmParams

        params, request = self.request.params, self.request
        ends = params.stop_tokens if params.stop is not None else self.engine.end_tokens
        return VllmParams(
            max_tokens=self.max_tokens - len(self.tokens),
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            seed=None if params.seed is None else self._seed(params.seed),
            stop=params.stop_strings or None,
            stop_token_ids=sorted(ends),
            ignore_eos=True,
            detokenize=bool(params.stop_strings),
            skip_special_tokens=False,
            logprobs=request.topk_sample_logprobs,
            prompt_logprobs=self._scored() if self.index == 0 and not self.tokens else None,
            flat_logprobs=True,
            output_kind=RequestOutputKind.DELTA if stepwise else RequestOutputKind.FINAL_ONLY,
        )

    def _seed(self, seed: int) -> int:
        """Of the draws from here on: each sample has a stream of its own."""
        words = np.random.SeedSequence((seed % 2**64, self.index, len(self.tokens)))
        return int(words.generate_state(1, np.uint64)[0] >> 1)

    def _scored(self) -> int | None:
        """How many tokens vLLM is to score at each place of the prompt: None or -1 (all) are it."""
        scores = self.scores
        if len(self.request.prompt) == 1:
            return None
        if scores.targets is not None or scores.alternatives is not None:
            return -1
        if scores.logprobs is not None or scores.top is not None:
            return self.request.topk_prompt_logprobs
        return None

    def _take(self, output: Any, first: bool) -> None:
        completion, k = output.outputs[0], self.request.topk_sample_logprobs
        if first and self.index == 0 and not self.tokens:
            self.cached = output.num_cached_tokens or 0
            self.engine.stats.cached_prompt_tokens += self.cached
            self.engine.stats.prompt_tokens += len(self.request.prompt) - self.cached
            if output.prompt_logprobs is not None:
                self._score_prompt(output.prompt_logprobs)
        flat, count = completion.logprobs, len(completion.token_ids)
        self.engine.stats.sampled_tokens += count
        self.tokens += completion.token_ids
        for start, end in zip(flat.start_indices[:count], flat.end_indices[:count], strict=True):
            self.logprobs.append(flat.logprobs[start])
            if k:
                self.top.append(likeliest(flat, start, end, k))
        stops = self.request.params.stop_strings
        if completion.finish_reason == "length" and len(self.tokens) < self.max_tokens:
            raise TinsmithError("vLLM ended a sample before its max_tokens")
        if completion.finish_reason is not None:
            self.stop_reason = "stop" if completion.finish_reason == "stop" else "length"
        elif stops and ends_with_stop_string(self.engine.tokenizer, self.tokens, stops):
            self.stop_reason = "stop"  # across a place where the sample was handed in again

    def _stamp(self, epochs: list[tuple[int, int]], live: Live, begun: int) -> None:
        """Say which version drew the tokens: vLLM tells from which token on its epoch was which."""
        for epoch, start in epochs:
            del self.versions[begun + start :]
            self.versions += [live.version_at(epoch)] * (len(self.tokens) - begun - start)

    def _tell(self) -> None:
        """What has a version, to the listener."""
        while self.listener is not None and self.told < len(self.versions):
            i, last = self.told, self.told == len(self.tokens) - 1
            top = tuple(zip(*self.top[i], strict=True)) if self.top else ()
            self.listener(
                SampledToken(
                    self.index,
                    self.tokens[i],
                    self.logprobs[i],
                    self.versions[i],
                    self.stop_reason if last else None,
                    top,
                )
            )
            self.told += 1

    def _score_prompt(self, flat: Any) -> None:
        """Fill the request's scores with those of vLLM, position by position (none at the first)."""
        scores, k = self.scores, self.request.topk_prompt_logprobs
        rows = list(zip(flat.start_indices, flat.end_indices, strict=True))[1:]
        if self._scored() == -1:
            logprobs_NV = torch.empty(len(rows), self.engine.vocab_size)
            for row, (start, end) in zip(logprobs_NV, rows, strict=True):
                row[torch.tensor(flat.token_ids[start:end])] = torch.tensor(
                    flat.logprobs[start:end]
                )
            scores.add(1, logprobs_NV)
            return
        for position, (start, _) in enumerate(rows, 1):
            if position < scores.tail:
                continue
            if scores.logprobs is not None:
                scores.logprobs[position] = flat.logprobs[start]
            if scores.top is not None:
                scores.top.tokens[position] = flat.token_ids[start + 1 : start + 1 + k]
                scores.top.logprobs[position] = flat.logprobs[start + 1 : start + 1 + k]

    def sequence(self) -> SampledSequence:
        top = None
        if self.top:
            ids, logprobs = zip(*self.top, strict=True)
            top = TokenLogprobs(np.array(ids, np.int64), np.array(logprobs, np.float32))
        return SampledSequence(
            np.array(self.tokens, np.int64),
            np.array(self.logprobs, np.float32),
            np.array(self.versions, np.int32),
            self.stop_reason or "length",
            top,
        )


def likeliest(flat: Any, start: int, end: int, k: int) -> tuple[list[int], list[float]]:
    """The `k` likeliest tokens of a position and their logprobs. Told by rank: the drawn token is
    the first entry, and where vLLM joined outputs it isn't said again in its place among them."""
    place = slice(start, end)
    tokens = zip(flat.token_ids[place], flat.logprobs[place], strict=True)
    by_rank = dict(zip(flat.ranks[place], tokens, strict=True))
    ids, logprobs = zip(*(by_rank[rank] for rank in range(1, k + 1)), strict=True)
    return list(ids), list(logprobs)


@contextmanager
def vllm_errors() -> Iterator[None]:
    """vLLM's errors as ours."""
    from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

    try:
        yield
    except EngineDeadError as error:
        raise Unavailable(f"vLLM's engine died; its log says why ({error})") from error
    except EngineGenerateError as error:
        raise TinsmithError(f"sampling failed: {error.__cause__ or error}") from error


async def _typed(generating: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
    """vLLM's outputs. Closing it withdraws the request."""
    with vllm_errors():
        async with aclosing(generating):
            async for output in generating:
                yield output


def _epochs(vllm: Any, name: str, output: Any) -> list[tuple[int, int]]:
    """(epoch, first token) of a request's tokens so far: the labels that `update_weight_version`
    gave, and 0 before the first."""
    spans = output.outputs[0].weight_versions
    if spans is not None:
        return [(_epoch(span.version), span.start) for span in spans]
    # vLLM tells only when a request is done; of one under way it is in the request's state.
    for internal in vllm.output_processor.external_req_ids.get(name, ()):
        state = vllm.output_processor.request_states.get(internal)
        if state is not None:
            return [(_epoch(label), start) for label, start in state.weight_version_starts]
    return []


def _epoch(label: str) -> int:
    return int(label) if label.isdecimal() else 0
