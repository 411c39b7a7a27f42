"""`tinsmith serve` in a process of its own, started again when it ends, as a service manager would."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
import time

import ray

from ..primitives.errors import Unavailable

START_SECONDS = 300.0


class GatewayProcess:
    """In the cluster that this process is in. A context manager.

    Attributes:
        port: where it listens, on this machine.
        ended: how often it did, against its will.
    """

    def __init__(self, home: str, verbose: bool) -> None:
        self.home, self.verbose = home, verbose
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.ended = 0
        self._process: asyncio.subprocess.Process | None = None
        self._watch: asyncio.Task[None] | None = None

    async def __aenter__(self) -> GatewayProcess:
        self._watch = asyncio.create_task(self._keep_running())
        ending = time.monotonic() + START_SECONDS
        while not await self._listens():
            if self.ended or time.monotonic() > ending:
                await self.__aexit__()
                raise Unavailable("the gateway did not start; --verbose shows what it says")
            await asyncio.sleep(0.2)
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._watch is not None
        self._watch.cancel()
        await asyncio.wait({self._watch})
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    async def _keep_running(self) -> None:
        command = ["-c", "from tinsmith.cli import app; app()", "serve"]
        address = ray.get_runtime_context().gcs_address
        options = ["--address", address, "--home", self.home, "--port", str(self.port)]
        stderr = None if self.verbose else asyncio.subprocess.DEVNULL
        while True:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, *command, *options, stderr=stderr
            )
            await self._process.wait()
            self.ended += 1

    async def _listens(self) -> bool:
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", self.port)
            writer.close()
            return True
        return False
