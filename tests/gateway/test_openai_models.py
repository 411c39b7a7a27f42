"""What a client of OpenAI's may call `model`: a base model, a checkpoint, a run."""

from __future__ import annotations

import numpy as np
import openai
import pytest
from tinker import types

from tests.data import text_datum
from tests.gateway.conftest import KEY
from tests.gateway.sdk import prompt, sdk_datum


@pytest.fixture
def agent(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)


def complete(agent, model: str) -> str:
    done = agent.completions.create(
        model=model, prompt=list(range(40, 50)), max_tokens=10, temperature=0
    )
    return done.choices[0].text


def test_a_base_model_a_checkpoint_and_a_run(agent, training):
    for seed in range(3):
        training.forward_backward(
            [sdk_datum(text_datum(np.random.default_rng(seed), 30))], "cross_entropy"
        )
        training.optim_step(types.AdamParams(learning_rate=3e-2))
    path = training.save_weights_for_sampler("for-agents").result().path
    sampler = training.save_weights_and_get_sampling_client(kind="inflight").result()
    names = [model.id for model in agent.models.list()]
    assert "tiny-llama" in names
    assert path in names
    params = types.SamplingParams(max_tokens=10, temperature=0)
    (sequence,) = sampler.sample(prompt(range(40, 50)), 1, params).result().sequences
    expected = training.get_tokenizer().decode(sequence.tokens, skip_special_tokens=True)
    assert complete(agent, path) == complete(agent, training.model_id) == expected
    assert complete(agent, "tiny-llama") != expected
    # A run's newest weights: those published last.
    training.forward_backward(
        [sdk_datum(text_datum(np.random.default_rng(9), 30))], "cross_entropy"
    )
    training.optim_step(types.AdamParams(learning_rate=1e-1))
    training.save_weights_and_get_sampling_client(kind="inflight").result()
    assert complete(agent, training.model_id) != expected
    assert complete(agent, path) == expected


def test_a_chat(agent):
    answer = agent.chat.completions.create(
        model="tiny-qwen3",
        messages=[{"role": "user", "content": "What is 3 times 4?"}],
        max_tokens=8,
        seed=1,
    )
    assert answer.usage.completion_tokens <= 8
    assert answer.choices[0].finish_reason in ("stop", "length")


def test_models_that_are_not_there(agent, training):
    for name in ("no-such-model", f"tinker://{training.model_id}/weights/none", "a:train:0"):
        with pytest.raises(openai.NotFoundError):
            complete(agent, name)
