"""Every benchmark runs, and reports what it must; their times are asserted nowhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parents[2] / "benchmarks"
NAMES = sorted({path.stem for path in HERE.glob("*.py")} - {"harness", "run_all", "serving"})


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_reports_both_sides_and_their_ratio(name, tiny_llama, tmp_path):
    command = [sys.executable, str(HERE / f"{name}.py"), "--quick", "--model", tiny_llama]
    done = subprocess.run(
        command,
        env={**os.environ, "TINSMITH_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert {"name", "unit", "ours", "theirs", "ratio", "runs", "command"} <= result.keys()
    assert result["name"] == name
    assert result["theirs"] > 0
    assert result["ratio"] > 0
