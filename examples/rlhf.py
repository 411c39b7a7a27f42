"""RLHF in a page: supervised fine-tuning, a reward model, and a policy gradient against it, held to
the fine-tuned policy (Ouyang et al., "Training language models to follow instructions with human
feedback", 2022).

    python examples/rlhf.py --model HuggingFaceTB/SmolLM2-135M-Instruct

The task is a small one that shows every step: people here prefer short answers. Bring your own
demonstrations, preferences and prompts; the last loop, the reward and the KL in it are yours.
"""

from __future__ import annotations

import argparse
import asyncio

import numpy as np

import tinsmith
from tinsmith.algorithms.chat_data import AnswerRenderer
from tinsmith.algorithms.distillation import sample_segment, teacher_logprobs
from tinsmith.algorithms.fit_config import RewardConfig, SupervisedConfig
from tinsmith.algorithms.reward_model import RewardModel, load_reward_model, train_reward_model
from tinsmith.algorithms.supervised import train_supervised

ANIMALS = [
    "cat",
    "dog",
    "fox",
    "cow",
    "hen",
    "pig",
    "owl",
    "bee",
    "ant",
    "rat",
    "bat",
    "eel",
    "elk",
    "emu",
]
PROMPTS = [f"Name an animal that is no {animal}." for animal in ANIMALS]
SHORT = [f"{animal}!" for animal in [*ANIMALS[1:], ANIMALS[0]]]
LONG = [f"An animal, you ask? Well, there is the {answer}" for answer in SHORT]
DEMONSTRATIONS = [
    {"prompt": prompt, "completion": answer}
    for prompt, short, long in zip(PROMPTS, SHORT, LONG, strict=True)
    for answer in (short, long)
]
PREFERENCES = [
    {"prompt": prompt, "chosen": short, "rejected": long}
    for prompt, short, long in zip(PROMPTS, SHORT, LONG, strict=True)
]


def datum(segment: tinsmith.Segment, advantages: np.ndarray) -> tinsmith.Datum:
    """Position t predicts token t + 1."""
    return tinsmith.Datum(
        segment.tokens[:-1],
        {
            "target_tokens": segment.tokens[1:],
            "logprobs": segment.logprobs[1:],
            "advantages": np.where(segment.mask, advantages, 0)[1:],
        },
    )


async def improve(
    service: tinsmith.ServiceClient,
    start: str,
    judge: RewardModel,
    args: argparse.Namespace,
) -> list[tuple[float, float]]:
    """The policy gradient of reward minus KL. Returns (reward, KL per token) of every step."""
    training = await service.create_training_client_from_state(start)
    reference = await training.save_weights_and_get_sampling_client()  # the fine-tuned policy
    policy = training.live_sampling_client()  # follows every optim_step
    tokenizer = training.get_tokenizer()
    renderer = AnswerRenderer.from_model(tokenizer.name_or_path)
    prompts = [renderer.prompt([{"role": "user", "content": text}]) for text in PROMPTS]
    told = []
    for step in range(args.steps):
        params = tinsmith.SamplingParams(max_tokens=args.max_tokens, seed=step)
        groups = await asyncio.gather(*(policy.sample(p, args.group_size, params) for p in prompts))
        data, seen, gaps = [], [], []
        for text, prompt, group in zip(PROMPTS, prompts, groups, strict=True):
            segments = [sample_segment(prompt, sample) for sample in group.sequences]
            answers = [
                tokenizer.decode(s.tokens, skip_special_tokens=True) for s in group.sequences
            ]
            rewards = np.array(await asyncio.gather(*(judge.reward(text, a) for a in answers)))
            # An answer that never ends is no answer.
            rewards -= [5.0 * (sample.stop_reason == "length") for sample in group.sequences]
            references = await asyncio.gather(*(teacher_logprobs(reference, s) for s in segments))
            advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
            for segment, advantage, before in zip(segments, advantages, references, strict=True):
                gap = segment.logprobs - before  # its mean estimates the KL from the reference
                gaps.append(gap[segment.mask])
                data.append(datum(segment, (advantage - args.kl * gap) / len(prompts)))
            seen += rewards.tolist()
        training.forward_backward(data, "importance_sampling")  # queued, not awaited
        await training.optim_step(
            tinsmith.AdamParams(args.policy_learning_rate, grad_clip_norm=1.0)
        )
        told.append((float(np.mean(seen)), float(np.concatenate(gaps).mean())))
        print(f"step {step}  reward {told[-1][0]:+.2f}  kl {told[-1][1]:.3f}  {answers[0]!r}")
    print((await training.save_state("rlhf")).path)
    return told


async def main(args: argparse.Namespace) -> list[tuple[float, float]]:
    async with tinsmith.connect(home=args.home) as service:
        base = dict(model=args.model, rank=8, learning_rate=args.learning_rate, batch_size=7)
        tuned = await train_supervised(
            service, SupervisedConfig(**base, epochs=args.epochs), DEMONSTRATIONS
        )
        print(f"fine-tuned: {tuned.checkpoint}")
        judged = await train_reward_model(
            service, RewardConfig(**base, epochs=args.epochs, validation=0.2), PREFERENCES
        )
        print(f"reward model: right on {judged.after['accuracy']:.0%} of held-out preferences")
        judge = await load_reward_model(service, judged.run_dir)
        told = await improve(service, tuned.checkpoint, judge, args)
        print(f"reward {told[0][0]:+.2f} before, {told[-1][0]:+.2f} after")
    return told


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--home", default=None, help="where runs and models are kept")
    parser.add_argument("--epochs", type=int, default=3, help="of fine-tuning and reward model")
    parser.add_argument("--steps", type=int, default=10, help="of the policy gradient")
    parser.add_argument("--group-size", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=24)
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="of the same")
    parser.add_argument("--policy-learning-rate", type=float, default=2e-4)
    parser.add_argument("--kl", type=float, default=0.05, help="weight of the KL per token")
    return parser


if __name__ == "__main__":
    asyncio.run(main(arguments().parse_args()))
