"""Eight runs of 4 sequences of 128 tokens each, in shared passes, against one run with all 32.

Ours: the learner's engine given eight `forward_backward`s at once, of runs of ranks 8 to 64. The
other side: the same engine and tokens as one batch of one run of rank 32. Cross-entropy on all
tokens.
"""

from __future__ import annotations

from dense_batches import Tenants, learn_together, lora
from harness import alternate, options, report
from peft_side import add_run

RANKS, SEQUENCES, TOKENS = (8, 16, 32, 64) * 2, 4, 128


def main() -> None:
    chosen = options(__doc__)
    tenants = Tenants(chosen.model, RANKS, SEQUENCES, 16 if chosen.quick else TOKENS)
    engine = tenants.engine
    add_run(engine, "one", lora(32))
    one = {"one": [datum for data in tenants.batches.values() for datum in data]}
    ours_s, theirs_s = alternate(tenants.learn, lambda: learn_together(engine, one), chosen.runs)
    count = tenants.tokens
    report("tokens/s", count / ours_s, count / theirs_s, theirs_s / ours_s, chosen.runs)


if __name__ == "__main__":
    main()
