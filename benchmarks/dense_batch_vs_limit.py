"""`forward_backward` with a loss on all tokens of 16 sequences of 128, against matrix products.

The limit: products of large square matrices with as many floating-point operations as the batch
needs in the frozen base, forward and for the gradient of its inputs: 4 for each weight that a
token meets (0.54 GFLOP a token for SmolLM2-135M). What adapter (rank 32) and attention need comes
on our side only.
"""

from __future__ import annotations

import numpy as np
import torch
from dense_batch_vs_peft import SEQUENCES, TOKENS
from dense_batches import datums, learn_together, lora
from harness import alternate, options, report
from peft_side import add_run

from tinsmith.engines.backbone import Backbone
from tinsmith.engines.learner import LearnerEngine

SIDE = 1024


def main() -> None:
    chosen = options(__doc__)
    length = 16 if chosen.quick else TOKENS
    engine = LearnerEngine(Backbone(chosen.model))
    backbone = engine.backbone
    add_run(engine, "run", lora(32))
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, backbone.vocab_size, (SEQUENCES, length + 1))
    batch, count = {"run": datums(tokens)}, SEQUENCES * length
    weights = sum(inputs * outputs for inputs, outputs in backbone.targets.values())
    flop = 4.0 * weights * count
    a, b, out = (torch.randn(SIDE, SIDE) for _ in range(3))

    def products() -> None:
        for _ in range(max(1, round(flop / (2 * SIDE**3)))):
            torch.mm(a, b, out=out)

    ours_s, limit_s = alternate(lambda: learn_together(engine, batch), products, chosen.runs)
    report(
        "tokens/s",
        count / ours_s,
        count / limit_s,
        limit_s / ours_s,
        chosen.runs,
        matrix_gflop_s=round(flop / limit_s / 1e9, 1),
        gflop_per_token=round(flop / count / 1e9, 3),
    )


if __name__ == "__main__":
    main()
