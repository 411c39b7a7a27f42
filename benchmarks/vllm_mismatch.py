"""How far logprobs of tokens that vLLM sampled are from the learner's, against 1e-4 in float32.

A rank-32 adapter on every target is trained for a few steps, handed to vLLM, and sampled from at
temperature 1; the learner then scores the same tokens under the same adapter. `ours` is the largest
difference of any token, learner and vLLM both in float32. Reported beside it: the mean and the 99th
percentile, and all three for vLLM in bfloat16 with the learner in float32 (`bf16_*`) and in
bfloat16 too (`bf16_both_*`). `nats_a_token` says how uncertain the policy is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
import torch
from harness import options, report, require_vllm, say

from tinsmith import AdamParams, Datum, SamplingParams, VllmOptions
from tinsmith.engines.backbone import Backbone
from tinsmith.engines.base_weights import BaseWeights
from tinsmith.engines.learner import LearnerEngine
from tinsmith.envs import ChatRenderer, make
from tinsmith.primitives.client import load_tokenizer
from tinsmith.primitives.types import LoraConfig, PolicyRef, SampleRequest

LIMIT = 1e-4
CONFIG = LoraConfig(rank=32, seed=0)
STEPS, LEARNING_RATE = 4, 3e-3


def task_prompts(model: str, count: int) -> list[list[int]]:
    renderer = ChatRenderer.from_model(model)
    messages = [make("calculator").reset(seed=seed)[0] for seed in range(count)]
    return [renderer.tokens(renderer.text(m)) for m in messages]


def trained(model: str, prompts: Sequence[list[int]]) -> np.ndarray:
    """Flat parameters of an adapter that learned to write some of the prompts."""
    learner = LearnerEngine(Backbone(model))
    learner.create_run("run", CONFIG)
    data = [_datum(np.array(tokens)) for tokens in prompts[:4]]
    for step in range(STEPS):
        output = learner.forward_backward("run", data, "cross_entropy")
        learner.optim_step("run", AdamParams(learning_rate=LEARNING_RATE))
        nll = [-o["logprobs"].mean() for o in output.loss_fn_outputs]
        say(f"step {step}: {np.mean(nll):.3f} nats a token")
    return learner.export("run").numpy().copy()


def _datum(tokens: np.ndarray) -> Datum:
    weights = np.ones(len(tokens) - 1)
    return Datum(tokens[:-1], {"target_tokens": tokens[1:], "weights": weights})


async def drawn(
    model: str, dtype: str, flat: np.ndarray, prompts: list[list[int]], max_tokens: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Tokens (with the prompt) and logprobs of vLLM's samples, one for each prompt."""
    from tinsmith.actors.vllm_engine import VllmEngine

    setting = VllmOptions(max_rank=CONFIG.rank, max_adapters=2, dtype=dtype)
    engine = VllmEngine(model, load_tokenizer(model), kv_bytes=1 << 29, options=setting)
    try:
        await engine.add_adapter("run", 1, CONFIG, flat)
        params = SamplingParams(max_tokens=max_tokens, stop=[], seed=0)
        requests = [SampleRequest(prompt, params, PolicyRef("run")) for prompt in prompts]
        responses = await asyncio.gather(*map(engine.sample, requests))
    finally:
        engine.close()
    sequences = [response.sequences[0] for response in responses]
    return [
        (np.concatenate([prompt, drawn.tokens]), drawn.logprobs)
        for prompt, drawn in zip(prompts, sequences, strict=True)
    ]


def differences(
    model: str, weights: BaseWeights, flat: np.ndarray, samples: list[tuple[np.ndarray, np.ndarray]]
) -> np.ndarray:
    """|learner's logprob - vLLM's| of every sampled token."""
    learner = LearnerEngine(Backbone(model, weights))
    learner.create_run("run", CONFIG)
    learner.runs["run"].params.copy_(torch.from_numpy(flat))
    output = learner.forward("run", [_datum(tokens) for tokens, _ in samples], "cross_entropy")
    return np.concatenate(
        [
            np.abs(scored["logprobs"][-len(logprobs) :] - logprobs)
            for scored, (_, logprobs) in zip(output.loss_fn_outputs, samples, strict=True)
        ]
    )


async def main() -> None:
    chosen = options(__doc__)
    require_vllm()
    count, max_tokens = (4, 8) if chosen.quick else (32, 16 * chosen.runs)
    prompts = task_prompts(chosen.model, count)
    flat = trained(chosen.model, prompts)
    single = await drawn(chosen.model, "float32", flat, prompts, max_tokens)
    half = await drawn(chosen.model, "bfloat16", flat, prompts, max_tokens)
    off = differences(chosen.model, "fp32", flat, single)
    surprise = -np.mean(np.concatenate([logprobs for _, logprobs in single]))
    details = {"nats_a_token": round(float(surprise), 3)}
    for name, values in (
        ("fp32", off),
        ("bf16", differences(chosen.model, "fp32", flat, half)),
        ("bf16_both", differences(chosen.model, "bf16", flat, half)),
    ):
        for what, value in (
            ("mean", values.mean()),
            ("p99", np.quantile(values, 0.99)),
            ("max", values.max()),
        ):
            details[f"{name}_{what}"] = float(f"{value:.3g}")
    worst = max(float(off.max()), float(np.finfo(np.float32).tiny))
    report("nats", worst, LIMIT, LIMIT / worst, 1, tokens=len(off), **details)


if __name__ == "__main__":
    asyncio.run(main())
