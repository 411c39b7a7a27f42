"""What a step of an environment costs beyond the environment's own time, against 2 ms.

A real environment worker plays episodes with a policy that answers at once. The environment
notes when each of its steps begins and ends; from the end of one to the beginning of the next
lies all that a turn costs besides policy and environment: both ways between worker and
environment process, checks, chat template and tokenizer. The figure is the median of one
episode at a time, in milliseconds; `theirs` is the limit. `steps_per_s` is what the worker gets
through when 64 episodes play at once.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time

import numpy as np
from harness import options, report, say

import tinsmith
from tinsmith.envs import Env, EpisodeLimits, EpisodeSpec
from tinsmith.primitives.client import load_tokenizer
from tinsmith.primitives.types import SampledSequence, SampleResponse

LIMIT_MS = 2.0
TURNS = 16


@tinsmith.envs.register("stopwatch")
class Stopwatch(Env):
    """Trivial steps, and the gaps between them in seconds as the last one's info."""

    def reset(self, *, seed=None, options=None):
        self.gaps, self.ended = [], None
        return "First.", {}

    def step(self, action):
        if self.ended is not None:
            self.gaps.append(time.perf_counter() - self.ended)
        over = len(self.gaps) == TURNS
        info = {"gaps": self.gaps} if over else {}
        self.ended = time.perf_counter()
        return "Next.", 0.0, over, False, info


class Instant:
    """A policy that says the same at once."""

    def __init__(self, model: str) -> None:
        tokens = load_tokenizer(model).encode("CALC(3+4)", add_special_tokens=False)
        count = len(tokens)
        self.response = SampleResponse(
            [
                SampledSequence(
                    np.array(tokens), np.zeros(count, np.float32), np.zeros(count, np.int32), "stop"
                )
            ]
        )

    async def sample(self, prompt, num_samples=1, sampling_params=None):
        return self.response


async def main() -> None:
    chosen = options(__doc__)
    rounds, at_once = (2, 4) if chosen.quick else (8 * chosen.runs, 64)
    async with tinsmith.connect(num_cpus=os.cpu_count()) as service:
        workers = await service.create_env_client(chosen.model)
        async with workers:
            policy, limits = Instant(chosen.model), EpisodeLimits(max_turns=TURNS + 1)
            spec = EpisodeSpec("stopwatch", policy, limits=limits)
            await workers.run_episode(spec)  # a warm-up
            gaps: list[float] = []
            for _ in range(rounds):
                gaps += (await workers.run_episode(spec)).info["gaps"]
            started = time.perf_counter()
            await asyncio.gather(*(workers.run_episode(spec) for _ in range(at_once)))
            taken = time.perf_counter() - started
    median, slowest = 1e3 * statistics.median(gaps), 1e3 * np.quantile(gaps, 0.95)
    say(f"median {median:.2f} ms, 95% below {slowest:.2f} ms")
    report(
        "ms",
        median,
        LIMIT_MS,
        LIMIT_MS / median,
        len(gaps),
        p95_ms=round(slowest, 2),
        steps_per_s=round(at_once * (TURNS + 1) / taken),
    )


if __name__ == "__main__":
    asyncio.run(main())
