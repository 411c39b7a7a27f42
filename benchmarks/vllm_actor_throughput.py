"""128 requests at once through a sampling client and the Sampler actor, against vLLM's own `LLM`.

Each is a prompt of the demo's task with 32 new tokens at temperature 1, under the base model. Both
engines are vLLM's, of the same settings: float32, eager, adapters enabled, the same cache, 128
sequences in a batch, blocks of 32 tokens, the logprob of each sampled token. Theirs runs with our
worker extension too, whose LoRA for CPUs is faster than vLLM's own: what is measured is the way there.
Each has processes of its own beside the other's, which stop polling after a second without work; so
each round begins with a rest. A round's problems are new to both; what all prompts begin with is in
the prefix cache of both.
"""

from __future__ import annotations

import asyncio
import os

from harness import alternate, options, report, require_vllm, with_environment

import tinsmith
from tinsmith import SamplingParams, VllmOptions
from tinsmith.engines.vllm_start import WORKER
from tinsmith.envs import ChatRenderer, make

MAX_ADAPTERS, MAX_RANK = 4, 32
BATCH = dict(max_num_seqs=128, max_num_batched_tokens=2048, block_size=32)
# What our engine sets in its own process; both are to be started alike.
ENVIRONMENT = {
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "TORCHDYNAMO_DISABLE": "1",
}


def main() -> None:
    chosen = options(__doc__)
    require_vllm()
    with_environment(**ENVIRONMENT)
    from vllm import LLM
    from vllm.sampling_params import SamplingParams as VllmParams

    requests, max_tokens = (8, 4) if chosen.quick else (128, 32)
    kv_bytes = 1 << 26 if chosen.quick else 2 << 30
    renderer = ChatRenderer.from_model(chosen.model)

    def prompts(turn: int) -> list[list[int]]:
        seeds = range(turn * requests, (turn + 1) * requests)
        messages = [make("calculator").reset(seed=seed)[0] for seed in seeds]
        return [renderer.tokens(renderer.text(m)) for m in messages]

    rounds = [prompts(turn) for turn in range(chosen.runs + 1)]
    engine = VllmOptions(
        max_adapters=MAX_ADAPTERS, max_rank=MAX_RANK, dtype="float32", eager=True, more=BATCH
    )
    service = tinsmith.connect(
        num_cpus=os.cpu_count(), engine="vllm", vllm=engine, kv_bytes=kv_bytes
    ).sync
    client = service.create_sampling_client(base_model=chosen.model).client
    raw = LLM(
        chosen.model,
        dtype="float32",
        enforce_eager=True,
        enable_prefix_caching=True,
        enable_lora=True,
        max_loras=MAX_ADAPTERS,
        max_lora_rank=MAX_RANK,
        kv_cache_memory_bytes=kv_bytes,
        worker_extension_cls=WORKER,
        **BATCH,
    )
    raw.collective_rpc("prepare_adapters")
    ours_left, theirs_left = iter(rounds), iter(rounds)

    def through_the_actor() -> None:
        params = SamplingParams(max_tokens=max_tokens, stop=[], temperature=1.0)

        async def all_at_once() -> None:
            drawn = await asyncio.gather(*(client.sample(p, 1, params) for p in next(ours_left)))
            assert all(len(d.sequences[0].tokens) == max_tokens for d in drawn)

        asyncio.run(all_at_once())

    def generate() -> None:
        params = VllmParams(
            max_tokens=max_tokens, temperature=1.0, ignore_eos=True, detokenize=False, logprobs=0
        )
        batch = [{"prompt_token_ids": p} for p in next(theirs_left)]
        drawn = raw.generate(batch, params, use_tqdm=False)
        assert all(len(d.outputs[0].token_ids) == max_tokens for d in drawn)

    ours_s, theirs_s = alternate(through_the_actor, generate, chosen.runs, rest=2)
    raw.llm_engine.engine_core.shutdown()
    service.close()
    tokens = requests * max_tokens
    report(
        "tokens/s",
        tokens / ours_s,
        tokens / theirs_s,
        theirs_s / ours_s,
        chosen.runs,
        prompt_tokens=max(map(len, rounds[0])),
    )


if __name__ == "__main__":
    main()
