"""Sampling one request alone, 64 new tokens, against Hugging Face generate with batch 1.

The prompt is the first of the demo's task. Ours: the torch sampling engine, a new one each run, base weights reordered.
Both sample at temperature 1 with no stop token, in fp32, in this process.
"""

from __future__ import annotations

from harness import options
from sampler_vs_generate import compare, task_prompts


def main() -> None:
    chosen = options(__doc__)
    compare(chosen, task_prompts(chosen.model)[:1])


if __name__ == "__main__":
    main()
