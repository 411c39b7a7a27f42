"""What samplers and their pool tell of requests: metrics, spans, log lines, notes for a crash
report."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from ..engines.adapter_store import AdapterStore
from ..engines.sampler import Times
from ..primitives import tracing
from ..primitives.types import SampleRequest, SampleResponse
from .learner_watch import outcome
from .notes import Notes
from .observed import Meters

# Versions.
STALENESS = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 16.0, 32.0)
BASE = "base"  # what stands for a run where the bare base model is sampled

logger = logging.getLogger(__name__)


class SamplerWatch:
    """Of one sampler."""

    def __init__(self, meters: Meters, notes: Notes) -> None:
        self.meters, self.notes = meters, notes
        self._stages = meters.histogram(
            "sampler_stage_seconds",
            "What requests waited (queue), took for the prompt (prefill) and drew for (decode).",
            "stage",
        )

    @contextmanager
    def serving(self, request: SampleRequest) -> Iterator[SampleRequest]:
        """A request is being served; yields it as the engine gets it."""
        run, tokens = request.policy.run_id or BASE, len(request.prompt)
        slot = self.notes.begin("sample", run, request.request_id, tokens)
        span = tracing.NOTHING
        if request.traceparent is not None:
            about = dict(run=run, request=request.request_id, prompt_tokens=tokens)
            span = tracing.start("sampler.sample", request.traceparent, **about)
        try:
            yield (
                request
                if span is tracing.NOTHING
                else replace(request, traceparent=span.traceparent)
            )
        except BaseException as error:
            span.end(error)
            ids = {"run": run, "request": request.request_id}
            logger.info("sampling ended: %s: %s", type(error).__name__, error, extra=ids)
            raise
        else:
            span.end()
        finally:
            self.notes.end(slot)

    def finished(self, request: SampleRequest, times: Times) -> None:
        """The torch engine tells, in its thread, when a request's stages were."""
        stages = {
            "queue": (times.arrived, times.admitted),
            "prefill": (times.admitted, times.drawn),
            "decode": (times.drawn, times.ended),
        }
        for name, (began, ended) in stages.items():
            self._stages.labels(name).observe(ended - began)
            tracing.record(name, request.traceparent, began, ended)

    def collect(self, stats: Mapping[str, int]) -> list[Metric]:
        """`stats`: of the engine."""
        families: list[Metric] = []
        for name, (kind, about) in _STATS.items():
            family = (CounterMetricFamily if kind == "counter" else GaugeMetricFamily)(
                f"tinsmith_sampler_{name}", about, value=stats[name]
            )
            families.append(family)
        return [*families, *self.meters.collect()]


_STATS = {
    "steps": ("counter", "Passes of a sampler."),
    "requests": ("counter", "Requests that a sampler was given."),
    "prompt_tokens": ("counter", "Prompt tokens computed, not taken from the cache."),
    "cached_prompt_tokens": ("counter", "Prompt tokens taken from the cache."),
    "sampled_tokens": ("counter", "Tokens drawn."),
    "running": ("gauge", "Requests under way."),
    "waiting": ("gauge", "Requests that have no room in the cache yet."),
    "blocks_in_use": ("gauge", "Blocks of the key/value cache in use."),
    "num_blocks": ("gauge", "Blocks of the key/value cache."),
    "block_size": ("gauge", "Tokens of a block."),
}


class PoolWatch:
    """Of a model's samplers together: what is known by run."""

    def __init__(self, meters: Meters, adapters: AdapterStore[Any]) -> None:
        self.meters, self._adapters = meters, adapters
        m = meters
        self._requests = m.counter(
            "sample_requests", "Sampling requests done, by how they ended.", "run", "outcome"
        )
        self._prompt = m.counter("prompt_tokens", "Tokens of prompts sampled from.", "run")
        self._drawn = m.counter("sampled_tokens", "Tokens sampled.", "run")
        self._seconds = m.histogram("sample_seconds", "A sampling request, from end to end.")
        self._staleness = m.histogram(
            "sample_staleness_versions",
            "At the end of a request: the newest published version less that of its oldest token.",
            "run",
            buckets=STALENESS,
        )
        self._published = m.gauge(
            "published_version", "The newest version that samplers hold of a run.", "run"
        )
        self._under_way = m.gauge("samples_under_way", "Sampling requests not done.", "run")

    @contextmanager
    def request(self, request: SampleRequest) -> Iterator[Served]:
        """A request, from when it came to its end."""
        run = request.policy.run_id or BASE
        served = Served(request)
        began = time.perf_counter()
        self._under_way.labels(run).inc()
        error: BaseException | None = None
        try:
            yield served
        except BaseException as raised:
            error = raised
            raise
        finally:
            if request.policy.run_id is None or self._holds(run):
                self._under_way.labels(run).dec()
                self._count(run, served, error)
            else:
                self.meters.forget(run)  # it was dropped meanwhile
            self._seconds.observe(time.perf_counter() - began)

    def _holds(self, run: str) -> bool:
        return self._adapters.newest(run) is not None

    def _count(self, run: str, served: Served, error: BaseException | None) -> None:
        self._requests.labels(run, outcome(error)).inc()
        if error is None:
            self._prompt.labels(run).inc(len(served.request.prompt))
        if served.tokens:
            self._drawn.labels(run).inc(served.tokens)
        newest = self._adapters.newest(run)
        if newest is not None and served.oldest is not None:
            self._staleness.labels(run).observe(max(newest - served.oldest, 0))

    def collect(self) -> list[Metric]:
        self._published.clear()
        for run in self._adapters.runs():
            self._published.labels(run).set(self._adapters.newest(run) or 0)
        return self.meters.collect()


class Served:
    """What came of a request: how many tokens, and the version of the oldest."""

    def __init__(self, request: SampleRequest) -> None:
        self.request = request
        self.tokens = 0
        self.oldest: int | None = None

    def drew(self, version: int) -> None:
        self.tokens += 1
        self.oldest = version if self.oldest is None else min(self.oldest, version)

    def response(self, response: SampleResponse) -> SampleResponse:
        for sequence in response.sequences:
            if len(sequence.tokens):
                self.tokens += len(sequence.tokens)
                oldest = int(sequence.versions.min())
                self.oldest = oldest if self.oldest is None else min(self.oldest, oldest)
        return response
