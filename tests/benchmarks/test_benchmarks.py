"""Every benchmark runs, and reports what it must; their times are asserted nowhere."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import make_tiny_model

HERE = Path(__file__).resolve().parents[2] / "benchmarks"
SCRIPTS = [path for path in HERE.glob("*.py") if "\nif __name__ ==" in path.read_text()]
NAMES = sorted({path.stem for path in SCRIPTS} - {"run_all"})


NEEDS_VLLM = [
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.slow,
]


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=NEEDS_VLLM if n.startswith("vllm_") else []) for n in NAMES],
)
def test_a_benchmark_reports_both_sides_and_their_ratio(name, tiny_llama, tmp_path):
    # vLLM has no attention for heads of 16 on a CPU.
    wide = name.startswith("vllm_")
    model = make_tiny_model(tmp_path / "tiny", "qwen3", head_dim=32) if wide else tiny_llama
    command = [sys.executable, str(HERE / f"{name}.py"), "--quick", "--model", model]
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
