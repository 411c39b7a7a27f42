"""Supervised recipes: loss goes down, runs are resumed where they were, evaluators see the model."""

from __future__ import annotations

import json
import shutil

from tests.cookbook.kitchen import BASE, Log


def test_chat_sl_learns_from_a_local_file(taught):
    losses = taught.column("train_mean_nll")
    assert losses[0] > 5
    assert losses[-1] < 0.05
    names = [checkpoint["name"] for checkpoint in taught.checkpoints]
    assert names == ["000008", "000016", "000024", "final"]


def test_chat_sl_goes_on_from_its_log(kitchen, taught, tmp_path):
    log = Log(tmp_path / "log")
    shutil.copytree(taught.folder, log.folder)
    forget(log, after="000024")
    kitchen.chat_sl(log.folder, "behavior_if_log_dir_exists=resume")
    assert [row["step"] for row in log.metrics] == list(range(32))
    assert log.column("learning_rate") == taught.column("learning_rate")
    # The recipe saves when two more steps are on their way, and takes these again.
    assert max(log.column("train_mean_nll")[24:]) < 0.2
    kitchen.check(log, 32)


def test_both_kinds_of_evaluators_see_the_model_learn(kitchen, tmp_path):
    log = kitchen.train("evaluated_sft.py", tmp_path / "log", steps=32)
    held_out, accuracy = log.column("test/nll"), log.column("accuracy")
    assert held_out[0] > 5
    assert held_out[-1] < 0.1
    assert accuracy[0] < 1
    assert accuracy[-1] == 1


def test_sl_basic(kitchen, tmp_path):
    """As it comes, but for its hub data set: 128 rows stand in, which is one batch."""
    log = kitchen.train("recipes.sl_basic", tmp_path / "log", steps=1)
    assert len(log.column("test/nll")) == 1


def test_sl_loop_and_its_exact_continuation(kitchen, tmp_path):
    log = tmp_path / "log"
    options = ("batch_size=16", "learning_rate=1e-2", "save_every=4")
    whole = kitchen.train("recipes.sl_loop", log, *options, steps=8)
    losses = whole.column("train_mean_nll")
    assert losses[-1] < losses[0] / 2
    forget(whole, after="000004")
    again = kitchen.train("recipes.sl_loop", log, *options, steps=8)
    assert again.column("train_mean_nll") == losses


def test_prompt_distillation(kitchen, tmp_path):
    log = kitchen.train(
        "recipes.prompt_distillation.train",
        tmp_path / "log",
        "file_path=chats.jsonl",
        f"model_name={BASE}",
        "batch_size=32",
        "learning_rate=1e-2",
        "num_epochs=2",
        steps=8,
    )
    losses = log.column("train_mean_nll")
    assert losses[-1] < losses[0] / 2


def test_off_policy_reasoning_streams_its_data(kitchen, tmp_path):
    options = ("batch_size=4", "max_prompts=16", "buffer_size=16", "learning_rate=1e-2")
    log = kitchen.train(
        "recipes.distillation.off_policy_reasoning", tmp_path / "log", *options, steps=4
    )
    losses = log.column("train_mean_nll")
    assert losses[-1] < losses[0]


def forget(log: Log, after: str) -> None:
    """As if the run had been killed at its last step, with its last checkpoint long before."""
    names = [checkpoint["name"] for checkpoint in log.checkpoints]
    for file, rows in (
        ("checkpoints.jsonl", log.checkpoints[: names.index(after) + 1]),
        ("metrics.jsonl", log.metrics[: int(after)]),
    ):
        (log.folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
