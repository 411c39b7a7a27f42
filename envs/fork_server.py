"""The process side of `isolation`: one server process per environment forks one child per episode.

The server imports the environment's module once; a fork then costs milliseconds, shares that
memory, and begins every episode from the same clean state. The worker holds one socket per
episode. When the worker closes it, the server kills the child and whatever the child started;
when a child dies, the server says how. Requests are pickled, replies are JSON, so that the worker
never unpickles what an environment made. A frame is a 4-byte length and that many bytes.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import pickle
import resource
import select
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

from ..primitives.errors import InvalidInput, NotFound
from .game import Game
from .multi_agent import Transition
from .registry import EnvFactory, construct, find
from .scripted import Script, Scripted

MAX_REPLY_BYTES = 16 << 20
HEADER = struct.Struct("!I")
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


@dataclass(frozen=True)
class EnvSource:
    """Where a server finds its environment: by name, or the factory itself, pickled. `scripts`
    are the agents that are played in its process."""

    name: str
    factory: bytes | None = None
    scripts: tuple[tuple[str, Scripted], ...] = ()


@dataclass(frozen=True)
class _Loaded:
    """What every episode begins with: the imports are done."""

    name: str
    factory: EnvFactory | None = None
    scripts: dict[str, Script] = field(default_factory=dict)
    failure: dict[str, Any] = field(default_factory=dict)


class Hangup(Exception):
    """The worker closed its end."""


def send_frame(connection: socket.socket, body: bytes) -> None:
    connection.sendall(HEADER.pack(len(body)) + body)


def receive_frame(connection: socket.socket) -> bytes:
    (size,) = HEADER.unpack(_receive(connection, HEADER.size))
    return _receive(connection, size)


def _receive(connection: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = connection.recv(size - len(parts))
        if not part:
            raise Hangup
        parts += part
    return bytes(parts)


def main(control_fd: int) -> None:
    """Serve until the control socket closes. Its first frame is the pickled `EnvSource`; then
    each byte carries the socket of one episode."""
    _die_with_parent(signal.SIGKILL)  # an import that hangs would not see the socket close
    control = socket.socket(fileno=control_fd)
    try:
        source: EnvSource = pickle.loads(receive_frame(control))
    except Hangup:
        return
    loaded = _load(source)
    _die_with_parent(0)
    _Server(control, loaded).run()


def _load(source: EnvSource) -> _Loaded:
    try:
        pickled = source.factory
        factory = find(source.name) if pickled is None else pickle.loads(pickled)
        scripts = {agent: pickle.loads(script.pickled) for agent, script in source.scripts}
        return _Loaded(source.name, factory, scripts)
    except BaseException as error:
        return _Loaded(source.name, failure=_failure("load", error))


class _Server:
    def __init__(self, control: socket.socket, loaded: _Loaded) -> None:
        self.control = control
        self.loaded = loaded
        self.children: dict[int, socket.socket] = {}

    def run(self) -> None:
        self.wakeup, wakeup_end = socket.socketpair()
        self.wakeup.setblocking(False)
        wakeup_end.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wakeup_end.fileno(), warn_on_full_buffer=False)
        self.poll = select.poll()
        self.poll.register(self.control, select.POLLIN)
        self.poll.register(self.wakeup, select.POLLIN)
        open_for_more = True
        while open_for_more:
            ready = {fd for fd, _ in self.poll.poll()}
            # In this order, so that no descriptor of this poll is closed and given out again
            # before its own event has been seen to.
            for fd in ready - {self.wakeup.fileno(), self.control.fileno()}:
                self._drop(fd)
            if self.wakeup.fileno() in ready:
                self._reap()
            if self.control.fileno() in ready:
                open_for_more = self._accept()
        signal.set_wakeup_fd(-1)
        for pid in self.children:
            _kill_group(pid)

    def _accept(self) -> bool:
        """Fork a child for each socket received; False once the worker is gone."""
        data, fds, _, _ = socket.recv_fds(self.control, 64, 64)
        for fd in fds:
            connection = socket.socket(fileno=fd)
            pid = os.fork()
            if pid == 0:
                self._become_child(connection)
            self.children[pid] = connection
            # No event asked for: a poll reports only that the worker has hung up.
            self.poll.register(connection, 0)
        return bool(data)

    def _become_child(self, connection: socket.socket) -> NoReturn:
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.setsid()
            _die_with_parent(signal.SIGKILL)
            for other in (self.control, self.wakeup, *self.children.values()):
                other.close()
            if "numpy" in sys.modules:  # Python's own generator reseeds itself on a fork
                sys.modules["numpy"].random.seed()
            _Episode(connection, self.loaded).run()
            code = 0
        except Hangup:
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def _drop(self, fd: int) -> None:
        self.poll.unregister(fd)
        for pid, connection in self.children.items():
            if connection.fileno() == fd:
                _kill_group(pid)

    def _reap(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self.wakeup.recv(4096):
                pass
        while self.children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            connection = self.children.pop(pid, None)
            if connection is None:
                continue  # something that the environment's module started
            _kill_group(pid)  # what the episode started and left behind
            with contextlib.suppress(KeyError):
                self.poll.unregister(connection)
            with contextlib.suppress(OSError):
                connection.setblocking(False)
                code = os.waitstatus_to_exitcode(status)
                send_frame(connection, json.dumps({"died": code}).encode())
            connection.close()


class _Episode:
    """One match, answering its worker's requests until the worker hangs up."""

    def __init__(self, connection: socket.socket, loaded: _Loaded) -> None:
        self.connection = connection
        self.loaded = loaded
        self.game: Game
        self.loop: Any = None

    def run(self) -> None:
        answers: dict[str, Callable[..., dict[str, Any]]] = {
            "make": self._make,
            "reset": self._reset,
            "step": self._step,
            "forfeit": self._forfeit,
            "close": self._close,
        }
        method = "make"
        while method != "close":
            method, arguments = pickle.loads(receive_frame(self.connection))
            try:
                reply = answers[method](**arguments)
                body = json.dumps(reply, default=_plain).encode()
                if len(body) > MAX_REPLY_BYTES:
                    raise InvalidInput(
                        f"observation and info are {len(body)} bytes long, more than "
                        f"{MAX_REPLY_BYTES}"
                    )
            except BaseException as error:
                body = json.dumps(_failure(method, error)).encode()
            send_frame(self.connection, body)

    def _make(
        self, kwargs: dict[str, Any], memory_bytes: int | None, max_turns: int | None
    ) -> dict[str, Any]:
        if self.loaded.factory is None:
            return self.loaded.failure
        if memory_bytes is not None:
            _limit_memory(memory_bytes)
        try:
            self.env = construct(self.loaded.name, self.loaded.factory, kwargs)
        except (InvalidInput, NotFound) as error:
            return _failure("load", error)
        self.game = Game(self.env, self.loaded.scripts, max_turns, self._settle)
        return {"agents": self.game.agents, "tools": self.game.tools}

    def _reset(self, seed: int | None, options: dict[str, Any] | None) -> dict[str, Any]:
        told = _told(self.game.reset(seed, options))
        # Again, because the tools of a server are known only once it runs.
        return {**told, "tools": self.game.tools}

    def _step(self, actions: dict[str, str]) -> dict[str, Any]:
        return _told(self.game.step(actions))

    def _forfeit(self, failures: dict[str, str]) -> dict[str, Any]:
        return _told(self.game.forfeit(failures))

    def _close(self) -> dict[str, Any]:
        self._settle(self.env.close())
        return {}

    def _settle(self, value: Any) -> Any:
        if not hasattr(value, "__await__"):
            return value
        import asyncio

        if self.loop is None:
            self.loop = asyncio.new_event_loop()
            asyncio.set_event_loop(self.loop)

        async def settle() -> Any:
            return await value

        return self.loop.run_until_complete(settle())


def _told(transitions: list[Transition]) -> dict[str, Any]:
    return {"transitions": [vars(transition) for transition in transitions]}


def _failure(phase: str, error: BaseException) -> dict[str, Any]:
    """A failure as data. Errors of loading that are the caller's keep their type."""
    if isinstance(error, MemoryError):
        _lift_memory_limit()
    kept = phase == "load" and isinstance(error, NotFound | InvalidInput)
    return {
        "failed": phase,
        "type": type(error).__name__ if kept else None,
        "out_of_memory": isinstance(error, MemoryError),
        "error": str(error) if kept else "".join(traceback.format_exception(error)),
    }


def _plain(value: Any) -> Any:
    """Plain data for what JSON does not have: numpy's values; anything else by its `repr`."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, set | frozenset):
        return list(value)
    return repr(value)


# RLIMIT_DATA counts private writable memory, not what libraries merely reserve, but only on
# Linux (from 4.7); elsewhere the address space is what can be limited.
_MEMORY = resource.RLIMIT_DATA if sys.platform == "linux" else resource.RLIMIT_AS


def _limit_memory(memory_bytes: int) -> None:
    _, hard = resource.getrlimit(_MEMORY)
    limit = memory_bytes if hard == resource.RLIM_INFINITY else min(memory_bytes, hard)
    resource.setrlimit(_MEMORY, (limit, hard))


def _lift_memory_limit() -> None:
    # The traceback keeps what filled the memory, and telling of it needs some more.
    _, hard = resource.getrlimit(_MEMORY)
    resource.setrlimit(_MEMORY, (hard, hard))


def _die_with_parent(by_signal: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, by_signal)


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
