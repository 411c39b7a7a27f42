"""A trace of one training step, for Perfetto (ui.perfetto.dev) or Chrome's `about:tracing`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from ..primitives.errors import InvalidInput
from ..primitives.types import AdamParams, Datum, LoraConfig
from .learner import LearnerEngine


@dataclass(frozen=True)
class StepProfile:
    """Where a step's time went: `seconds` by stage, `operators` the dearest of torch's, by name,
    with their own seconds."""

    tokens: int
    seconds: dict[str, float]
    operators: dict[str, float]


def random_batches(
    engine: LearnerEngine, runs: int, sequences: int, tokens: int, rank: int
) -> dict[str, list[Datum]]:
    """New runs with a batch each: `sequences` of `tokens` random tokens, a loss on every one.

    Raises:
        InvalidInput: longer sequences than the model takes.
    """
    backbone = engine.backbone
    if tokens > backbone.max_context:
        raise InvalidInput(f"{tokens} tokens are beyond the model's {backbone.max_context}")
    rng, batches = np.random.default_rng(0), {}
    for index in range(runs):
        engine.create_run(f"run-{index}", LoraConfig(rank=rank, seed=index))
        drawn = rng.integers(0, backbone.vocab_size, (sequences, tokens + 1))
        batches[f"run-{index}"] = [
            Datum(row[:-1], {"target_tokens": row[1:], "weights": np.ones(tokens)}) for row in drawn
        ]
    return batches


def step(engine: LearnerEngine, batches: Mapping[str, Sequence[Datum]]) -> dict[str, float]:
    """`forward_backward` of all runs' batches at once, and an optimizer step of each; seconds by
    stage."""
    for run_id, data in batches.items():
        engine.submit(run_id, data, "cross_entropy", logprobs="loss", backward=True)
    seconds = dict.fromkeys(("queue", "pack", "forward", "backward", "optimizer"), 0.0)
    while engine.busy:
        for finished in engine.step():
            if finished.output is None:
                raise finished.error or AssertionError
            metrics = finished.output.metrics
            seconds["queue"] = max(seconds["queue"], metrics["queue_s:max"])
            for stage in ("pack", "forward", "backward"):
                seconds[stage] += metrics[f"{stage}_s:sum"]
    for stepped in engine.optim_steps(dict.fromkeys(batches, AdamParams())):
        seconds["optimizer"] += stepped.metrics["optimizer_s"]
    return seconds


def profile_step(
    engine: LearnerEngine, batches: Mapping[str, Sequence[Datum]], trace: Path
) -> StepProfile:
    """Write the trace of a step, after one to warm up."""
    step(engine, batches)
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        seconds = step(engine, batches)
    trace.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(trace))
    dear = sorted(
        ((event.key, _own_seconds(event)) for event in profiler.key_averages()),
        key=lambda item: -item[1],
    )
    tokens = sum(datum.model_input.length for data in batches.values() for datum in data)
    return StepProfile(tokens, seconds, dict(dear[:8]))


def _own_seconds(event: object) -> float:
    """On the device, where there is one: the host's time is mostly waiting for it."""
    name = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    return getattr(event, name) / 1e6
