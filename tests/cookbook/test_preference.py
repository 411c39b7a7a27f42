"""Preferences: DPO, a policy that is paid for being shorter, and RLHF in its three stages."""

from __future__ import annotations

import math

import pytest

from tests.cookbook.kitchen import SAME, Log


def test_dpo(kitchen, tmp_path):
    log = kitchen.train(
        "recipes.preference.dpo.train",
        tmp_path / "log",
        "batch_size=8",
        "learning_rate=1e-3",
        steps=4,
    )
    losses = log.column("dpo_loss")
    # The first step is taken where policy and reference are the same: a trainer and a sampler.
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses[-1] < losses[0]
    assert log.column("accuracy")[-1] == 1


def test_shorter(kitchen, tmp_path):
    options = ("batch_size=4", "group_size=4", "eval_every=0", "max_steps=2")
    log = kitchen.train("recipes.preference.shorter.train", tmp_path / "log", *options, steps=2)
    assert max(map(abs, log.column("optim/kl_sample_train_v1"))) < SAME
    assert max(log.column("grad_norm")) > 0


def test_rlhf_in_three_stages(kitchen):
    kitchen.python(
        "-m",
        "tinker_cookbook.recipes.preference.rlhf.rlhf_pipeline",
        "short_name=tiny",
        "batch_size=4",
        "max_steps=2",
        "rl_max_tokens=16",
        "eval_every=1",
        "lora_rank=8",
    )
    stages = {
        name: Log(kitchen.workspace / "runs/rlhf-tiny" / name) for name in ("sft", "rm", "rl")
    }
    for log in stages.values():
        kitchen.check(log, 2)
    # The reward model judged the policy's answers against the data set's.
    assert all(0 <= rate <= 1 for rate in stages["rl"].column("win_rate"))
