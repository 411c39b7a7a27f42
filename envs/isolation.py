"""Every environment in a process of its own: whatever it does costs its own episode.

`EnvPool` is the worker's side; `fork_server` is what runs in the processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from ..primitives.errors import EnvironmentFailure, InvalidInput, NotFound
from ..primitives.types import Message
from .fork_server import HEADER, EnvSource
from .multi_agent import Transition

LOAD_SECONDS = 60.0
"""How long importing an environment's module may take; once, not per episode."""

CLOSE_SECONDS = 5.0
"""How long an environment's `close` may take before its process is killed all the same."""

MAX_SERVERS = 8
"""Server processes kept for environments that no episode plays at the moment."""

_BOOT = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from importlib import import_module
import_module(sys.argv[2]).main(int(sys.argv[3]))
"""


@dataclass(frozen=True)
class Step:
    """One transition. `messages` is the observation, checked."""

    messages: list[Message]
    reward: float
    terminated: bool
    truncated: bool
    info: dict[str, Any]


class EnvPool:
    """Processes for up to `max_processes` episodes at once; more wait for their turn.

    An async context manager; all on one event loop.
    """

    def __init__(self, max_processes: int = 64) -> None:
        self._slots = asyncio.Semaphore(max_processes)
        self._servers: dict[EnvSource, _Server] = {}

    @asynccontextmanager
    async def open(
        self,
        source: EnvSource,
        kwargs: Mapping[str, Any],
        *,
        max_turns: int | None = None,
        step_seconds: float = 30.0,
        memory_bytes: int | None = 2 << 30,
    ) -> AsyncIterator[EnvProcess]:
        """An environment for one episode; leaving the context ends its process and everything
        that it started.

        Args:
            source: which environment, and the agents that are played in its process.
            kwargs: what it is made with.
            max_turns: turns after which a script is not asked again.
            step_seconds: how long making it, `reset` and each `step` may take.
            memory_bytes: of its process, above which allocations fail; None: unlimited.

        Raises:
            NotFound: no such environment.
            InvalidInput: it does not take these arguments.
            EnvironmentFailure: importing or making it failed.
        """
        async with self._slots:
            server = self._server(source)
            server.users += 1
            try:
                process = await server.fork(step_seconds)
                try:
                    await process.make(dict(kwargs), max_turns, memory_bytes)
                    server.loaded = True
                    yield process
                    await process.close()
                finally:
                    process.kill()
            except _LoadFailed as failure:
                self._discard(source, server)
                raise failure.error from None
            finally:
                server.users -= 1

    def _server(self, source: EnvSource) -> _Server:
        server = self._servers.pop(source, None)
        if server is None or not server.alive():
            idle = [key for key, other in self._servers.items() if other.users == 0]
            for key in idle[: max(0, len(self._servers) + 1 - MAX_SERVERS)]:
                self._servers.pop(key).stop()
            server = _Server(source)
        self._servers[source] = server  # last: most recently used
        return server

    def _discard(self, source: EnvSource, server: _Server) -> None:
        """So that a later episode loads the module afresh."""
        if self._servers.get(source) is server:
            del self._servers[source]
        server.stop()

    async def close(self) -> None:
        """Kill every environment of the pool."""
        servers, self._servers = list(self._servers.values()), {}
        for server in servers:
            server.stop()
        await asyncio.gather(*(asyncio.to_thread(s.process.wait) for s in servers))

    async def __aenter__(self) -> EnvPool:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()


class _LoadFailed(Exception):
    def __init__(self, error: Exception) -> None:
        self.error = error


class _Server:
    """The server process of one environment."""

    def __init__(self, source: EnvSource) -> None:
        self.users = 0
        self.loaded = False
        self.where = f"environment {source.name!r}"
        if source.scripts:
            played = ", ".join(f"{agent!r} by {script!r}" for agent, script in source.scripts)
            self.where += f" (where {played} is played)"
        self.control, theirs = socket.socketpair()
        module = f"{__package__}.fork_server"
        arguments = [json.dumps([str(path) for path in sys.path]), module, str(theirs.fileno())]
        # Hundreds of environments with a thread pool each would only fight for the cores.
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, *arguments],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env=threads | dict(os.environ),
            )
        body = pickle.dumps(source)
        with contextlib.suppress(OSError):  # it is dead already: whoever uses it sees how it ended
            self.control.sendall(HEADER.pack(len(body)) + body)

    def alive(self) -> bool:
        return self.process.poll() is None

    def stop(self) -> None:
        """Ask it to kill its episodes and go; kill it where an import may keep it from hearing."""
        self.control.close()
        if not self.loaded:
            self.process.kill()

    async def fork(self, step_seconds: float) -> EnvProcess:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                socket.send_fds(self.control, [b"+"], [theirs.fileno()])
            except OSError:
                ours.close()
                raise _LoadFailed(await self.death()) from None
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        return EnvProcess(self, reader, writer, step_seconds)

    async def death(self) -> EnvironmentFailure:
        """How the server process ended, once it is seen to have ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            await asyncio.to_thread(self.process.wait, 1.0)
        doing = "plays its episodes" if self.loaded else "imports it"
        return EnvironmentFailure(
            f"{self.where}: the process that {doing} {_describe_exit(self.process.returncode)}"
        )


class EnvProcess:
    """One environment in its process. Any failure kills the process."""

    def __init__(
        self,
        server: _Server,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        step_seconds: float,
    ) -> None:
        self.server = server
        self.reader = reader
        self.writer = writer
        self.step_seconds = step_seconds
        self.memory_bytes: int | None = None
        self.steps = 0
        self.agents: list[str] = []
        self.tools: dict[str, list[dict[str, Any]] | None] = {}

    async def make(
        self, kwargs: dict[str, Any], max_turns: int | None, memory_bytes: int | None
    ) -> None:
        self.memory_bytes = memory_bytes
        # The first episodes of an environment wait for its module to be imported.
        seconds = self.step_seconds if self.server.loaded else LOAD_SECONDS
        request = {
            "kwargs": kwargs,
            "max_turns": max_turns,
            "memory_bytes": memory_bytes,
        }
        reply = await self._call("make", request, seconds)
        self.agents, self.tools = reply["agents"], reply["tools"]

    async def begin(self, seed: int | None, options: dict[str, Any] | None) -> list[Transition]:
        """Reset it, and let scripts play up to where one of the other agents is to act.

        Raises:
            EnvironmentFailure: it, or a script, raised, hung, died or ran out of memory.
        """
        return await self._play("reset", {"seed": seed, "options": options})

    async def act(self, actions: dict[str, str]) -> list[Transition]:
        """Play the turns of the agents that are to act and have no script; then as `begin`."""
        self.steps += 1
        return await self._play("step", {"actions": actions})

    async def forfeit(self, failures: dict[str, str]) -> list[Transition]:
        """Tell why agents that are to act cannot; then as `begin`."""
        return await self._play("forfeit", {"failures": failures})

    async def _play(self, method: str, request: dict[str, Any]) -> list[Transition]:
        reply = await self._call(method, request, self.step_seconds)
        self.tools = reply.get("tools", self.tools)
        return [Transition(**transition) for transition in reply["transitions"]]

    async def reset(
        self, seed: int | None, options: dict[str, Any] | None
    ) -> tuple[list[Message], dict[str, Any]]:
        """The first messages and info of an environment with one agent; raises as `begin`."""
        (transition,) = await self.begin(seed, options)
        (agent,) = self.agents
        return transition.observations[agent], transition.infos.get(agent, {})

    async def step(self, action: str) -> Step:
        """Play a turn in an environment with one agent; raises as `begin`."""
        (agent,) = self.agents
        (transition,) = await self.act({agent: action})
        return Step(
            transition.observations.get(agent, []),
            transition.rewards.get(agent, 0.0),
            transition.terminations.get(agent, False),
            transition.truncations.get(agent, False),
            transition.infos.get(agent, {}),
        )

    async def close(self) -> None:
        # The episode is over and its trajectory complete: a failure here costs nothing.
        with contextlib.suppress(EnvironmentFailure):
            await self._call("close", {}, CLOSE_SECONDS)

    def kill(self) -> None:
        """Hang up, upon which the server kills the process and all that it started."""
        self.writer.transport.abort()

    async def _call(self, method: str, arguments: dict[str, Any], seconds: float) -> dict[str, Any]:
        where = self.server.where
        doing = f"step {self.steps}" if method == "step" else method
        try:
            async with asyncio.timeout(seconds):
                reply = await self._exchange(pickle.dumps((method, arguments)))
        except TimeoutError:
            message = f"{where} hung in {doing}: no answer within {seconds:g} s, killed"
            failure = EnvironmentFailure(message)
            raise (failure if self.server.loaded else _LoadFailed(failure)) from None
        except (OSError, EOFError):
            death = await self.server.death()
            raise (death if self.server.loaded else _LoadFailed(death)) from None
        if "died" in reply:
            raise EnvironmentFailure(
                f"{where}: its process {_describe_exit(reply['died'])} in {doing}"
            )
        if "failed" in reply:
            raise self._failure(where, doing, reply)
        return reply

    async def _exchange(self, body: bytes) -> dict[str, Any]:
        self.writer.write(HEADER.pack(len(body)) + body)
        # A child that died leaves a last frame that says how: read it though writing fails.
        with contextlib.suppress(ConnectionError):
            await self.writer.drain()
        (size,) = HEADER.unpack(await self.reader.readexactly(HEADER.size))
        return json.loads(await self.reader.readexactly(size))

    def _failure(self, where: str, doing: str, reply: dict[str, Any]) -> Exception:
        if reply["type"] == "NotFound":
            return _LoadFailed(NotFound(reply["error"]))
        if reply["type"] == "InvalidInput":
            return _LoadFailed(InvalidInput(reply["error"]))
        if reply["failed"] == "load":
            message = f"{where} cannot be imported:\n{reply['error']}"
            return _LoadFailed(EnvironmentFailure(message))
        if reply["out_of_memory"]:
            limit = f" of {self.memory_bytes / 2**20:g} MiB" if self.memory_bytes else ""
            return EnvironmentFailure(
                f"{where} ran out of its memory limit{limit} in {doing}:\n{reply['error']}"
            )
        return EnvironmentFailure(f"{where} raised in {doing}:\n{reply['error']}")


def _describe_exit(code: int | None) -> str:
    if code is None:
        return "closed its connection"
    if code < 0:
        return f"was killed by signal {-code} ({signal.Signals(-code).name})"
    return f"exited with code {code}"
