"""What the gateway adds to a `forward_backward` of the native API, on a tiny model, against 10 ms.

One datum of 32 tokens through the SDK, HTTP and a gateway process, and natively, alternating, on
one run each of the same learner; the figure is the difference of medians in milliseconds.
`theirs` is the limit.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
import time

import numpy as np
import tinker
from harness import options, report, say
from serving import served
from tinker import types
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import tinsmith
from tinsmith import Datum

LIMIT_MS = 10.0
RANK = 8


def tiny_like(model: str, folder: str) -> str:
    """A random two-layer model of that family, with its tokenizer."""
    config = AutoConfig.from_pretrained(model)
    config.update(
        dict(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
        )
    )
    config.layer_types = None
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


async def main() -> None:
    chosen = options(__doc__)
    rounds = 5 if chosen.quick else 40 * chosen.runs
    with tempfile.TemporaryDirectory() as home:
        model = tiny_like(chosen.model, f"{home}/models/tiny")
        vocab = AutoConfig.from_pretrained(model).vocab_size
        tokens = np.random.default_rng(0).integers(0, vocab, 33)
        data = [Datum(tokens[:-1], {"target_tokens": tokens[1:], "weights": np.ones(32)})]
        sent = [
            types.Datum(
                model_input=types.ModelInput.from_ints(tokens[:-1].tolist()),
                loss_fn_inputs={"target_tokens": tokens[1:], "weights": np.ones(32, np.float32)},
            )
        ]
        async with tinsmith.connect(num_cpus=os.cpu_count(), home=home) as service:
            native = await service.create_lora_training_client(model, rank=RANK, seed=0)
            with served(home) as url:
                client = tinker.ServiceClient(base_url=url)
                training = await client.create_lora_training_client(
                    base_model="tiny", rank=RANK, seed=0
                )
                near: list[float] = []
                far: list[float] = []
                for turn in range(rounds + 5):
                    started = time.perf_counter()
                    await native.forward_backward(data, "cross_entropy")
                    between = time.perf_counter()
                    await training.forward_backward(sent, "cross_entropy").result_async()
                    if turn >= 5:  # after a warm-up
                        near.append(between - started)
                        far.append(time.perf_counter() - between)
                await client.close("success").result_async()
    medians = [1e3 * statistics.median(times) for times in (near, far)]
    say(f"native {medians[0]:.2f} ms, through the gateway {medians[1]:.2f} ms")
    added = medians[1] - medians[0]
    report(
        "ms",
        added,
        LIMIT_MS,
        LIMIT_MS / max(added, 0.1),
        rounds,
        native_ms=round(medians[0], 2),
        gateway_ms=round(medians[1], 2),
    )


if __name__ == "__main__":
    asyncio.run(main())
