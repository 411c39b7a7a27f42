"""`forward_backward` with a loss on all tokens of 16 sequences of 128, against matrix products.

The limit: products of large square matrices with as many floating-point operations as the batch
needs in the frozen base, forward and for the gradient of its inputs: 4 for each weight that a
token meets (0.54 GFLOP a token for SmolLM2-135M). What adapter (rank 32) and attention need comes
on our side only.
"""

from __future__ import annotations

import torch
from dense_batch_vs_peft import RANK, SEQUENCES, TOKENS
from dense_batches import Tenants
from harness import alternate, options, report

SIDE = 1024


def main() -> None:
    chosen = options(__doc__)
    tenants = Tenants(chosen.model, [RANK], SEQUENCES, 16 if chosen.quick else TOKENS)
    targets = tenants.engine.backbone.targets.values()
    flop_per_token = 4.0 * sum(inputs * outputs for inputs, outputs in targets)
    flop, count = flop_per_token * tenants.tokens, tenants.tokens
    a, b, out = (torch.randn(SIDE, SIDE) for _ in range(3))

    def products() -> None:
        for _ in range(max(1, round(flop / (2 * SIDE**3)))):
            torch.mm(a, b, out=out)

    ours_s, limit_s = alternate(tenants.learn, products, chosen.runs)
    report(
        "tokens/s",
        count / ours_s,
        count / limit_s,
        limit_s / ours_s,
        chosen.runs,
        matrix_gflop_s=round(flop / limit_s / 1e9, 1),
        gflop_per_token=round(flop_per_token / 1e9, 3),
    )


if __name__ == "__main__":
    main()
