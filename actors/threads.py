"""Threads of the engines, several of which may share one machine's cores."""

from __future__ import annotations

import os

import torch

# By default OpenMP's threads spin while they wait for each other. As soon as two engines share
# the cores, one spins away the time in which the other could bring it what it waits for: tried,
# a sampler beside one busy process does not get through 500 tokens in 40 s, and without spinning
# loses a third of its speed. Must be set before torch is loaded.
#
# By default glibc gives the memory of a pass back to the system when it is over, so that the next
# pass takes a page fault for every page of it again. Engines keep theirs.
ENGINE_ENV = {
    "env_vars": {
        "OMP_WAIT_POLICY": "PASSIVE",
        "MALLOC_MMAP_THRESHOLD_": str(32 << 20),  # the largest that glibc takes
        "MALLOC_TRIM_THRESHOLD_": str((1 << 31) - 1),
        "MALLOC_TOP_PAD_": str(64 << 20),
    }
}


def engine_env(home: str) -> dict[str, dict[str, str]]:
    """The same for an engine whose home it is."""
    return {"env_vars": {**ENGINE_ENV["env_vars"], "TINSMITH_HOME": home}}


def engine_device() -> str:
    """ "cuda" for an actor that was given a GPU: Ray shows it no other."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def set_engine_threads(num_threads: int | None) -> None:
    """Use `num_threads` torch threads (None: one per CPU this process may use; Ray would give an
    actor without reserved CPUs only one)."""
    torch.set_num_threads(num_threads or len(os.sched_getaffinity(0)))
