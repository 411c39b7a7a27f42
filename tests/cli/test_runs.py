from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


def test_runs_lists_what_was_trained(trained, command):
    result = command("runs", "--json")
    (run,) = [run for run in json.loads(result.stdout) if run["run_id"] == trained.run_id]
    assert run["base_model"] == "tiny-llama"
    assert run["lora"]["rank"] == 4
    assert run["user_metadata"]["env"] == "say-a-vowel"
    assert run["run_dir"] == str(trained.run_dir)
    assert run["checkpoints"] == 2
    assert trained.run_id in command("runs").stdout


def test_a_run_shows_its_checkpoints_newest_first(trained, command):
    for name in (trained.run_id, trained.run_dir):
        run = json.loads(command("runs", name, "--json").stdout)
        paths = [checkpoint["path"] for checkpoint in run["checkpoints"]]
        assert paths == [
            f"tinker://{trained.run_id}/weights/step-000002",
            f"tinker://{trained.run_id}/weights/step-000000",
        ]
        assert paths[0] in command("runs", name).stdout


def test_a_home_without_runs_has_none_and_stays_untouched(command, tmp_path):
    command = type(command)(tmp_path / "nothing")
    assert json.loads(command("runs", "--json").stdout) == []
    assert "no runs" in command("runs").stdout
    assert not (tmp_path / "nothing").exists()


def test_a_run_is_deleted_when_confirmed_and_only_then(service, command, tiny_home):
    training = service.sync.create_lora_training_client("tiny-llama", rank=2)
    training.save_state("first")
    files = tiny_home / "runs" / training.run_id
    assert command("runs", training.run_id, "--delete", answers="n\n").exit_code == 1
    assert files.exists()
    assert command("runs", training.run_id, "--delete", "--yes").exit_code == 0
    assert not files.exists()
    assert command("runs", training.run_id).exit_code == 2


@pytest.mark.parametrize("verb", ["runs", "plot", "chat", "export"])
def test_a_wrong_name_is_said_in_one_line(trained, command, verb):
    wrong = trained.run_id[:-1]
    result = command(verb, wrong)
    assert result.exit_code == 2
    assert result.stderr == f"tinsmith: no run '{wrong}'; did you mean {trained.run_id}?\n"


def test_the_installed_command_does_the_same_without_a_traceback(tmp_path):
    script = Path(sys.executable).with_name("tinsmith")
    done = subprocess.run(
        [script, "runs", "nonesuch", "--home", tmp_path], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("tinsmith: there are no runs in ")
    assert done.stderr.count("\n") == 1
