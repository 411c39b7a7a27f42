"""Reinforcement that goes on from other weights than a fresh adapter's."""

from __future__ import annotations

import numpy as np
import pytest

import tinsmith
from tests.data import text_datum


async def test_a_run_begins_with_the_weights_of_its_start(service):
    datum = text_datum(np.random.default_rng(0))
    warm = await service.create_lora_training_client("tiny-llama", rank=4, seed=0)
    fresh = await logprobs(warm, datum)
    warm.forward_backward([datum], "cross_entropy")
    await warm.optim_step(tinsmith.AdamParams(1e-2))
    saved = await warm.save_state("warm")
    config = tinsmith.TrainConfig(
        model="tiny-llama",
        env="tests.envs.spelling:Spelling",
        start=saved.path,
        steps=1,
        groups_per_step=1,
        group_size=2,
        learning_rate=0.0,
        max_tokens=2,
        eval_episodes=0,
    )
    result = await tinsmith.train(service, config)
    trained = await service.resume_training_client(result.run_id)
    np.testing.assert_allclose(
        await logprobs(trained, datum), await logprobs(warm, datum), atol=1e-5
    )
    assert np.abs(await logprobs(trained, datum) - fresh).max() > 0.01
    assert result.run_id != warm.run_id


async def test_a_start_of_another_model_is_refused_and_leaves_no_run(service):
    other = await service.create_lora_training_client("tiny-llama", rank=4)
    saved = await other.save_state("other")
    runs = len(await service.list_training_runs())
    config = tinsmith.TrainConfig(model="tiny-qwen3", start=saved.path, eval_episodes=0)
    with pytest.raises(tinsmith.InvalidInput, match="checkpoint of tiny-llama, not of tiny-qwen3"):
        await tinsmith.train(service, config)
    assert len(await service.list_training_runs()) == runs


async def logprobs(client: tinsmith.TrainingClient, datum: tinsmith.Datum) -> np.ndarray:
    output = await client.forward([datum], "cross_entropy")
    return output.loss_fn_outputs[0]["logprobs"]
