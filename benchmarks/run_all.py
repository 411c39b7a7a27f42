"""Run every benchmark and rewrite the table in `benchmarks/README.md`: `make bench`.

Options are passed on to each (`make bench ARGS="--runs 3"`); with `--quick` or names of
benchmarks the table stays as it is.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch

HERE = Path(__file__).resolve().parent
README = HERE / "README.md"
BEGIN, END = "<!-- results -->", "<!-- end of results -->"


def benchmarks() -> list[str]:
    """Names of all benchmarks: every script here but this one."""
    scripts = [path for path in HERE.glob("*.py") if "\nif __name__ ==" in path.read_text()]
    return sorted({path.stem for path in scripts} - {Path(__file__).stem})


def possible() -> list[str]:
    """Those that run here."""
    vllm = importlib.util.find_spec("vllm") is not None
    return [name for name in benchmarks() if vllm or not name.startswith("vllm_")]


def run(name: str, arguments: list[str]) -> dict[str, object]:
    print(f"\n== {name}", file=sys.stderr, flush=True)
    command = [sys.executable, str(HERE / f"{name}.py"), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def table(results: list[dict[str, object]]) -> str:
    lines = [
        f"Measured on {machine()}, {time.strftime('%Y-%m-%d')}.",
        "",
        "| benchmark | ours | theirs or limit | unit | ratio | runs | command |",
        "|---|---:|---:|---|---:|---:|---|",
    ]
    lines += [
        "| {name} | {ours} | {theirs} | {unit} | **{ratio}** | {runs} | `{command}` |".format(**r)
        for r in results
    ]
    return "\n".join(lines)


def machine() -> str:
    memory = psutil.virtual_memory().total / 2**30
    return (
        f"{len(os.sched_getaffinity(0))} cores of {_processor()}, {memory:.0f} GiB, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return match[1] if match else platform.processor() or platform.machine()


def main() -> None:
    names = [a for a in sys.argv[1:] if a in benchmarks()]
    arguments = [a for a in sys.argv[1:] if a not in names]
    results = []
    for name in names or possible():
        results.append(run(name, arguments))
        print(json.dumps(results[-1]), flush=True)
    if not names and "--quick" not in arguments:
        text = README.read_text()
        before, after = text.split(BEGIN)[0], text.split(END)[1]
        README.write_text(f"{before}{BEGIN}\n{table(results)}\n{END}{after}")


if __name__ == "__main__":
    main()
