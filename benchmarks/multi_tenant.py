"""Eight runs of 4 sequences of 128 tokens each, in shared passes, against one run with all 32.

Ours: the learner's engine given eight `forward_backward`s at once, of runs of ranks 8 to 64. The
other side: the same engine and tokens as one batch of one run of rank 32. Cross-entropy on all
tokens.
"""

from __future__ import annotations

import numpy as np
from dense_batches import datums, learn_together, lora
from harness import alternate, options, report
from peft_side import add_run

from tinsmith.engines.backbone import Backbone
from tinsmith.engines.learner import LearnerEngine

RUNS, SEQUENCES, TOKENS = 8, 4, 128
RANKS = (8, 16, 32, 64)


def main() -> None:
    chosen = options(__doc__)
    length = 16 if chosen.quick else TOKENS
    engine = LearnerEngine(Backbone(chosen.model))
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, engine.backbone.vocab_size, (RUNS, SEQUENCES, length + 1))
    many = {f"run-{i}": datums(tokens[i]) for i in range(RUNS)}
    for i, run_id in enumerate(many):
        add_run(engine, run_id, lora(RANKS[i % len(RANKS)]))
    add_run(engine, "one", lora(32))
    one = {"one": [datum for data in many.values() for datum in data]}
    ours_s, theirs_s = alternate(
        lambda: learn_together(engine, many), lambda: learn_together(engine, one), chosen.runs
    )
    count = RUNS * SEQUENCES * length
    report("tokens/s", count / ours_s, count / theirs_s, theirs_s / ours_s, chosen.runs)


if __name__ == "__main__":
    main()
