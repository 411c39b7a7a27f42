"""Eight runs of 4 sequences of 128 tokens each, in shared passes, against PEFT one after another.

Ours: the learner's engine given eight `forward_backward`s at once, of runs of ranks 8 to 64.
Theirs: PEFT on the Hugging Face model with the same eight adapters loaded, switched with
`set_adapter`. Cross-entropy on all tokens; losses and gradients are compared.
"""

from __future__ import annotations

from dense_batches import Tenants, compare_with_peft
from harness import options
from multi_tenant import RANKS, SEQUENCES, TOKENS


def main() -> None:
    chosen = options(__doc__)
    length = 16 if chosen.quick else TOKENS
    compare_with_peft(chosen, Tenants(chosen.model, RANKS, SEQUENCES, length))


if __name__ == "__main__":
    main()
