"""Sampling 32 requests that share 4 prompts, 64 new tokens each, against Hugging Face generate.

Ours: the torch sampling engine, 32 requests of one sample. Theirs: `generate` on all 32 at once.
Both sample at temperature 1 with no stop token, in fp32, in this process.
"""

from __future__ import annotations

import numpy as np
import torch
from harness import alternate, options, report
from transformers import AutoModelForCausalLM

from tinsmith import SamplingParams
from tinsmith.engines.backbone import Backbone
from tinsmith.engines.sampler import SamplerEngine
from tinsmith.primitives.client import load_tokenizer
from tinsmith.primitives.types import SampleRequest

PROMPTS, REQUESTS, PROMPT_TOKENS = 4, 32, 128


def main() -> None:
    chosen = options(__doc__)
    new_tokens = 4 if chosen.quick else 64
    theirs = AutoModelForCausalLM.from_pretrained(chosen.model, dtype=torch.float32).eval()
    vocabulary = theirs.config.vocab_size
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, vocabulary, (PROMPTS, PROMPT_TOKENS))
    batch = torch.from_numpy(np.repeat(prompts, REQUESTS // PROMPTS, axis=0))
    backbone, tokenizer = Backbone(chosen.model), load_tokenizer(chosen.model)

    def sample() -> None:
        # A new engine: nothing is left in its cache from the run before.
        engine = SamplerEngine(backbone, tokenizer, kv_bytes=1 << 30)
        params = SamplingParams(max_tokens=new_tokens, stop=[], temperature=1.0)
        for tokens in batch.numpy():
            engine.submit(SampleRequest(tokens, params))
        drawn = 0
        while engine.busy:
            for event in engine.step():
                if event.response is not None:
                    drawn += len(event.response.sequences[0].tokens)
        assert drawn == REQUESTS * new_tokens, drawn

    def generate() -> None:
        out = theirs.generate(
            batch,
            attention_mask=torch.ones_like(batch),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
        )
        assert out.shape == (REQUESTS, PROMPT_TOKENS + new_tokens)

    ours_s, theirs_s = alternate(sample, generate, chosen.runs)
    tokens = REQUESTS * new_tokens
    report("tokens/s", tokens / ours_s, tokens / theirs_s, theirs_s / ours_s, chosen.runs)


if __name__ == "__main__":
    main()
