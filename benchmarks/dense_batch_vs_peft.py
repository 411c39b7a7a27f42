"""`forward_backward` with a loss on all tokens of 16 sequences of 128, against PEFT.

Ours: the learner's engine. Theirs: PEFT on the Hugging Face model, 8 sequences at a time. Rank 32,
cross-entropy; losses and gradients are compared.
"""

from __future__ import annotations

from dense_batches import Tenants, compare_with_peft
from harness import options

SEQUENCES, TOKENS, RANK = 16, 128, 32


def main() -> None:
    chosen = options(__doc__)
    length = 16 if chosen.quick else TOKENS
    compare_with_peft(chosen, Tenants(chosen.model, [RANK], SEQUENCES, length))


if __name__ == "__main__":
    main()
