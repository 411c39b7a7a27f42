"""End to end: a random model learns a task by reinforcement, on the path that users take."""

from __future__ import annotations

import pytest

import tinsmith


@pytest.mark.slow
@pytest.mark.parametrize("max_staleness", [0, 2])
async def test_a_random_model_learns_to_write_vowels(service, max_staleness):
    config = tinsmith.TrainConfig(
        model="tiny-llama",
        env="tests.envs.spelling:Spelling",
        rank=8,
        steps=20,
        groups_per_step=4,
        group_size=8,
        max_staleness=max_staleness,
        learning_rate=1e-2,
        max_tokens=6,
        eval_episodes=64,
    )
    result = await tinsmith.train(service, config)
    assert result.before is not None
    assert result.after is not None
    assert result.before.mean_reward < 0.3
    assert result.after.mean_reward > 0.7
    # Success is a share above one half: not by chance.
    assert result.before.high < result.after.low
