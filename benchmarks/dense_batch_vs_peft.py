"""`forward_backward` with a loss on all tokens of 16 sequences of 128, against PEFT.

Ours: the learner's engine. Theirs: PEFT on the Hugging Face model, 8 sequences at a time. Rank 32,
cross-entropy; losses and gradients are compared.
"""

from __future__ import annotations

import numpy as np
from dense_batches import datums, learn_by_peft, learn_together, lora
from harness import alternate, options, report
from peft_side import add_run, gradient_difference, peft_model

from tinsmith.engines.backbone import Backbone
from tinsmith.engines.learner import LearnerEngine

SEQUENCES, TOKENS = 16, 128


def main() -> None:
    chosen = options(__doc__)
    length = 16 if chosen.quick else TOKENS
    engine = LearnerEngine(Backbone(chosen.model))
    add_run(engine, "run", lora(32))
    peft = peft_model(chosen.model, engine, ["run"])
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, engine.backbone.vocab_size, (SEQUENCES, length + 1))
    batch = {"run": datums(tokens)}
    losses: dict[str, float] = {}

    def ours() -> None:
        losses["ours"] = learn_together(engine, batch)

    def theirs() -> None:
        losses["theirs"] = learn_by_peft(peft, "run", tokens)

    ours_s, theirs_s = alternate(ours, theirs, chosen.runs)
    assert abs(losses["ours"] / losses["theirs"] - 1) < 1e-3, losses
    difference = gradient_difference(engine, "run", peft)
    assert difference < 1e-3, difference
    count = SEQUENCES * length
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
