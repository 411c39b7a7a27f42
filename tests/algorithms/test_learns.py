"""End to end: a random model learns a task by every algorithm, on the path that users take."""

from __future__ import annotations

import json

import pytest

import tinsmith

SPELLING = tinsmith.TrainConfig(
    model="tiny-llama",
    env="tests.envs.spelling:Spelling",
    rank=8,
    steps=20,
    groups_per_step=4,
    group_size=8,
    max_staleness=1,
    learning_rate=1e-2,
    max_tokens=4,
    eval_episodes=32,
    checkpoint_every=100,
)

# The settings of algorithms/README.md, but for what the tiny task asks for.
ALGORITHMS: dict[str, dict] = {
    "grpo": dict(
        loss_fn="ppo", normalize="sequence_mean", kl_coeff=0.01, kl_form="k3", max_staleness=0
    ),
    "dr_grpo": dict(loss_fn="ppo", advantage="dr_grpo"),
    "rloo": dict(loss_fn="importance_sampling", advantage="rloo", kl_coeff=0.01),
    "reinforce_pp": dict(
        loss_fn="ppo", advantage="reinforce_pp", kl_coeff=0.01, groups_per_step=32, group_size=1
    ),
    "dapo": dict(
        loss_fn="ppo",
        loss_fn_config={"clip_low_threshold": 0.8, "clip_high_threshold": 1.28},
        normalize="token_mean",
        overlong_buffer=1,
    ),
    "gspo": dict(
        loss_fn="gspo",
        loss_fn_config={"clip_low_threshold": 0.8, "clip_high_threshold": 1.3},
        kl_coeff=0.01,
        kl_form="k2",
    ),
    "cispo with replay": dict(replay_groups=2, replay_staleness=3),
    "decoupled, sequence-level weights": dict(
        loss_fn="ppo", proximal_cap=2.0, importance_level="sequence", importance_mask=True
    ),
    "expert iteration": dict(loss_fn="cross_entropy", normalize="token_mean"),
}


@pytest.mark.parametrize("name", ALGORITHMS)
async def test_a_random_model_learns_to_write_vowels(service, name):
    config = tinsmith.TrainConfig(**{**SPELLING.__dict__, **ALGORITHMS[name]})
    result = await tinsmith.train(service, config)
    assert result.before is not None
    assert result.after is not None
    assert result.before.reward_interval().high < result.after.reward_interval().low
    rows = [json.loads(x) for x in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "eval" not in row]
    assert len(steps) == config.steps
    assert max(row["staleness_max"] for row in steps) <= max(
        config.max_staleness, config.replay_staleness if config.replay_groups else 0
    )
    assert ("reference_kl" in steps[-1]) == (config.kl_coeff > 0)
    if config.replay_groups:
        assert steps[-1]["replay_replayed"] > config.steps


@pytest.mark.slow
@pytest.mark.parametrize("max_staleness", [0, 2])
async def test_it_learns_at_any_staleness(service, max_staleness):
    config = tinsmith.TrainConfig(
        model="tiny-llama",
        env="tests.envs.spelling:Spelling",
        rank=8,
        steps=20,
        # With fewer it may settle for a token of a vowel and a consonant: half of the reward, no success.
        groups_per_step=16,
        group_size=8,
        max_staleness=max_staleness,
        learning_rate=1e-2,
        max_tokens=6,
        eval_episodes=64,
    )
    result = await tinsmith.train(service, config)
    assert result.before is not None
    assert result.after is not None
    assert result.before.reward_interval().high < result.after.reward_interval().low
    # Success is a share above one half: not by chance.
    assert result.before.high < result.after.low
