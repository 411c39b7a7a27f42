"""Tokens per second of 64 concurrent SDK samplers through the gateway, against 64 native ones.

Each of 64 sampling clients draws one completion after a prompt of its own, all at once, on the
same sampler; alternating.
"""

from __future__ import annotations

import asyncio
import os

import numpy as np
import tinker
from harness import alternate, options, report
from serving import served
from tinker import types
from transformers import AutoConfig

import tinsmith
from tinsmith import SamplingParams

CLIENTS = 64


def main() -> None:
    chosen = options(__doc__)
    max_tokens = 4 if chosen.quick else 64
    rng = np.random.default_rng(0)
    vocab = AutoConfig.from_pretrained(chosen.model).vocab_size
    prompts = [rng.integers(0, vocab, 64).tolist() for _ in range(CLIENTS)]
    settings = dict(max_tokens=max_tokens, stop=[], seed=0)
    service = tinsmith.connect(num_cpus=os.cpu_count()).sync
    with served(tinsmith.default_home().as_posix()) as url:
        natives = [service.create_sampling_client(base_model=chosen.model) for _ in prompts]
        client = tinker.ServiceClient(base_url=url)
        remotes = [client.create_sampling_client(base_model=chosen.model).result() for _ in prompts]

        def native() -> None:
            async def all_at_once() -> None:
                params = SamplingParams(**settings)
                await asyncio.gather(
                    *(n.client.sample(p, 1, params) for n, p in zip(natives, prompts, strict=True))
                )

            asyncio.run(all_at_once())

        def through_gateway() -> None:
            params = types.SamplingParams(**settings)
            futures = [
                remote.sample(types.ModelInput.from_ints(prompt), 1, params)
                for remote, prompt in zip(remotes, prompts, strict=True)
            ]
            for future in futures:
                future.result()

        ours, theirs = alternate(through_gateway, native, chosen.runs)
        client.close("success").result()
    service.close()
    count = CLIENTS * max_tokens
    report("tokens/s", count / ours, count / theirs, theirs / ours, chosen.runs)


if __name__ == "__main__":
    main()
