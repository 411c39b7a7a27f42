"""Reward models on real actors: trainer and sampler give one number, and it ranks what was preferred."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
import torch

import tinsmith
from tests.tiny import tiny_tokenizer
from tinsmith.algorithms.chat_data import AnswerRenderer
from tinsmith.algorithms.fit_config import RewardConfig
from tinsmith.algorithms.reward_model import (
    PairwiseJudge,
    RewardModel,
    Verdict,
    datum_reward,
    load_reward_model,
    train_reward_model,
)

PAIRS = [
    {"prompt": f"What is {n}?", "chosen": f"{n}!", "rejected": f"the dog {n}"} for n in range(20)
]
CONFIG = RewardConfig(
    model="tiny-llama",
    rank=8,
    learning_rate=5e-3,
    epochs=3,
    batch_size=6,
    validation=0.25,
    good="y",
    bad="n",
)


@pytest.mark.parametrize("question", ["", "answer?"])
async def test_a_reward_model_ranks_and_its_sampler_gives_the_learners_number(service, question):
    result = await train_reward_model(service, replace(CONFIG, question=question), PAIRS)
    assert result.after["accuracy"] == 1
    assert result.after["loss"] < result.before["loss"]
    model = await load_reward_model(service, result.run_dir)
    better, worse = await asyncio.gather(
        model.reward("What is 25?", "25!"), model.reward("What is 25?", "the dog 25")
    )
    assert better > worse
    training = await service.resume_training_client(result.run_id)
    prompt = [{"role": "user", "content": "What is 25?"}]
    datum = model.verdict.datum(prompt, {"role": "assistant", "content": "25!"})
    output = await training.forward([datum], logprobs="loss")
    learners = datum_reward(torch.tensor(output.loss_fn_outputs[0]["logprobs"]))
    assert better == pytest.approx(float(learners), abs=1e-4)


async def test_a_reward_is_read_where_a_sampled_answer_ends(service):
    """The tokens before it are those that a policy was given and sampled."""
    policy = await service.create_sampling_client(base_model="tiny-llama")
    renderer = AnswerRenderer(policy.get_tokenizer())
    verdict = Verdict.of(renderer, "y", "n")
    prompt = [{"role": "user", "content": "What is 25?"}]
    tokens = verdict.tokens(prompt, {"role": "assistant", "content": "25!"})
    assert tokens[-1] == renderer.tokenizer.eos_token_id
    logprobs = []
    for token in (verdict.good, verdict.bad):
        scored = await policy.compute_logprobs([*tokens, token])
        logprobs.append(scored[-1])
    reward = await RewardModel(policy, verdict).reward("What is 25?", "25!")
    assert reward == pytest.approx(logprobs[0] - logprobs[1], abs=1e-5)


def test_tokens_that_cannot_be_told_apart_are_refused():
    renderer = AnswerRenderer(tiny_tokenizer())
    for good, bad in (("no", "no"), ("", "n")):
        with pytest.raises(tinsmith.InvalidInput, match="must begin with different tokens"):
            Verdict.of(renderer, good, bad)


async def test_a_judge_does_not_care_which_answer_comes_first(service):
    policy = await service.create_sampling_client(base_model="tiny-llama")
    judge = PairwiseJudge(
        policy, AnswerRenderer(policy.get_tokenizer()), "{question} A {first} B {second}"
    )
    one, other = await asyncio.gather(
        judge.preference("2+2", "four", "a fox"), judge.preference("2+2", "a fox", "four")
    )
    assert one == pytest.approx(1 - other, abs=1e-6)
    assert one != pytest.approx(0.5, abs=1e-4)
