from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time

import pytest

import tinsmith
from tests.cli.letters import SayAVowel
from tinsmith.algorithms.plot import read_metrics
from tinsmith.cli.config import load_config
from tinsmith.envs import register
from tinsmith.primitives.errors import InvalidInput, NotFound


def test_a_toml_file_is_all_that_training_needs(trained):
    summary = json.loads(trained.stdout)
    assert summary["task"] == "say-a-vowel"
    assert summary["optim_steps"] == 2
    assert summary["before"]["episodes"] == summary["after"]["episodes"] == 4
    assert summary["run_dir"] == str(trained.run_dir)
    steps = [row["step"] for row in read_metrics(trained.run_dir) if "reward" in row]
    assert steps == [1, 2]
    assert (trained.run_dir / "reward.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_goes_on_to_another_end(service, command, run_toml, tmp_path):
    importing = ("--import", "tests.cli.letters", "--json")
    brief = ("--steps", 1, "--eval-episodes", 0, "--run-dir", tmp_path / "run")
    assert command("train", run_toml, *brief, *importing).exit_code == 0
    result = command("train", "--resume", tmp_path / "run", "--steps", 2, *importing)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["optim_steps"] == 2


def test_ctrl_c_does_not_wait_for_episodes(service, tmp_path):
    class SlowInTraining(SayAVowel):
        def step(self, action):
            if self.hint != "evaluation":
                time.sleep(60)
            return super().step(action)

    class CtrlC(tinsmith.Watcher):
        def evaluated(self, step, result):
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()

    register("slow-in-training", SlowInTraining)
    config = tinsmith.TrainConfig(
        "tiny-llama",
        "slow-in-training",
        eval_env_kwargs={"hint": "evaluation"},
        groups_per_step=1,
        group_size=2,
        max_tokens=4,
        eval_episodes=1,
        step_seconds=120.0,
    )
    run = tinsmith.train(service, config, run_dir=tmp_path / "run", watch=CtrlC())
    result = asyncio.run(asyncio.wait_for(run, 50))
    assert (result.steps, result.stopped) == (0, True)


def test_a_second_run_in_the_same_folder_is_refused(trained, command, run_toml):
    before = command("runs", "--json").stdout
    result = command("train", run_toml, "--run-dir", trained.run_dir)
    assert result.exit_code == 2
    assert "holds a run already" in result.stderr
    assert command("runs", "--json").stdout == before


def test_flags_override_the_file(run_toml):
    config = load_config(run_toml, {"steps": 7, "env_kwargs": {"hint": "e"}})
    assert (config.steps, config.rank) == (7, 4)
    assert config.env_kwargs == {"hint": "e"}


def test_an_unknown_key_is_named_with_what_was_meant(command, tmp_path):
    (tmp_path / "run.toml").write_text("learning_rat = 1e-4")
    result = command("train", tmp_path / "run.toml")
    assert result.exit_code == 2
    assert result.stderr.strip().endswith("'learning_rat'; did you mean learning_rate?")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('steps = "3"', r"Expected `int`, got `str` - at `\$.steps`"),
        ("steps = 0", "steps must be at least 1"),
        ("steps = ", "is not TOML"),
    ],
)
def test_a_value_that_cannot_be_used_is_named(tmp_path, text, complaint):
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(InvalidInput, match=complaint):
        load_config(tmp_path / "run.toml", {})


def test_a_whole_number_will_do_where_a_fraction_is_meant(tmp_path):
    (tmp_path / "run.toml").write_text("learning_rate = 1")
    assert load_config(tmp_path / "run.toml", {}).learning_rate == 1.0


def test_a_missing_file_is_not_found(tmp_path):
    with pytest.raises(NotFound, match=r"no file .*run\.toml"):
        load_config(tmp_path / "run.toml", {})


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (("--env", "nonesuch"), "no environment 'nonesuch'"),
        (("--import", "nonesuch"), "there is no module 'nonesuch'"),
        (("--resume", "nonesuch"), "there is no run in nonesuch"),
        (("--resume", "nonesuch", "--rank", "3"), "of it, give only --steps"),
    ],
)
def test_what_cannot_work_is_said_in_one_line_before_anything_starts(command, args, complaint):
    result = command("train", *args)
    assert result.exit_code == 2
    assert complaint in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_a_librarys_environment_is_trained_in_by_its_name(service, command, tmp_path):
    flags = {
        "model": "tiny-llama",
        "env": "reasoning_gym:coin_flip",
        "env-kwargs": '{"size": 20, "system_prompt": "direct"}',
        "eval-env-kwargs": '{"split": "eval"}',
        "rank": 4,
        "steps": 1,
        "groups-per-step": 1,
        "group-size": 2,
        "max-tokens": 4,
        "eval-episodes": 2,
        "step-seconds": 120,
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    result = command("train", *words, "--run-dir", tmp_path / "run", "--json")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout.splitlines()[-1])
    assert summary["optim_steps"] == 1
