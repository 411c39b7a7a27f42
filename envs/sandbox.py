"""A Python tool for models: code in a process of its own, without network, within limits.

    with PythonSandbox() as sandbox:
        sandbox.run("print(2**100)")            # '1267650600228229401496703205376'

    ToolEnv([PythonSandbox().tool()])           # the model calls python(code)

What keeps the code in, from the strongest kind that this machine has:

- `"namespaces"` (Linux 5.12, where a user may make user namespaces; root always may): its own
  user, network, pid, mount and IPC namespaces. It sees a read-only root of the system's libraries
  and the Python installation, no /proc, no home, no network device, no process but its own, and one
  empty folder in memory. A seccomp filter also refuses the system calls that ordinary programs do
  without, `socket` among them.
- `"landlock"` (Linux 6.2, as in most containers): the same files to read, one temporary folder to
  write, no sockets, and no other processes: it can neither start nor signal any.
- `"none"`, only where `allow_unisolated`: the limits alone. Enough against mistakes, not
  against malice. This is all that macOS has.

In each: a clean environment, no open files but its output, and limits on CPU, memory, time,
output, files and processes; all that it started ends with it.

It is a shared kernel, not a virtual machine. It does not keep out someone who knows a hole in the
kernel; it does not hide what is in /usr or in the Python installation, nor the time, the CPU's kind
and load; it limits the memory of each process, not of all together (`processes` bounds that).
With `"landlock"` the code can ask whether a path exists. For code that means harm, run the workers
themselves in machines of their own.
"""

from __future__ import annotations

import contextlib
import marshal
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..primitives.errors import InvalidInput, Unavailable

Isolation = Literal["namespaces", "landlock", "none"]

MAX_CODE_BYTES = 1 << 20
_START_SECONDS = 30.0
_KINDS: tuple[Isolation, ...] = ("namespaces", "landlock")

_BOOT = """
import sys
package = type(sys)("_tinsmith_sandbox")
package.__path__ = [sys.argv[1]]
sys.modules[package.__name__] = package
from _tinsmith_sandbox.sandbox_child import main
main()
"""


@dataclass(frozen=True)
class SandboxLimits:
    """What one run of code may take: beyond `wall_seconds`, `cpu_seconds` (of each process) or
    `output_bytes` it is killed; beyond `memory_bytes` (of each process), `file_bytes` (of one
    file), `folder_bytes` (of all files) or `processes` (threads included) its call fails."""

    wall_seconds: float = 10.0
    cpu_seconds: int = 10
    memory_bytes: int = 512 << 20
    output_bytes: int = 16 << 10
    file_bytes: int = 16 << 20
    folder_bytes: int = 64 << 20
    processes: int = 16

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise InvalidInput(f"SandboxLimits.{name} must be above 0, got {value!r}")


class PythonSandbox:
    """Runs Python code apart from everything else; see the module for what that means.

    Not for use by several threads at once. Each `run` starts afresh in some tens of milliseconds;
    with `persistent` what one run defines is there in the next (until one is killed), and
    `cpu_seconds` count from the first to the last.

    Args:
        limits: of one run.
        persistent: keep the interpreter between runs.
        packages: folders whose modules the code can import (a venv's `site-packages`), beside the
            standard library. It can read all that is in them.
        isolation: the kind to use; None: the strongest there is.
        allow_unisolated: run also where there is none.

    Raises:
        Unavailable: isolation of that kind, or of any kind, cannot be had here, and why.
    """

    def __init__(
        self,
        limits: SandboxLimits | None = None,
        *,
        persistent: bool = False,
        packages: Sequence[str | Path] = (),
        isolation: Isolation | None = None,
        allow_unisolated: bool = False,
    ) -> None:
        if isolation not in (None, "none", *_KINDS):
            raise InvalidInput(f"isolation must be one of {_KINDS} or none, got {isolation!r}")
        if isolation == "none" and not allow_unisolated:
            raise InvalidInput('isolation="none" needs allow_unisolated=True')
        self.limits = limits or SandboxLimits()
        self.persistent = persistent
        self.packages = [os.path.realpath(folder) for folder in packages]
        # Started now, so that it is told now if it cannot.
        self._session: _Session | None = self._first_session(isolation, allow_unisolated)

    def _first_session(self, isolation: Isolation | None, unisolated: bool) -> _Session:
        kinds = [isolation] if isolation else [*_KINDS, *(["none"] if unisolated else [])]
        refusals = []
        for kind in kinds:
            self.isolation: Isolation = kind  # type: ignore[assignment]
            if kind != "none" and sys.platform != "linux":
                refusals.append(f"{kind}: only Linux has it")
                continue
            try:
                return _Session(self)
            except _SetupFailed as failure:
                refusals.append(f"{kind}: {failure}")
        raise Unavailable(
            f"Python code cannot be isolated here ({'; '.join(refusals)}). Allow user namespaces "
            "(sysctl user.max_user_namespaces, kernel.apparmor_restrict_unprivileged_userns=0; in "
            "a container, its security options), or give allow_unisolated=True to run it "
            "with limits only"
        )

    def _new_session(self) -> _Session:
        try:
            return _Session(self)
        except _SetupFailed as failure:
            raise Unavailable(f"the Python sandbox can start no more: {failure}") from None

    def run(self, code: str) -> str:
        """What the code wrote to stdout and stderr, and the value of its last line if that is an
        expression. How it ended, if not by itself, stands in brackets on a last line.

        Raises:
            Unavailable: no process can be started any more.
        """
        session, self._session = self._session or self._new_session(), None
        try:
            text, alive = session.run(code)
            if alive:
                self._session = session
            return text
        finally:
            if self._session is None:
                session.close()

    def tool(self) -> Callable[[str], str]:
        """`python(code: str) -> str`, for `ToolEnv`."""
        kept = (
            "Names defined in one call are known in the next."
            if self.persistent
            else "Each call starts afresh."
        )

        def python(code: str) -> str:
            return self.run(code)

        python.__doc__ = f"""Run Python code and return what it prints, and the value of a last
        line that is an expression. {kept}

        Args:
            code: the program.
        """
        return python

    def close(self) -> None:
        """End what is still kept; `run` would start afresh."""
        session, self._session = self._session, None
        if session is not None:
            session.close()

    def __enter__(self) -> PythonSandbox:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_session", None) is not None:
            self.close()


class _SetupFailed(Exception):
    pass


class _Session:
    """One sandboxed interpreter, from its start to its end.

    It writes to a pipe; `channel` carries code to its process; `status` tells how that ended, and
    closing it ends everything.
    """

    def __init__(self, sandbox: PythonSandbox) -> None:
        self.limits, self.persistent = sandbox.limits, sandbox.persistent
        on_disk = sandbox.isolation != "namespaces"
        self.folder = tempfile.mkdtemp(prefix="tinsmith-python-") if on_disk else None
        self.channel, channel = socket.socketpair()
        self.status, status = socket.socketpair()
        self.output, output = os.pipe()
        os.set_blocking(self.output, False)
        self._collected = bytearray()
        fds = (status.fileno(), channel.fileno())
        settings = _settings(sandbox, self.folder, *fds)
        command = [sys.executable, "-s", "-S", "-P", "-c", _BOOT, str(Path(__file__).parent)]
        try:
            self.process = subprocess.Popen(
                [*command, marshal.dumps(settings).hex()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=fds,
                start_new_session=True,
                env=_environment(self.folder),
            )
        finally:
            for end in (status, channel):
                end.close()
            os.close(output)
        self._await_ready()

    def _await_ready(self) -> None:
        try:
            ready = _ready([self.channel, self.status], _START_SECONDS)
            said = [end.recv(1 << 12).decode("utf-8", "replace") for end in ready]
        except OSError as error:
            said = [str(error)]
        if "ready" not in said:
            told = " ".join(text.removeprefix("failed ") for text in said)
            self._drain()
            told = told or self._collected.decode("utf-8", "replace") or "it did not start"
            self.close()
            raise _SetupFailed(told.strip())

    def run(self, code: str) -> tuple[str, bool]:
        """The text, and whether the interpreter is there for more."""
        body = code.encode("utf-8", "replace")
        if len(body) > MAX_CODE_BYTES:
            return f"[not run: the code is longer than {MAX_CODE_BYTES} bytes]", self.persistent
        self._collected = bytearray()
        with contextlib.suppress(OSError):  # its end is told by `status`
            self.channel.sendall(len(body).to_bytes(4, "big") + body)
        ended, alive = self._wait()
        limit = self.limits.output_bytes
        text = self._collected[:limit].decode("utf-8", "replace").rstrip("\n")
        return "\n".join(filter(None, [text, ended and f"[{ended}]"])), alive

    def _wait(self) -> tuple[str, bool]:
        """How it ended ("" for by itself), and whether the interpreter is there for more."""
        deadline = time.monotonic() + self.limits.wall_seconds
        watched: list[Any] = [self.output, self.status]
        if self.persistent:
            watched.append(self.channel)
        while True:
            left = deadline - time.monotonic()
            ready = _ready(watched, max(left, 0))
            if self.output in ready and not self._drain():
                watched.remove(self.output)
            if len(self._collected) > self.limits.output_bytes:
                return f"killed: more than {self.limits.output_bytes} bytes of output", False
            if self.status in ready:
                told = self.status.recv(1 << 12).decode("utf-8", "replace")
                self._drain()
                return self._described(told), False
            if self.channel in ready:
                if self.channel.recv(64) == b"done":
                    self._drain()
                    return "", True
                watched.remove(self.channel)
            if left <= 0:
                return f"killed: not done within {self.limits.wall_seconds:g} s", False

    def _drain(self) -> bool:
        """Collect what the pipe holds; False at its end."""
        try:
            while len(self._collected) <= self.limits.output_bytes:
                part = os.read(self.output, 1 << 16)
                if not part:
                    return False
                self._collected += part
        except BlockingIOError:
            pass
        return True

    def _described(self, told: str) -> str:
        if told == "ended 0":
            return ""
        if told == "ended full":
            return f"killed: more than {self.limits.folder_bytes} bytes of files"
        if not told.startswith("ended "):
            return "the process that kept it is gone"
        code = int(told.removeprefix("ended "))
        if code == -signal.SIGXCPU:
            return f"killed: more than {self.limits.cpu_seconds} s of CPU time"
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    def close(self) -> None:
        """End it, and everything in it, and take away its folder."""
        self.status.close()
        self.channel.close()
        os.close(self.output)
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def _ready(ends: Sequence[Any], seconds: float) -> list[Any]:
    """Those that can be read or were hung up, once there is one."""
    poll = select.poll()  # takes descriptors of any number, as `select` does not
    fds = {end if isinstance(end, int) else end.fileno(): end for end in ends}
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return [fds[fd] for fd, _ in poll.poll(seconds * 1000)]


def _settings(sandbox: PythonSandbox, folder: str | None, status: int, channel: int) -> Any:
    base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
    stdlib, built = (sysconfig.get_path(name, vars=base) for name in ("stdlib", "platstdlib"))
    prefixes = (sys.base_prefix, sys.base_exec_prefix)
    return {
        "isolation": sandbox.isolation,
        "persistent": sandbox.persistent,
        "packages": sandbox.packages,
        "readable": [*map(os.path.realpath, prefixes), *sandbox.packages],
        "stdlib": [os.path.realpath(stdlib), os.path.realpath(f"{built}/lib-dynload")],
        "python": os.path.realpath(sys.executable),
        "folder": folder,
        "status": status,
        "channel": channel,
        **vars(sandbox.limits),
    }


def _environment(folder: str | None) -> dict[str, str]:
    return {
        "HOME": folder or "/tmp",
        "TMPDIR": folder or "/tmp",
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "PYTHONHASHSEED": "0",  # the same code gives the same text
        "MALLOC_ARENA_MAX": "1",  # an arena per thread would use up the address space
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
