"""Nodes of a Ray cluster on this machine, to be killed and stopped. For scripts of tests."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from pathlib import Path
from typing import Any

import psutil
from ray.cluster_utils import Cluster

# How soon the head misses a node, and a node its head.
SOON = {
    "health_check_initial_delay_ms": 2000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 6,
    "gcs_rpc_server_reconnect_timeout_s": 8,
}


def new_cluster() -> Cluster:
    """Its head has no CPUs: what reserves any goes to nodes that are added."""
    head = dict(num_cpus=0, include_dashboard=False, _system_config=SOON)
    return Cluster(initialize_head=True, shutdown_at_exit=True, head_node_args=head)


def family(node: Any) -> list[psutil.Process]:
    """All processes of a node, its raylet first."""
    found = []
    for info in [i for infos in node.all_processes.values() for i in infos]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(info.process.pid)
            found += [process, *process.children(recursive=True)]
    return sorted(set(found), key=lambda p: p.name() != "raylet")


def send(processes: list[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def lose(node: Any) -> None:
    """As when its machine fails."""
    send(family(node), signal.SIGKILL)


async def logged(node: Any, text: str, seconds: float = 90) -> str:
    """The line of an actor's log that holds `text`, once there is one."""
    async with asyncio.timeout(seconds):
        while True:
            for file in Path(node.get_logs_dir_path()).glob("worker-*.err"):
                for line in file.read_text(errors="replace").splitlines():
                    if text in line:
                        return line
            await asyncio.sleep(0.2)
