"""Distillation: the teacher is a base model, a checkpoint, several models, or the student itself."""

from __future__ import annotations

import pytest

from tests.cookbook.kitchen import BASE, SAME

SMALL = ("max_tokens=24", "lora_rank=8")


def test_on_policy_from_a_checkpoint(kitchen, taught, tmp_path):
    log = kitchen.train(
        "recipes.distillation.on_policy_distillation",
        tmp_path / "log",
        f"teacher_model={BASE}",
        f"teacher_checkpoint={taught.checkpoints[-1]['sampler_path']}",
        "groups_per_batch=4",
        "group_size=16",
        "max_steps=16",
        *SMALL,
        "learning_rate=3e-3",  # with 1e-2 it falls sooner, and may jump up again
        steps=16,
    )
    assert max(map(abs, log.column("optim/kl_sample_train_v1"))) < SAME
    distance = log.column("teacher_kl")
    assert distance[-1] < distance[0]


def test_on_policy_from_two_teachers(kitchen, tmp_path):
    log = kitchen.train(
        "recipes.distillation.on_policy_multi_teacher",
        tmp_path / "log",
        "deepmath_groups_per_batch=4",
        "tulu3_groups_per_batch=2",
        "group_size=2",
        "max_steps=2",
        *SMALL,
        "learning_rate=1e-2",
        steps=2,
    )
    # Both are the student's own base model here.
    first, _ = log.column("teacher_kl")
    assert first == pytest.approx(0, abs=SAME)
    assert log.column("teacher_kl/dataset_1")


def test_self_distillation_with_the_teachers_top_tokens(kitchen, tmp_path):
    log = kitchen.train(
        "recipes.sdft.train",
        tmp_path / "log",
        "groups_per_batch=2",
        "max_tokens=16",
        "max_steps=2",
        "eval_every=0",
        steps=2,
    )
    assert log.column("sdft/topk") == [20, 20]
    assert min(log.column("grad_norm")) > 0
