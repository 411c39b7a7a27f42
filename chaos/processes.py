"""The service's processes, found from outside."""

from __future__ import annotations

import re

import psutil

# By what their command lines say. Ray writes what an actor is doing behind its name.
PROCESSES = {
    "learner": r"ray::Learner(\..*)?",
    "sampler": r"ray::Sampler(\..*)?",
    "sampler pool": r"ray::SamplerPool(\..*)?",
    "controller": r"ray::Controller(\..*)?",
    "environment worker": r"ray::EnvWorker(\..*)?",
    "environment": r".* tinsmith\.envs\.fork_server( .*)?",
    "gateway": r".* --multiprocessing-fork",  # the child that serves, of `tinsmith serve`
}


def find(name: str) -> list[psutil.Process]:
    """All of that name that this process has started, oldest first."""
    pattern, found = re.compile(PROCESSES[name], re.DOTALL), []
    for process in psutil.Process().children(recursive=True):
        try:
            if pattern.fullmatch(" ".join(process.cmdline()).strip()):
                found.append((process.create_time(), process.pid, process))
        except psutil.NoSuchProcess:
            continue
    return [process for _, _, process in sorted(found)]
