"""Eight runs of 4 sequences of 128 tokens each, in shared passes, against PEFT one after another.

Ours: the learner's engine given eight `forward_backward`s at once, of runs of ranks 8 to 64.
Theirs: PEFT on the Hugging Face model with the same eight adapters loaded, switched with
`set_adapter`. Cross-entropy on all tokens; losses and gradients are compared.
"""

from __future__ import annotations

import numpy as np
from dense_batches import datums, learn_by_peft, learn_together, lora
from harness import alternate, options, report
from multi_tenant import RANKS, RUNS, SEQUENCES, TOKENS
from peft_side import add_run, gradient_difference, peft_model

from tinsmith.engines.backbone import Backbone
from tinsmith.engines.learner import LearnerEngine


def main() -> None:
    chosen = options(__doc__)
    length = 16 if chosen.quick else TOKENS
    engine = LearnerEngine(Backbone(chosen.model))
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, engine.backbone.vocab_size, (RUNS, SEQUENCES, length + 1))
    batches = {f"run{i}": datums(tokens[i]) for i in range(RUNS)}
    for i, run_id in enumerate(batches):
        add_run(engine, run_id, lora(RANKS[i % len(RANKS)]))
    peft = peft_model(chosen.model, engine, list(batches))
    losses: dict[str, float] = {}

    def ours() -> None:
        losses["ours"] = learn_together(engine, batches)

    def theirs() -> None:
        losses["theirs"] = sum(
            learn_by_peft(peft, run_id, tokens[i]) for i, run_id in enumerate(batches)
        )

    ours_s, theirs_s = alternate(ours, theirs, chosen.runs)
    assert abs(losses["ours"] / losses["theirs"] - 1) < 1e-3, losses
    last = list(batches)[-1]
    difference = gradient_difference(engine, last, peft)
    assert difference < 1e-3, difference
    count = RUNS * SEQUENCES * length
    report(
        "tokens/s",
        count / ours_s,
        count / theirs_s,
        theirs_s / ours_s,
        chosen.runs,
        gradient_difference=float(f"{difference:.1e}"),
    )


if __name__ == "__main__":
    main()
