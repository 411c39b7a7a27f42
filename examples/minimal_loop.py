"""The four primitives in a page: a policy-gradient loop written by hand.

A small model learns to answer in few words. Everything here is yours to change: the prompts, the
reward, the advantage, the loss, when to sample and when to step.
"""

from __future__ import annotations

import asyncio

import numpy as np

import tinsmith

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
QUESTIONS = ["Name an animal.", "Name a colour.", "Name a city.", "Name a fruit."]
GROUP_SIZE = 8


def reward(answer: str) -> float:
    return 1.0 if len(answer.split()) == 1 else -min(len(answer.split()), 20) / 20


def datum(prompt: list[int], sample: tinsmith.SampledSequence, advantage: float) -> tinsmith.Datum:
    """Position t predicts token t + 1: the completion's tokens weigh, the prompt's do not."""
    tokens = np.concatenate([prompt, sample.tokens])
    before = np.zeros(len(prompt) - 1)
    return tinsmith.Datum(
        tokens[:-1],
        {
            "target_tokens": tokens[1:],
            "logprobs": np.concatenate([before, sample.logprobs]),
            "advantages": np.concatenate([before, np.full(len(sample.tokens), advantage)]),
        },
    )


async def main() -> None:
    async with tinsmith.connect() as service:
        training = await service.create_lora_training_client(MODEL, rank=8, seed=0)
        policy = training.live_sampling_client()  # follows every optim_step
        tokenizer = training.get_tokenizer()
        prompts = [
            tokenizer.encode(
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": question}],
                    add_generation_prompt=True,
                    tokenize=False,
                ),
                add_special_tokens=False,
            )
            for question in QUESTIONS
        ]
        for step in range(8):
            params = tinsmith.SamplingParams(max_tokens=24, seed=step)
            groups = await asyncio.gather(*(policy.sample(p, GROUP_SIZE, params) for p in prompts))
            data, seen = [], []
            for prompt, group in zip(prompts, groups, strict=True):
                answers = [
                    tokenizer.decode(s.tokens, skip_special_tokens=True) for s in group.sequences
                ]
                rewards = np.array([reward(answer) for answer in answers])
                for sample, advantage in zip(
                    group.sequences, rewards - rewards.mean(), strict=True
                ):
                    data.append(datum(prompt, sample, advantage))
                seen += rewards.tolist()
            training.forward_backward(data, "importance_sampling")  # queued, not awaited
            await training.optim_step(tinsmith.AdamParams(learning_rate=3e-4))
            print(f"step {step}  reward {np.mean(seen):+.2f}  {answers[0]!r}", flush=True)
        saved = await training.save_state("final")
        print(saved.path)


if __name__ == "__main__":
    asyncio.run(main())
