"""A `tinsmith serve` of its own process beside the benchmark's cluster."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator

import ray
from harness import say


@contextlib.contextmanager
def served(home: str) -> Iterator[str]:
    """The URL of a gateway that has joined the cluster started in this process."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    address = ray.get_runtime_context().gcs_address
    command = ["serve", "--address", address, "--home", home, "--port", str(port)]
    process = subprocess.Popen(
        [sys.executable, "-c", "from tinsmith.cli import app; app()", *command],
        stderr=sys.stderr,
    )
    os.environ.update(TINKER_API_KEY="tml-benchmark", TINKER_TELEMETRY="0")
    try:
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{url}/api/v1/healthz")
                break
            if process.poll() is not None:
                raise SystemExit("the gateway did not start")
            time.sleep(0.1)
        say(f"gateway at {url}")
        yield url
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)
