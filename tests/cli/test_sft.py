from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.actors.script import run_script
from tinsmith.algorithms.plot import read_metrics

FLAGS = ("--model", "tiny-llama", "--rank", 4, "--batch-size", 4, "--learning-rate", 0.01)


@dataclass(frozen=True)
class Tuned:
    summary: dict
    stderr: str
    run_dir: Path


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    good = [json.dumps({"prompt": f"What is {n}?", "completion": f"{n}!"}) for n in range(9)]
    file.write_text("\n".join([*good[:4], '{"prompt": 3}', *good[4:]]) + "\n")
    return file


@pytest.fixture(scope="module")
def tuned(service, command, data, tmp_path_factory) -> Tuned:
    folder = tmp_path_factory.mktemp("sft") / "run"
    result = command(
        "sft", data, *FLAGS, "--steps", 2, "--validation", 0.3, "--run-dir", folder, "--json"
    )
    assert result.exit_code == 0, result.output
    return Tuned(json.loads(result.stdout), result.stderr, folder)


def test_a_file_of_rows_is_all_that_it_needs(tuned):
    summary = tuned.summary
    assert (summary["optim_steps"], summary["stopped"]) == (2, False)
    assert summary["before"]["examples"] == summary["after"]["examples"] == 3
    assert summary["data"]["train"]["used"] == 9
    assert [number for number, _ in summary["data"]["train"]["bad"]] == [5]
    assert "line 5: a row needs messages" in tuned.stderr
    assert (tuned.run_dir / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_on_two_ranks_it_is_the_same(tuned, data, tiny_home, tmp_path):
    how = (*FLAGS, "--steps", 2, "--validation", 0.3, "--layout", "shard=2")
    where = ("--run-dir", tmp_path / "run", "--home", tiny_home, "--json")
    printed = run_script("from tinsmith.cli import app; app()", "sft", data, *how, *where)
    summary = json.loads(printed.splitlines()[-1])
    for when in ("before", "after"):
        assert summary[when]["nll"] == pytest.approx(tuned.summary[when]["nll"], rel=1e-5)


def test_strict_refuses_the_bad_line_and_starts_nothing(service, command, data):
    before = command("runs", "--json").stdout
    result = command("sft", data, *FLAGS, "--strict")
    assert result.exit_code == 2
    assert f"{data}, line 5: a row needs messages" in result.stderr
    assert command("runs", "--json").stdout == before


def test_the_run_is_listed_plotted_and_talked_to(tuned, command, data, tmp_path):
    (run,) = [
        run
        for run in json.loads(command("runs", "--json").stdout)
        if run["run_id"] == tuned.summary["run_id"]
    ]
    assert run["user_metadata"]["data"] == str(data)
    assert run["run_dir"] == str(tuned.run_dir)
    assert tuned.summary["run_id"] in command("runs").stdout
    for name in (tuned.run_dir, run["run_id"]):
        out = tmp_path / "curve.png"
        assert command("plot", name, "--out", out).exit_code == 0
        assert out.read_bytes().startswith(b"\x89PNG")
    said = command("chat", tuned.run_dir, "--once", "What is 3?", "--max-tokens", 4, "--json")
    assert said.exit_code == 0, said.output
    assert json.loads(said.stdout)["tokens"] > 0


def test_a_run_goes_on_to_another_end(tuned, command):
    result = command("sft", "--resume", tuned.run_dir, "--steps", 3, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["optim_steps"] == 3
    steps = [row["step"] for row in read_metrics(tuned.run_dir) if "nll" in row]
    assert steps == [1, 2, 3]


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        ((), "name a file of rows"),
        (("rows.jsonl", "--epochs", 0), "epochs must be at least 1"),
        (("--resume", "nonesuch"), "there is no run in nonesuch"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(command, args, complaint):
    result = command("sft", *args)
    assert result.exit_code == 2
    assert complaint in result.stderr
    assert result.stderr.count("\n") == 1


def test_train_and_sft_keep_to_their_own_runs(tuned, command):
    result = command("train", "--resume", tuned.run_dir)
    assert result.exit_code == 2
    assert "has a SupervisedConfig, not a TrainConfig" in result.stderr
