"""The embedded sampling engine: continuous batching over a paged cache, in plain torch.

Each step runs one packed pass: one row for every sequence that draws a token, and as many prompt
rows as fit. Requests join when their worst case fits into the cache's memory and leave when they
are done. A new adapter version takes effect at the next step, also for requests under way: their
cache is kept, every token says which version drew it, and blocks that mix versions are not reused.

Dimension names: T rows of the step, N rows whose logits are needed.
"""

from __future__ import annotations

import itertools
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..primitives.errors import InvalidInput, NotFound, OutOfCapacity
from ..primitives.types import (
    LoraConfig,
    SampledSequence,
    SampledToken,
    SampleRequest,
    SampleResponse,
    StopReason,
    TokenLogprobs,
)
from .adapter_store import AdapterKey, AdapterStore
from .backbone import Backbone
from .kv_cache import BlockPool, KVCache, chain_key, root_key
from .lora import Adapter, Span
from .prompt_scores import PromptScores
from .requests import check_request, end_tokens, ends_with_stop_string
from .route_store import RouteStore
from .sampling import draw, likeliest, uniforms
from .step_attention import Chunk, StepAttention

LOGIT_ROWS = 256


@dataclass(eq=False)
class _Sequence:
    """One sample of a request. `cached` tokens of `tokens` have their keys and values stored."""

    request: _Request
    index: int
    tokens: list[int]
    blocks: list[int] = field(default_factory=list)
    cached: int = 0
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    top: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    routed: np.ndarray | None = None
    stop_reason: StopReason | None = None
    weights: AdapterKey | None = None  # those that the cache was computed with
    mixed: bool = False
    published: int = 0  # blocks
    last_key: bytes = b""


@dataclass(eq=False)
class Times:
    """When a request came, was given its place in the cache, drew its first token, and ended; by
    `time.perf_counter()`."""

    arrived: float = field(default_factory=time.perf_counter)
    admitted: float = 0.0
    drawn: float = 0.0
    ended: float = 0.0


@dataclass(eq=False)
class _Request:
    number: int
    request: SampleRequest
    seed: int
    max_tokens: int
    stop_tokens: frozenset[int]
    streaming: bool
    blocks_needed: int
    scores: PromptScores
    sequences: list[_Sequence] = field(default_factory=list)
    reserved: int = 0
    hits: int = 0
    times: Times = field(default_factory=Times)

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt)

    @property
    def reusable(self) -> int:
        """Prompt tokens that may come from the cache: the hidden states of the others are needed,
        to score what follows them and to draw."""
        return min(self.prompt_length, self.scores.first) - 1


@dataclass(frozen=True, eq=False)
class Event:
    """Something a request's caller waits for: a drawn token, the response, or an error."""

    request: int
    token: SampledToken | None = None
    response: SampleResponse | None = None
    error: BaseException | None = None


@dataclass
class SamplerStats:
    steps: int = 0
    prompt_tokens: int = 0  # computed, not taken from the cache
    cached_prompt_tokens: int = 0
    sampled_tokens: int = 0
    requests: int = 0
    waiting: int = 0
    running: int = 0
    blocks_in_use: int = 0
    num_blocks: int = 0
    block_size: int = 0  # tokens


class SamplerEngine:
    """Not thread-safe: one call at a time.

    Args:
        backbone: the frozen base model.
        tokenizer: for end tokens and stop strings.
        kv_bytes: memory for keys and values.
        max_batch: sequences that draw at once.
        max_step_rows: rows of one pass.
        reorder: keep a second copy of the base weights, ordered for quick products (fp32 on a CPU).

    Attributes:
        on_finished: is told of every request that has its response.
    """

    def __init__(
        self,
        backbone: Backbone,
        tokenizer: Any,
        *,
        kv_bytes: int,
        block_size: int = 16,
        max_batch: int = 256,
        max_step_rows: int = 768,
        reorder: bool = False,
    ) -> None:
        self.backbone, self.tokenizer = backbone, tokenizer
        self.block_size, self.max_batch, self.max_step_rows = block_size, max_batch, max_step_rows
        token_bytes = (
            2 * backbone.num_layers * backbone.num_kv_heads * backbone.head_dim
        ) * torch.empty((), dtype=backbone.dtype).element_size()
        num_blocks = kv_bytes // (token_bytes * block_size)
        if num_blocks < 1:
            raise OutOfCapacity(
                f"kv_bytes={kv_bytes} holds not one block of {block_size} tokens "
                f"({token_bytes * block_size} bytes)"
            )
        if reorder:
            backbone.reorder()
        self.pool = BlockPool(num_blocks)
        self.cache = KVCache(
            backbone.num_layers,
            backbone.num_kv_heads,
            backbone.head_dim,
            block_size,
            num_blocks,
            backbone.dtype,
            backbone.device,
        )
        self.routes = None if backbone.routing is None else RouteStore(backbone, self.cache)
        self.adapters: AdapterStore[Adapter] = AdapterStore()
        self.end_tokens = end_tokens(backbone.path, tokenizer)
        self.stats = SamplerStats(num_blocks=num_blocks, block_size=block_size)
        self.on_finished: Callable[[SampleRequest, Times], None] | None = None
        self._numbers = itertools.count()
        self._waiting: deque[_Request] = deque()
        self._prompting: list[_Request] = []
        self._drawing: list[_Sequence] = []
        self._events: list[Event] = []

    # ---- adapters ----

    def add_adapter(
        self, run_id: str, version: int, config: LoraConfig, flat: Tensor, keep: bool = True
    ) -> None:
        """Hold a version (flat float32 parameters); it becomes the run's newest. `keep=False`
        lets it go once a newer one is there and no request uses it."""
        self.hold(run_id, version, self.adapter_of(run_id, config, flat), keep)

    def hold(self, run_id: str, version: int, adapter: Adapter, keep: bool) -> None:
        self.adapters.add(self.adapters.key_for(run_id, version, adapter), adapter, keep)
        self._sweep()

    def adapter_of(self, run_id: str, config: LoraConfig, flat: Tensor) -> Adapter:
        """From any thread.

        Raises:
            InvalidInput: another number of parameters.
        """
        layout = self.backbone.layout(config)
        if flat.shape != (layout.size,):
            raise InvalidInput(
                f"adapter of run {run_id!r}: {tuple(flat.shape)} parameters, expected {layout.size}"
            )
        return Adapter.from_flat(layout, flat.to(self.backbone.device, self.backbone.dtype))

    def drop_run(self, run_id: str) -> None:
        """Forget a run's weights; its requests under way fail."""
        self.adapters.drop_run(run_id)
        for request in [*self._waiting, *self._running()]:
            if request.request.policy.run_id == run_id:
                self.cancel(request.number)
                gone = NotFound(f"run {run_id!r} was closed while it sampled")
                self._events.append(Event(request.number, error=gone))
        self._sweep()

    def _sweep(self) -> None:
        policies = [r.request.policy for r in (*self._waiting, *self._running())]
        self.adapters.sweep({self.adapters.resolve(policy) for policy in policies})

    # ---- requests ----

    def _running(self) -> list[_Request]:
        drawing = {s.request.number: s.request for s in self._drawing}
        return [*self._prompting, *drawing.values()]

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._prompting or self._drawing or self._events)

    def submit(self, request: SampleRequest, streaming: bool = False) -> int:
        """Queue a request; `step()` returns its events under the number returned here.

        Raises:
            InvalidInput: token ids out of range, or beyond the model's context; routed experts are asked
                for, and the model has none.
            NotFound: the policy is not held.
            OutOfCapacity: it could never fit into the cache.
        """
        length, params = len(request.prompt), request.params
        max_tokens = check_request(request, self.backbone.vocab_size, self.backbone.max_context)
        if params.return_routed_experts and self.routes is None:
            raise InvalidInput("return_routed_experts: the model has no routed experts")
        self.adapters.resolve(request.policy)
        shared = length // self.block_size
        longest = -(-(length + max_tokens - 1) // self.block_size)
        needed = shared + request.num_samples * max(longest - shared, 1)
        if needed > self.pool.num_blocks:
            raise OutOfCapacity(
                f"{request.num_samples} samples of up to {length + max_tokens} tokens need "
                f"{needed} cache blocks, the sampler has {self.pool.num_blocks}; lower "
                "num_samples or max_tokens, or give it more kv_bytes"
            )
        number = next(self._numbers)
        stops = frozenset(params.stop_tokens) if params.stop is not None else self.end_tokens
        seed = secrets.randbits(63) if params.seed is None else params.seed
        scores = PromptScores(request, seed)
        entry = _Request(number, request, seed, max_tokens, stops, streaming, needed, scores)
        entry.sequences.append(_Sequence(entry, 0, request.prompt.tolist()))
        self._waiting.append(entry)
        self.stats.requests += 1
        return number

    def cancel(self, number: int) -> None:
        """Drop a request and free its memory; it yields no more events."""
        for entry in list(self._waiting):
            if entry.number == number:
                self._waiting.remove(entry)
        for entry in self._running():
            if entry.number == number:
                self._free(entry)
        self._events = [event for event in self._events if event.request != number]
        self._count()  # there may be no step after this one

    def _count(self) -> None:
        self.stats.waiting = len(self._waiting)
        self.stats.running = len(self._running())
        self.stats.blocks_in_use = self.pool.in_use

    def fail_all(self, error: BaseException) -> None:
        """After a step that raised: every request under way gets the error."""
        for entry in self._running():
            self._free(entry)
            self._events.append(Event(entry.number, error=error))

    def _free(self, entry: _Request) -> None:
        for sequence in entry.sequences:
            for block in sequence.blocks:
                self.pool.release(block)
            sequence.blocks = []
        self.pool.reserved -= entry.reserved
        entry.reserved = 0
        self._prompting = [r for r in self._prompting if r is not entry]
        self._drawing = [s for s in self._drawing if s.request is not entry]

    # ---- a step ----

    def step(self) -> list[Event]:
        """Run one pass and return what came of it (also when nothing is left to do)."""
        self._admit()
        if self._prompting or self._drawing:
            with torch.inference_mode():
                self._pass()
        self._count()
        events, self._events = self._events, []
        return events

    def _admit(self) -> None:
        places = self.max_batch - sum(r.request.num_samples for r in self._running())
        while self._waiting:
            entry = self._waiting[0]
            crowded = entry.request.num_samples > places and self._running()
            if crowded or entry.blocks_needed > self.pool.available:
                return
            self._waiting.popleft()
            places -= entry.request.num_samples
            self.pool.reserve(entry.blocks_needed)
            entry.reserved = entry.blocks_needed
            entry.times.admitted = time.perf_counter()
            self._prompting.append(entry)

    def _take_block(self, sequence: _Sequence) -> None:
        sequence.blocks.append(self.pool.take_new())
        sequence.request.reserved -= 1

    def _copy_block(self, source: int, target: int) -> None:
        self.cache.copy_block(source, target)
        if self.routes is not None:
            self.routes.copy_block(source, target)

    def _weights(self, sequence: _Sequence) -> AdapterKey:
        """The weights that this sequence runs under now; notes a swap."""
        key = self.adapters.resolve(sequence.request.request.policy)
        if sequence.weights not in (None, key):
            sequence.mixed = True
        sequence.weights = key
        return key

    def _reuse_prefix(self, sequence: _Sequence) -> None:
        """Start a prompt with the blocks that are cached already."""
        entry = sequence.request
        key = root_key(self._weights(sequence))
        sequence.last_key = key
        size = self.block_size
        for start in range(0, entry.reusable - size + 1, size):
            key = chain_key(key, entry.request.prompt[start : start + size])
            block = self.pool.find(key)
            if block is None:
                break
            self.pool.share(block)
            self.pool.reserved -= 1
            entry.reserved -= 1
            sequence.blocks.append(block)
            sequence.cached += size
            sequence.published += 1
            sequence.last_key = key
        self._copy_prompt(sequence)
        entry.hits = sequence.cached
        self.stats.cached_prompt_tokens += sequence.cached

    def _copy_prompt(self, sequence: _Sequence) -> None:
        """Take over what no finished block holds, but a request with the same prompt that draws
        just now has."""
        last, size = sequence.request.reusable, self.block_size
        if sequence.cached == last:
            return
        prompt = sequence.request.request.prompt
        donors = (
            other
            for other in self._drawing
            if other.weights == sequence.weights
            and not other.mixed
            and np.array_equal(other.request.request.prompt, prompt)
        )
        donor = next(donors, None)
        while donor is not None and sequence.cached < last:
            source = donor.blocks[len(sequence.blocks)]
            self._take_block(sequence)
            self._copy_block(source, sequence.blocks[-1])
            sequence.cached = min(len(sequence.blocks) * size, last)

    def _plan_prompts(self, room: int) -> list[tuple[_Sequence, int]]:
        """Which prompts go on this step, and by how many tokens."""
        planned: list[tuple[_Sequence, int]] = []
        under_way: set[bytes] = set()
        for entry in self._prompting:
            sequence = entry.sequences[0]
            if room <= 0:
                break
            if sequence.weights is None and entry.prompt_length > self.block_size:
                # Another request computes the same beginning just now: share it next step.
                first = chain_key(
                    root_key(self.adapters.resolve(entry.request.policy)),
                    entry.request.prompt[: self.block_size],
                )
                if first in under_way and self._gains_by_waiting(entry, planned):
                    continue
                under_way.add(first)
            if sequence.weights is None:
                self._reuse_prefix(sequence)
            count = min(entry.prompt_length - sequence.cached, room)
            planned.append((sequence, count))
            room -= count
        return planned

    def _gains_by_waiting(self, entry: _Request, planned: list[tuple[_Sequence, int]]) -> bool:
        """Whether a prompt under way will leave a block that is not cached yet and fits here."""
        size, prompt = self.block_size, entry.request.prompt
        for other, count in planned:
            theirs = other.request.request.prompt
            stop = min(len(theirs), len(prompt))
            differs = np.flatnonzero(theirs[:stop] != prompt[:stop])
            common = int(differs[0]) if len(differs) else stop
            done = min(other.cached + count, (common // size) * size, entry.reusable)
            if done // size * size > other.cached and not other.mixed:
                return True
        return False

    def _pass(self) -> None:
        prompts = self._plan_prompts(self.max_step_rows - len(self._drawing))
        order = {
            id(s): (self._weights(s), s.blocks) for s in (*self._drawing, *(s for s, _ in prompts))
        }
        drawing = sorted(self._drawing, key=lambda s: order[id(s)])
        counts = {id(s): n for s, n in prompts}
        # Rows of one adapter stand together: its drawing sequences, then its prompts.
        members = sorted(
            [*drawing, *(s for s, _ in prompts)],
            key=lambda s: (order[id(s)][0], id(s) in counts),
        )
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        decode_rows: list[int] = []
        chunks: list[Chunk] = []
        stops: list[tuple[_Sequence, int]] = []  # sequence, its last row + 1
        for s in members:
            count = counts.get(id(s), 1)
            end = s.cached + count
            while len(s.blocks) * self.block_size < end:
                self._take_block(s)
            if id(s) in counts:
                chunks.append(Chunk(len(tokens), len(tokens) + count, s.blocks, end))
                self.stats.prompt_tokens += count
            else:
                decode_rows.append(len(tokens))
            for position in range(s.cached, end):
                tokens.append(s.tokens[position])
                positions.append(position)
                block, offset = divmod(position, self.block_size)
                slots.append(s.blocks[block] * self.block_size + offset)
            stops.append((s, len(tokens)))
        spans = self._spans([(order[id(s)][0], stop) for s, stop in stops])
        attention = StepAttention(
            self.cache,
            np.array(slots),
            np.array(decode_rows, np.int64),
            [s.blocks for s in drawing],
            [s.cached + 1 for s in drawing],
            chunks,
            self.backbone.num_heads // self.backbone.num_kv_heads,
        )
        device = self.backbone.device
        hidden_TD = self.backbone.hidden(
            torch.tensor(tokens, device=device),
            torch.tensor(positions, device=device),
            attention,
            spans,
        )
        if self.routes is not None:
            self.routes.write(np.array(slots))
        self.stats.steps += 1
        self._score_prompts(stops, counts, hidden_TD, spans)
        for s, _ in stops:
            s.cached += counts.get(id(s), 1)
            self._publish_blocks(s)
        ready = [(s, stop - 1) for s, stop in stops if s.cached == len(s.tokens)]
        self._prompting = [r for r in self._prompting if r.sequences[0].cached < r.prompt_length]
        if ready:
            self._draw(ready, hidden_TD, spans)

    def _spans(self, stops: list[tuple[AdapterKey, int]]) -> list[Span]:
        spans, start = [], 0
        for key, group in itertools.groupby(stops, key=lambda item: item[0]):
            stop = list(group)[-1][1]
            adapter = self.adapters.adapter(key)
            if adapter is not None:
                spans.append(Span(start, stop, adapter))
            start = stop
        return spans

    def _logits(
        self, hidden_TD: Tensor, rows: np.ndarray, spans: list[Span]
    ) -> Iterator[tuple[slice, Tensor]]:
        """Logits of ascending rows, some at a time."""
        for first in range(0, len(rows), LOGIT_ROWS):
            here = rows[first : first + LOGIT_ROWS]
            local = []
            for span in spans:
                start, stop = np.searchsorted(here, [span.start, span.stop]).tolist()
                if stop > start:
                    local.append(Span(start, stop, span.adapter))
            selected = hidden_TD[torch.from_numpy(here).to(hidden_TD.device)]
            logits = self.backbone.logits(selected, local)
            yield slice(first, first + len(here)), logits

    def _publish_blocks(self, s: _Sequence) -> None:
        size = self.block_size
        while not s.mixed and (s.published + 1) * size <= s.cached:
            start = s.published * size
            s.last_key = chain_key(s.last_key, np.array(s.tokens[start : start + size]))
            self.pool.publish(s.blocks[s.published], s.last_key)
            s.published += 1

    def _score_prompts(
        self,
        stops: list[tuple[_Sequence, int]],
        counts: dict[int, int],
        hidden_TD: Tensor,
        spans: list[Span],
    ) -> None:
        """Score the prompt tokens that follow this step's prompt rows."""
        for s, stop in stops:
            if id(s) not in counts:
                continue
            # Row `offset + t` predicts prompt token t.
            offset = stop - counts[id(s)] - s.cached - 1
            first = max(s.cached + 1, s.request.scores.first)
            last = min(s.cached + counts[id(s)] + 1, s.request.prompt_length)
            rows = np.arange(first, last) + offset
            for part, logits in self._logits(hidden_TD, rows, spans):
                s.request.scores.add(first + part.start, logits)

    def _draw(
        self, ready: list[tuple[_Sequence, int]], hidden_TD: Tensor, spans: list[Span]
    ) -> None:
        """Draw the next token of every sequence in `ready` (with its row), and settle them."""
        rows = np.array([row for _, row in ready])
        for part, logits in self._logits(hidden_TD, rows, spans):
            drawers: list[_Sequence] = []
            source: list[int] = []
            for position, (s, _) in enumerate(ready[part]):
                first_token = len(s.tokens) == s.request.prompt_length
                family = self._fork(s) if first_token else [s]
                drawers += family
                source += [position] * len(family)
            if len(drawers) > len(logits):
                logits = logits[torch.tensor(source, device=logits.device)]
            params = [s.request.request.params for s in drawers]
            self._note_likeliest(drawers, logits)
            tokens, logprobs = draw(
                logits,
                np.array([p.temperature for p in params]),
                np.array([p.top_k for p in params]),
                np.array([p.top_p for p in params]),
                uniforms(
                    np.array([s.request.seed for s in drawers], np.uint64),
                    np.array([s.index for s in drawers], np.uint64),
                    np.array([len(s.logprobs) for s in drawers], np.uint64),
                ),
            )
            for s, token, logprob in zip(drawers, tokens.tolist(), logprobs.tolist(), strict=True):
                self._settle(s, token, logprob)

    @staticmethod
    def _note_likeliest(drawers: list[_Sequence], logits_NV: Tensor) -> None:
        """Keep the likeliest tokens for the sequences that asked for them."""
        asking = [
            (row, s) for row, s in enumerate(drawers) if s.request.request.topk_sample_logprobs
        ]
        if not asking:
            return
        rows = torch.tensor([row for row, _ in asking], device=logits_NV.device)
        most = max(s.request.request.topk_sample_logprobs for _, s in asking)
        temperatures = np.array([s.request.request.params.temperature for _, s in asking])
        ids, logprobs = likeliest(logits_NV[rows], temperatures, most)
        for (_, s), i, p in zip(asking, ids.cpu().numpy(), logprobs.cpu().numpy(), strict=True):
            count = s.request.request.topk_sample_logprobs
            s.top.append((i[:count], p[:count]))

    def _fork(self, first: _Sequence) -> list[_Sequence]:
        """The prompt is cached: make the request's other samples, sharing its full blocks."""
        entry = first.request
        entry.times.drawn = time.perf_counter()
        full = entry.prompt_length // self.block_size
        for index in range(1, entry.request.num_samples):
            twin = _Sequence(
                entry,
                index,
                list(first.tokens),
                first.blocks[:full],
                first.cached,
                weights=first.weights,
                mixed=first.mixed,
                published=first.published,
                last_key=first.last_key,
            )
            for block in twin.blocks:
                self.pool.share(block)
            entry.sequences.append(twin)
            if len(first.blocks) > full:
                self._take_block(twin)
                self._copy_block(first.blocks[full], twin.blocks[full])
        self._drawing += entry.sequences
        return list(entry.sequences)

    def _settle(self, s: _Sequence, token: int, logprob: float) -> None:
        entry = s.request
        assert s.weights is not None
        s.tokens.append(token)
        s.logprobs.append(logprob)
        s.versions.append(s.weights[1])
        self.stats.sampled_tokens += 1
        if token in entry.stop_tokens or ends_with_stop_string(
            self.tokenizer,
            s.tokens[s.request.prompt_length :],
            s.request.request.params.stop_strings,
        ):
            s.stop_reason = "stop"
        elif len(s.logprobs) == entry.max_tokens:
            s.stop_reason = "length"
        if entry.streaming:
            top = tuple(zip(*(a.tolist() for a in s.top[-1]), strict=True)) if s.top else ()
            drawn = SampledToken(s.index, token, logprob, s.weights[1], s.stop_reason, top)
            self._events.append(Event(entry.number, token=drawn))
        if s.stop_reason is None:
            return
        self._drawing.remove(s)
        if self.routes is not None and entry.request.params.return_routed_experts:
            s.routed = self.routes.read(s.blocks, s.cached)
        for block in s.blocks:
            self.pool.release(block)
        s.blocks = []
        if all(other.stop_reason for other in entry.sequences):
            self._free(entry)
            entry.times.ended = time.perf_counter()
            if self.on_finished is not None:
                self.on_finished(entry.request, entry.times)
            self._events.append(Event(entry.number, response=self._response(entry)))

    def _response(self, entry: _Request) -> SampleResponse:
        sequences = [
            SampledSequence(
                np.array(s.tokens[entry.prompt_length :], np.int64),
                np.array(s.logprobs, np.float32),
                np.array(s.versions, np.int32),
                s.stop_reason or "length",
                _stacked(s.top) if s.top else None,
                s.routed,
            )
            for s in entry.sequences
        ]
        scores = entry.scores
        return SampleResponse(
            sequences,
            scores.logprobs,
            scores.top,
            scores.targets,
            scores.alternatives,
            entry.hits,
        )


def _stacked(top: list[tuple[np.ndarray, np.ndarray]]) -> TokenLogprobs:
    ids, logprobs = zip(*top, strict=True)
    return TokenLogprobs(np.stack(ids), np.stack(logprobs))


def default_kv_bytes(free_bytes: int) -> int:
    """A quarter of the free memory, at most 4 GiB."""
    return min(free_bytes // 4, 4 << 30)
