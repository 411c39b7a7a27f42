"""The fault campaign, in its short form."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.actors.script import ROOT, python_path
from tinsmith.chaos.schedule import KINDS, draw


def test_a_seed_gives_the_same_faults_again_and_every_kind_of_them():
    faults = draw(0, 200, 10, 500, KINDS)
    assert faults == draw(0, 200, 10, 500, KINDS)
    assert faults != draw(1, 200, 10, 500, KINDS)
    assert len(faults) == 200
    assert {(f.action, f.target) for f in faults} == {(k.action, k.target) for k in KINDS}
    places = [f.after for f in faults]
    assert places == sorted(places)
    assert 10 <= places[0] <= places[-1] <= 500
    assert len(draw(0, 3, 10, 500, KINDS)) == 3


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_among_faults_nothing_is_lost_or_done_twice_or_comes_out_otherwise(tiny_llama, tmp_path):
    report = tmp_path / "report.md"
    options = ["--model", tiny_llama, "--faults", "12", "--report", str(report)]
    done = subprocess.run(
        [sys.executable, "-m", "tinsmith.chaos", *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": python_path()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "seed 0, 12 faults, 4 tenants" in report.read_text()
    assert "0 lost, 0 done twice, 0 different" in report.read_text()
