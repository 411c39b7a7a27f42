"""Sampling 32 requests, 64 new tokens each, against what the processor's matrix rate allows.

The requests are those of `sampler_vs_generate`, base weights reordered. The limit is the rate of large
matrix products in fp32, measured before each run with the same threads, over the products that a token
needs: two FLOP for each weight of a linear layer (0.27 GFLOP in the demo model). Prompt tokens that had
to be computed count too, each for its share of those products, which leaves out the unembedding.
Attention, norms, drawing and the engine's own books count for nothing.

`products_alone` is that ratio of a step's products by themselves: what 32 rows could reach if all else took no
time. `products_ms` is what the products of so many rows take, `reading_ms` a sum over every weight.
"""

from __future__ import annotations

import statistics

import torch
from harness import matrix_rate, options, report, say, seconds
from sampler_vs_generate import PROMPTS, REQUESTS, sample_all, task_prompts

from tinsmith.engines.backbone import Backbone
from tinsmith.engines.lora import UNEMBED, LoraLinear
from tinsmith.engines.sampler import SamplerEngine
from tinsmith.primitives.client import load_tokenizer

ROWS = (1, 2, 4, 8, 16, REQUESTS)


@torch.inference_mode()
def products(layers: list[LoraLinear], rows: int) -> float:
    """Seconds for the products of so many rows with the weights of all layers."""
    inputs = {layer.in_features: torch.randn(rows, layer.in_features) for layer in layers}

    def step() -> None:
        for layer in layers:
            layer(inputs[layer.in_features])

    return statistics.median([seconds(step) for _ in range(4)][1:])


@torch.inference_mode()
def reading(layers: list[LoraLinear]) -> float:
    """Seconds for reading all weights once."""
    return statistics.median(
        seconds(lambda: [layer.dense().sum() for layer in layers]) for _ in range(3)
    )


def main() -> None:
    chosen = options(__doc__)
    new_tokens = 4 if chosen.quick else 64
    prompts = task_prompts(chosen.model) * (REQUESTS // PROMPTS)
    backbone, tokenizer = Backbone(chosen.model), load_tokenizer(chosen.model)
    flop = {name: 2 * inputs * outputs for name, (inputs, outputs) in backbone.targets.items()}
    per_token = sum(flop.values())
    layers = [m for m in backbone.model.modules() if isinstance(m, LoraLinear)]
    rates, speeds, alone, reads = [], [], [], []
    for run in range(chosen.runs + 1):
        rate = matrix_rate(backbone.device, torch.float32)
        engine = SamplerEngine(backbone, tokenizer, kv_bytes=1 << 30, reorder=True)
        taken = seconds(lambda engine=engine: sample_all(engine, prompts, new_tokens))
        stats = engine.stats
        work = per_token * stats.sampled_tokens
        work += (per_token - flop[UNEMBED]) * stats.prompt_tokens
        say(f"run {run}: {work / taken / 1e9:.1f} of {rate / 1e9:.1f} GFLOP/s")
        if run > 0:
            rates.append(rate / per_token)
            speeds.append(work / per_token / taken)
            alone.append({rows: products(layers, rows) for rows in ROWS})
            reads.append(reading(layers))
    ratio = statistics.median(ours / limit for ours, limit in zip(speeds, rates, strict=True))
    steps = {rows: statistics.median(run[rows] for run in alone) for rows in ROWS}
    report(
        "tokens/s",
        statistics.median(speeds),
        statistics.median(rates),
        ratio,
        chosen.runs,
        gflop_per_token=per_token / 1e9,
        sampled_tokens=stats.sampled_tokens,
        prompt_tokens=stats.prompt_tokens,
        products_alone=statistics.median(
            REQUESTS / run[REQUESTS] / limit for run, limit in zip(alone, rates, strict=True)
        ),
        products_ms={str(rows): round(1e3 * step, 1) for rows, step in steps.items()},
        reading_ms=round(1e3 * statistics.median(reads), 1),
    )


if __name__ == "__main__":
    main()
