"""Who writes a run's log: of processes that each think they do, the last that claimed it.

A learner that is cut off, or stopped, may live on when another has taken its place. So a log's
folder holds a file `owner-<number>`. Who takes the log over gives that file the next number, by a
rename, which only one of them can. And who has written something looks, once it is on disk and before
anybody is told of it, whether the file still has the number that it gave: else it has lost the log.

Meanwhile the file is locked, so that another service is told that the log is in use.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import socket
import time
from pathlib import Path

from ..primitives.errors import Unavailable

LOCK_SECONDS = 20.0  # a process that was just killed may still hold it

_NAME = re.compile(r"owner-(\d+)")
_GONE = (errno.ENOENT, errno.ESTALE)


class Claim:
    """Takes the log in `folder`, which exists.

    Args:
        service: that this process belongs to. One service replaces its own learners, so a claim of
            the same service is taken over at once, also from a process that lives.
        above: the number is to be higher than this one too.

    Attributes:
        number: higher than those of all claims before it.

    Raises:
        OSError: the folder cannot be written.
        Unavailable: a process of another service has the log.
    """

    def __init__(
        self,
        folder: Path,
        service: str | None = None,
        lock_seconds: float = LOCK_SECONDS,
        above: int = 0,
    ) -> None:
        self.folder = folder
        deadline = time.monotonic() + lock_seconds
        while True:
            before = _newest(folder)
            try:
                self.number = max(before, above) + 1
                self._file = _opened(folder, before, self.number)
            except OSError as error:
                if error.errno in (*_GONE, errno.EEXIST):
                    continue  # another was quicker: look again
                raise
            try:
                self._take_lock(service, deadline)
                if before:
                    os.rename(folder / _name(before), folder / _name(self.number))
                os.ftruncate(self._file, 0)
                told = (service or "", socket.gethostname(), str(os.getpid()))
                os.pwrite(self._file, "\n".join(told).encode(), 0)
                return
            except BaseException as error:
                os.close(self._file)
                if not isinstance(error, OSError) or error.errno not in _GONE:
                    raise

    def _take_lock(self, service: str | None, deadline: float) -> None:
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            told = os.pread(self._file, 1024, 0).decode(errors="replace").splitlines()
            theirs, host, pid = told if len(told) == 3 else ("", "?", "?")
            if theirs and theirs == service:
                return
            if time.monotonic() > deadline:
                raise Unavailable(
                    f"the log in {self.folder} is open in another process (pid {pid} on {host}): "
                    "another service uses the same home, or a learner of one that ended still lives"
                )
            time.sleep(0.05)

    def check(self) -> None:
        """
        Raises:
            Unavailable: another has taken the log.
        """
        try:
            # Opened, not only looked up: a network file system asks its server then.
            now = os.open(self.folder / _name(self.number), os.O_RDONLY)
        except OSError as error:
            if error.errno not in _GONE:
                raise
        else:
            try:
                if os.path.samestat(os.fstat(now), os.fstat(self._file)):
                    return
            finally:
                os.close(now)
        raise Unavailable(
            f"another learner has taken over the log in {self.folder}: what this one does counts no "
            "more, and nobody is told of it"
        )

    def close(self) -> None:
        """Unlock it."""
        os.close(self._file)


def _name(number: int) -> str:
    return f"owner-{number}"


def _newest(folder: Path) -> int:
    """0: there is none."""
    found = map(_NAME.fullmatch, os.listdir(folder))
    return max((int(match[1]) for match in found if match), default=0)


def _opened(folder: Path, before: int, number: int) -> int:
    """The file of the claim before; where there is none, a new one."""
    if before:
        return os.open(folder / _name(before), os.O_RDWR | os.O_CLOEXEC)
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    return os.open(folder / _name(number), flags, 0o644)
