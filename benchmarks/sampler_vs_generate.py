"""Sampling 32 requests that share 4 prompts, 64 new tokens each, against Hugging Face generate.

The prompts are those of the demo's task, rendered for the model. Ours: the torch sampling engine,
32 requests of one sample, base weights reordered. Theirs: `generate` on all 32 at once, padded on the left. Both sample
at temperature 1 with no stop token, in fp32, in this process.
"""

from __future__ import annotations

import argparse

import torch
from harness import alternate, options, report
from transformers import AutoModelForCausalLM

from tinsmith import SamplingParams
from tinsmith.engines.backbone import Backbone
from tinsmith.engines.sampler import SamplerEngine
from tinsmith.envs import ChatRenderer, make
from tinsmith.primitives.client import load_tokenizer
from tinsmith.primitives.types import SampleRequest

PROMPTS, REQUESTS = 4, 32


def task_prompts(model: str) -> list[list[int]]:
    """Token ids of the first prompts of four problems."""
    renderer = ChatRenderer.from_model(model)
    messages = [make("calculator").reset(seed=seed)[0] for seed in range(PROMPTS)]
    return [renderer.tokens(renderer.text(m)) for m in messages]


def sample_all(engine: SamplerEngine, prompts: list[list[int]], new_tokens: int) -> None:
    """One sample after each prompt, all submitted at once."""
    params = SamplingParams(max_tokens=new_tokens, stop=[], temperature=1.0)
    for tokens in prompts:
        engine.submit(SampleRequest(tokens, params))
    drawn = 0
    while engine.busy:
        for event in engine.step():
            if event.response is not None:
                drawn += len(event.response.sequences[0].tokens)
    assert drawn == len(prompts) * new_tokens, drawn


def compare(chosen: argparse.Namespace, prompts: list[list[int]]) -> None:
    """Report new tokens per second after these prompts, ours and `generate`'s."""
    new_tokens = 4 if chosen.quick else 64
    theirs = AutoModelForCausalLM.from_pretrained(chosen.model, dtype=torch.float32).eval()
    length = max(map(len, prompts))
    batch, mask = (torch.zeros(len(prompts), length, dtype=torch.int64) for _ in range(2))
    for row, prompt in enumerate(prompts):
        batch[row, length - len(prompt) :] = torch.tensor(prompt)
        mask[row, length - len(prompt) :] = 1
    backbone, tokenizer = Backbone(chosen.model), load_tokenizer(chosen.model)

    def sample() -> None:
        # A new engine: nothing is left in its cache from the run before.
        engine = SamplerEngine(backbone, tokenizer, kv_bytes=1 << 30, reorder=True)
        sample_all(engine, prompts, new_tokens)

    def generate() -> None:
        out = theirs.generate(
            batch,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
        )
        assert out.shape == (len(prompts), length + new_tokens)

    ours_s, theirs_s = alternate(sample, generate, chosen.runs)
    tokens = len(prompts) * new_tokens
    report(
        "tokens/s",
        tokens / ours_s,
        tokens / theirs_s,
        theirs_s / ours_s,
        chosen.runs,
        prompt_tokens=length,
    )


def main() -> None:
    chosen = options(__doc__)
    compare(chosen, task_prompts(chosen.model) * (REQUESTS // PROMPTS))


if __name__ == "__main__":
    main()
