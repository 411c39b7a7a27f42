"""RL recipes: the loops, the losses, and the sampler and trainer that must agree."""

from __future__ import annotations

import json

import pytest

from tests.cookbook.kitchen import BASE, SAME

ON_POLICY = "optim/kl_sample_train_v1"


@pytest.fixture
def arithmetic(kitchen, taught, tmp_path):
    """math_rl from the taught model, whose reward is then mostly for stopping in time."""

    def run(*options: str, steps: int):
        return kitchen.train(
            "recipes.math_rl.train",
            tmp_path / "log",
            "env=arithmetic",
            f"model_name={BASE}",
            f"load_checkpoint_path={taught.checkpoints[-1]['state_path']}",
            "groups_per_batch=4",
            "group_size=8",
            "max_tokens=24",
            f"max_steps={steps}",
            *options,
            steps=steps,
        )

    return run


def test_synchronous(arithmetic):
    log = arithmetic(
        "loss_fn=importance_sampling", "learning_rate=3e-3", "compute_post_kl=True", steps=4
    )
    assert max(map(abs, log.column(ON_POLICY))) < SAME
    assert len(log.column("env/all/reward/total")) == 4
    assert max(log.column("kl_pre_post_v1"), key=abs) != 0


def test_the_default_loss(arithmetic):
    """stable_reinforce: the gateway knows the sampled tokens and their logprobs again."""
    log = arithmetic("learning_rate=3e-3", steps=4)
    assert max(map(abs, log.column(ON_POLICY))) < SAME
    assert max(log.column("grad_norm")) > 0


def test_streamed_minibatches(arithmetic):
    log = arithmetic(
        "loss_fn=ppo",
        "num_substeps=2",
        "stream_minibatch_config.groups_per_batch=4",
        "stream_minibatch_config.num_minibatches=2",
        steps=3,
    )
    assert log.column("sampling_client/step_min") == [0, 1, 2]
    # The second half of a batch is trained on one small step after it was sampled.
    assert max(map(abs, log.column(ON_POLICY))) < 1e-3


def test_asynchronous_off_policy(arithmetic):
    log = arithmetic("max_steps_off_policy=2", "learning_rate=1e-4", steps=5)
    staleness = log.column("async/staleness_max")
    assert 0 < max(staleness) <= 2
    # Off policy by two small steps at most.
    assert max(map(abs, log.column(ON_POLICY))) < 0.1


def test_rl_basic_with_its_test_set(kitchen, taught, tmp_path):
    log = kitchen.train(
        "recipes.rl_basic",
        tmp_path / "log",
        f"load_checkpoint_path={taught.checkpoints[-1]['state_path']}",
        "max_tokens=24",
        "max_steps=1",
        "eval_every=1",
        steps=1,
    )
    assert log.column("env/all/total_episodes") == [16 * 16]
    assert len(log.column("test/env/all/correct")) >= 1


@pytest.mark.parametrize("loss", ["stable_reinforce", "gspo"])
def test_rl_loop(kitchen, taught, tmp_path, loss):
    """From the taught model, which it takes for its own last checkpoint."""
    log = tmp_path / "log"
    log.mkdir()
    start = {**taught.checkpoints[-1], "name": "000000", "batch": 0}
    (log / "checkpoints.jsonl").write_text(json.dumps(start) + "\n")
    done = kitchen.train(
        "recipes.rl_loop",
        log,
        "batch_size=8",
        "group_size=32",  # enough for some to be right
        "max_tokens=24",
        "max_steps=2",
        f"loss_fn={loss}",
        steps=2,
    )
    assert max(done.column("reward/total")) > 0
    assert max(done.column("grad_norm")) > 0


def test_rubric_asks_a_grader(kitchen, tmp_path):
    log = kitchen.train(
        "recipes.rubric.train",
        tmp_path / "log",
        "model_name=Qwen/Qwen3.5-9B",
        "train_jsonl_path=rubrics.jsonl",
        "test_jsonl_path=rubrics.jsonl",
        "groups_per_batch=2",
        "train_group_size=4",
        "eval_every=0",
        "max_steps=2",
        steps=2,
    )
    assert max(map(abs, log.column(ON_POLICY))) < SAME


def test_rl_numerics_check(kitchen, tmp_path):
    log = kitchen.train(
        "recipes.rl_numerics_check.train",
        tmp_path / "log",
        "model_name=Qwen/Qwen3.5-9B",
        "renderer_name=qwen3_5_disable_thinking",
        "task.num_pages_min=1",
        "task.num_pages_max=2",
        "task.page_chars=200",
        "max_tokens=64",
        "groups_per_batch=2",
        "group_size=4",
        "max_steps=2",
        steps=2,
    )
    assert max(map(abs, log.column(ON_POLICY))) < SAME


def test_forecasting_validates_before_and_after(kitchen, tmp_path):
    log = kitchen.train(
        "recipes.forecasting.train",
        tmp_path / "log",
        "data_path=forecasts.csv",
        "train_epochs=1",
        "groups_per_batch=4",
        "group_size=4",
        "validation_group_size=1",
        "max_tokens=32",
        "eval_every=1",
        "max_steps=2",
        steps=2,
    )
    assert len(log.column("test/env/all/brier_reward")) == 3
    assert max(map(abs, log.column(ON_POLICY))) < SAME


def test_code_rl_short_of_its_sandbox(kitchen, tmp_path):
    """A model of this size writes no program, so that there is none to run."""
    log = kitchen.train(
        "recipes.code_rl.train",
        tmp_path / "log",
        "groups_per_batch=2",
        "group_size=2",
        "max_tokens=32",
        "eval_every=0",
        "max_steps=1",
        steps=1,
    )
    assert max(map(abs, log.column(ON_POLICY))) < SAME


def test_math_rl_on_deepmath(kitchen, tmp_path):
    log = kitchen.train(
        "recipes.math_rl.train",
        tmp_path / "log",
        "env=deepmath",
        f"model_name={BASE}",
        "groups_per_batch=4",
        "group_size=4",
        "max_tokens=8",
        "max_steps=1",
        steps=1,
    )
    assert max(map(abs, log.column(ON_POLICY))) < SAME
