"""From the end of optim_step to a token sampled from the new version, against 0.5 s.

Rank 32 on every target, unembedding included. The time runs from `optim_step`'s result until a
client pinned to the version just made has its first token back. `theirs` is the limit.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time

import numpy as np
from harness import options, report, say

import tinsmith
from tinsmith import AdamParams, Datum, SamplingParams

LIMIT_S = 0.5


async def main() -> None:
    chosen = options(__doc__)
    rounds = 2 if chosen.quick else 4 * chosen.runs
    times = []
    async with tinsmith.connect(num_cpus=os.cpu_count(), kv_bytes=1 << 28) as service:
        training = await service.create_lora_training_client(chosen.model, rank=32, seed=0)
        info = await training.get_info()
        tokens = np.random.default_rng(0).integers(0, info.vocab_size, 17)
        data = [Datum(tokens[:-1], {"target_tokens": tokens[1:], "weights": np.ones(16)})]
        params = SamplingParams(max_tokens=1, stop=[])
        for turn in range(rounds + 1):
            training.forward_backward(data, "cross_entropy")
            stepped = await training.optim_step(AdamParams())
            started = time.perf_counter()
            policy = await training.save_weights_and_get_sampling_client()
            sampled = await policy.sample(tokens[:4], 1, params)
            taken = time.perf_counter() - started
            assert sampled.sequences[0].versions.tolist() == [stepped.version]
            say(f"{'warm-up' if turn == 0 else f'version {stepped.version}'}: {taken:.3f} s")
            if turn > 0:
                times.append(taken)
    median = statistics.median(times)
    size = info.num_parameters * 4 / 1e6
    report("s", median, LIMIT_S, LIMIT_S / median, rounds, adapter_mb=round(size, 1))


if __name__ == "__main__":
    asyncio.run(main())
