"""The multi-agent examples run as users run them, on a tiny model for a few steps."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parents[2] / "examples" / "multiagent"
PNG = b"\x89PNG"


@pytest.fixture
def example(tiny_llama, tmp_path):
    """Runs an example; what it printed, and the JSON object of the last line."""

    def run(name: str, *options: str) -> tuple[str, dict]:
        done = subprocess.run(
            [sys.executable, str(HERE / f"{name}.py"), "--model", tiny_llama, *options],
            env={**os.environ, "TINSMITH_HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout, json.loads(done.stdout.splitlines()[-1])

    return run


TINY = "--groups-per-step 2 --group-size 2 --warm-up-games 4 --warm-up-steps 1 --eval-games 2"


def test_self_play_fills_its_league_and_goes_on_after_a_restart(example, tmp_path):
    small = [*TINY.split(), "--join-every", "1", "--out", str(tmp_path)]
    stdout, result = example("self_play", *small, "--piles", "1 1", "--steps", "2")
    assert list(result["elo"]) == ["step 0", "step 1", "step 2", "random", "perfect"]
    assert result["elo"]["random"] == [0, 0, 0]
    assert result["perfect_against_random"][0] == 0.5  # two piles of one: who moves second wins
    assert (tmp_path / "self_play.png").read_bytes().startswith(PNG)
    assert (tmp_path / "self_play_elo.png").read_bytes().startswith(PNG)
    run_id = re.search(r"^run (\w+) from step 0$", stdout, re.MULTILINE)[1]
    again = ["--piles", "1 1", "--steps", "3", "--resume", run_id]
    stdout, result = example("self_play", *small, *again)
    assert f"run {run_id} from step 2" in stdout
    assert list(result["elo"]) == ["step 0", "step 1", "step 2", "step 3", "random", "perfect"]


def test_twenty_questions_trains_both_sides_and_crosses_them(example, tmp_path):
    _, result = example(
        "twenty_questions",
        *TINY.split(),
        "--steps",
        "2",
        "--head-start",
        "1",
        "--out",
        str(tmp_path),
    )
    assert result["cross_play"]["games"] == [[2, 2, 2]] * 3
    assert result["cross_play"]["failed"] == 0
    assert len(result["found"]["after"]) == 3
    assert (tmp_path / "twenty_questions.png").read_bytes().startswith(PNG)
