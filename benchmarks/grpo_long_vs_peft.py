"""forward_backward on a group of 16 completions of 64 tokens after a prompt of 512, against PEFT.

As `grpo_batch_vs_peft`, but PEFT computes 4 sequences at a time, whose activations fit into the
memory of a small machine.
"""

from __future__ import annotations

from grpo_batch_vs_peft import Shape, compare
from harness import options


def main() -> None:
    chosen = options(__doc__)
    compare(chosen, Shape(1, 16, 64 if chosen.quick else 512, 16 if chosen.quick else 64, 4))


if __name__ == "__main__":
    main()
