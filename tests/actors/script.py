"""Runs a script in a process of its own, as a user would, and looks after what it leaves behind."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent.parent


def python_path() -> str:
    """This repository, and where this process was told to look for modules."""
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def run_script(text: str, *args: object, seconds: float = 240) -> str:
    """The output of a script that must end well."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(text), *map(str, args)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": python_path()},
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def wait_until_gone(pids: list[int], seconds: float = 30) -> list[psutil.Process]:
    """Those still there after a while."""
    processes = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    return alive


def descendants() -> list[int]:
    return [child.pid for child in psutil.Process().children(recursive=True)]


def children_settled(seconds: float = 30) -> bool:
    """Whether this process has no children any more, or soon has none."""
    deadline = time.monotonic() + seconds
    while psutil.Process().children(recursive=True):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
