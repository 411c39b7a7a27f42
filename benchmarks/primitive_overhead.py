"""What a primitive costs through Ray beyond the engine called in-process, against 15 ms.

`forward_backward` (one datum of 32 tokens), `optim_step` and `sample` (one token after a prompt
of 16) are timed both ways, alternating; the figure is the largest of the three differences of
medians, in milliseconds. `theirs` is the limit.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections.abc import Awaitable, Callable

import numpy as np
from harness import options, report, say, with_environment

import tinsmith
from tinsmith import AdamParams, Datum, LoraConfig, SamplingParams
from tinsmith.actors.threads import ENGINE_ENV
from tinsmith.engines.backbone import Backbone
from tinsmith.engines.learner import LearnerEngine
from tinsmith.engines.sampler import SamplerEngine
from tinsmith.primitives.client import load_tokenizer
from tinsmith.primitives.types import PolicyRef, SampleRequest

LIMIT_MS = 15.0
LORA = dict(rank=8, seed=0)


async def main() -> None:
    chosen = options(__doc__)
    rounds = 2 if chosen.quick else 20 * chosen.runs
    learner = LearnerEngine(Backbone(chosen.model))
    learner.create_run("run", LoraConfig(**LORA))
    sampler = SamplerEngine(learner.backbone, load_tokenizer(chosen.model), kv_bytes=1 << 28)
    sampler.add_adapter("run", 0, LoraConfig(**LORA), learner.export("run"))
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, learner.backbone.vocab_size, 33)
    data = [Datum(tokens[:-1], {"target_tokens": tokens[1:], "weights": np.ones(32)})]
    params = SamplingParams(max_tokens=1, stop=[], seed=0)

    def sample_here() -> None:
        sampler.submit(SampleRequest(tokens[:16], params, PolicyRef("run", 0)))
        while sampler.busy:
            sampler.step()

    async with tinsmith.connect(num_cpus=os.cpu_count(), kv_bytes=1 << 28) as service:
        training = await service.create_lora_training_client(chosen.model, **LORA)
        policy = await training.save_weights_and_get_sampling_client()
        here: dict[str, Callable[[], object]] = {
            "forward_backward": lambda: learner.forward_backward("run", data, "cross_entropy"),
            "optim_step": lambda: learner.optim_step("run", AdamParams()),
            "sample": sample_here,
        }
        through_ray: dict[str, Callable[[], Awaitable[object]]] = {
            "forward_backward": lambda: training.forward_backward(data, "cross_entropy"),
            "optim_step": lambda: training.optim_step(AdamParams()),
            "sample": lambda: policy.sample(tokens[:16], 1, params),
        }
        added_ms = {}
        for name in here:
            near: list[float] = []
            far: list[float] = []
            for turn in range(rounds + 2):
                started = time.perf_counter()
                here[name]()
                between = time.perf_counter()
                await through_ray[name]()
                if turn >= 2:  # after a warm-up
                    near.append(between - started)
                    far.append(time.perf_counter() - between)
            medians = [1e3 * statistics.median(times) for times in (near, far)]
            say(f"{name}: in-process {medians[0]:.2f} ms, through Ray {medians[1]:.2f} ms")
            added_ms[name] = round(medians[1] - medians[0], 2)
    worst = max(added_ms.values())
    report("ms", worst, LIMIT_MS, LIMIT_MS / max(worst, 0.1), rounds, added_ms=added_ms)


if __name__ == "__main__":
    with_environment(**ENGINE_ENV["env_vars"])  # as the actors run
    asyncio.run(main())
