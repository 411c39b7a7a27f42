"""The example runs as its users run it: a process of its own, one JSON object at the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[3] / "examples" / "multiagent" / "async_off_policy.py"


def test_staleness_bounds_are_run_side_by_side_and_plotted(tiny_llama, tmp_path):
    out = tmp_path / "out"
    options = {
        "model": tiny_llama,
        "steps": 3,
        "groups-per-step": 2,
        "group-size": 2,
        "eval-episodes": 2,
        "latency": 0.02,
        "out": out,
    }
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--staleness", "0", "--staleness", "2", *flags],
        env={**os.environ, "TINSMITH_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    runs = json.loads(done.stdout.splitlines()[-1])["runs"]
    assert [run["max_staleness"] for run in runs] == [0, 2]
    synchronous, ahead = json.loads((out / "results.json").read_text())["curves"]
    assert {s for step in synchronous["staleness"] for s in step} == {0}
    assert max(s for step in ahead["staleness"] for s in step) <= 2
    for curve in (synchronous, ahead):
        assert len(curve["rewards"]) == 3
        assert curve["seconds"] == sorted(curve["seconds"])
        low, rate, high = curve["success"]
        assert 0 <= low <= rate <= high <= 1
    assert (out / "curves.png").stat().st_size > 0
