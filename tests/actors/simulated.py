"""A service in one thread, on a disk that forgets: what a crash leaves is decided here.

The learner, its engine, the logs and snapshots, the controller and its registry are the real ones.
Threads are not: whatever would run in one runs at once, and the sync thread syncs when it is told to,
so that the same calls give the same run every time. `Disk` notes what has been fsynced, files and
the names in folders, which is all that a power cut leaves.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import ray

from tests.conftest import THREADS
from tinsmith.actors.controller import Controller
from tinsmith.actors.learner import Learner
from tinsmith.actors.wal import Log

TICKS = 20_000  # of the event loop, in which whatever is under way must come to its end


class AtOnce(ThreadPoolExecutor):
    """Does what is submitted where it is submitted."""

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)
        return future


class InProcess:
    """The way to an object in this process, as a `RayHandle` is to an actor."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def call(self, method: str, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()

        def copy(done: asyncio.Task[Any]) -> None:
            if done.cancelled():
                future.cancel()
            elif done.exception() is not None:
                future.set_exception(done.exception())
            else:
                future.set_result(done.result())

        called = getattr(self.target, method)(*args, **kwargs)
        asyncio.get_running_loop().create_task(called).add_done_callback(copy)
        return future


class Published:
    """Stands where the sampler does, and shows everything that reaches it."""

    def __init__(self) -> None:
        self.sent: dict[str, dict[int, list[np.ndarray]]] = {}  # by run and version
        self.newest: dict[str, int] = {}

    async def ping(self) -> str:
        return ""

    async def add_adapter(
        self, run_id: str, version: int, config: Any, flat: np.ndarray, keep: bool
    ) -> None:
        self.sent.setdefault(run_id, {}).setdefault(version, []).append(flat)
        self.newest[run_id] = version

    async def latest_version(self, run_id: str) -> int | None:
        return self.newest.get(run_id)

    async def drop_run(self, run_id: str) -> None:
        self.newest.pop(run_id, None)


class Disk:
    """Below `root`, from `open()` to `close()`: what is on disk for good, and how the disk fails.

    Attributes:
        holding: nothing is synced before `release()`.
        broken: fsync fails.
        room: bytes that logs may still grow by (None: as many as they like).
        before_sync: called before each fsync.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.holding = self.broken = False
        self.room: int | None = None
        self.before_sync: Callable[[], None] = lambda: None
        self._wanted: dict[Log, None] = {}
        # By inode; each is kept open, so that no other takes its number.
        self._files: dict[int, bytes] = {}
        self._folders: dict[int, dict[str, int]] = {}
        self._kept_open: dict[int, int] = {}
        self._real = (os.fsync, os.writev, os.write)

    def open(self) -> None:
        """What is there is on disk."""
        os.fsync, os.writev, os.write = self._fsync, self._writev, self._write
        for folder, _, files in os.walk(self.root):
            for path in [folder, *(os.path.join(folder, name) for name in files)]:
                file = os.open(path, os.O_RDONLY)
                self._note(file)
                os.close(file)

    def close(self) -> None:
        os.fsync, os.writev, os.write = self._real
        for file in self._kept_open.values():
            os.close(file)

    # ---- the sync thread ----

    def ask(self, log: Log) -> None:
        if self.holding:
            self._wanted[log] = None
        else:
            log.sync_now()

    def release(self) -> None:
        self.holding = False
        wanted, self._wanted = self._wanted, {}
        for log in wanted:
            log.sync_now()

    # ---- system calls ----

    def _is_here(self, file: int) -> bool:
        return os.readlink(f"/proc/self/fd/{file}").startswith(str(self.root))

    def _fsync(self, file: int) -> None:
        if not self._is_here(file):
            self._real[0](file)
            return
        self.before_sync()
        if self.broken:
            raise OSError(errno.EIO, "the simulated disk is broken")
        self._note(file)

    def _note(self, file: int) -> None:
        about = os.fstat(file)
        if about.st_ino not in self._kept_open:
            self._kept_open[about.st_ino] = os.dup(file)
        path = f"/proc/self/fd/{file}"
        if stat.S_ISDIR(about.st_mode):
            entries = {e.name: e.stat(follow_symlinks=False).st_ino for e in os.scandir(path)}
            self._folders[about.st_ino] = entries
        else:
            self._files[about.st_ino] = Path(path).read_bytes()

    def _writev(self, file: int, parts: Any) -> int:
        return self._write(file, b"".join(parts))

    def _write(self, file: int, data: Any) -> int:
        if self.room is None or not self._is_here(file):
            return self._real[2](file, data)
        data = bytes(data)[: self.room]
        if not data:
            raise OSError(errno.ENOSPC, "the simulated disk is full")
        self.room -= len(data)
        return self._real[2](file, data)

    # ---- what a crash leaves ----

    def after_kill(self, target: Path) -> None:
        """All that was written."""
        shutil.copytree(self.root, target)

    def after_power_cut(self, target: Path, survives: float, flipped: bool) -> None:
        """All that was synced; of what came after it in a log, that part, its last byte wrong if
        `flipped`. The registry is SQLite's to keep."""
        target.mkdir()
        for file in self.root.glob("registry.sqlite*"):
            shutil.copy(file, target)
        self._rebuild(self.root.stat().st_ino, target, survives, flipped)

    def _rebuild(self, inode: int, target: Path, survives: float, flipped: bool) -> None:
        for name, entry in self._folders[inode].items():
            path = target / name
            if name.startswith("registry.sqlite"):
                continue
            if entry in self._folders:
                path.mkdir()
                self._rebuild(entry, path, survives, flipped)
                continue
            synced = self._files.get(entry, b"")
            if name.endswith(".wal") and entry in self._kept_open:
                written = Path(f"/proc/self/fd/{self._kept_open[entry]}").read_bytes()
                tail = bytearray(written[len(synced) :])
                del tail[round(len(tail) * survives) :]
                if flipped and tail:
                    tail[-1] ^= 1
                synced += tail
            path.write_bytes(synced)


class LocalController(Controller):
    """Whose learner and sampler are in this process."""

    def __init__(self, home: Path, sampler: Published) -> None:
        no_actor = SimpleNamespace(
            was_current_actor_reconstructed=False,
            get_session_name=lambda: "simulated",
            get_actor_id=lambda: None,
        )
        with mock.patch.object(ray, "get_runtime_context", return_value=no_actor):
            super().__init__(str(home))
        self.sampler = InProcess(sampler)
        self.learner: InProcess | None = None

    async def _learner(self, base_model: str) -> Any:
        return self.learner

    async def sampler_handle(self, base_model: str) -> Any:
        return self.sampler


class Life:
    """A service on a home, from its start to its crash."""

    def __init__(self, home: Path, model: str, sampler: Published, replay_seconds: float) -> None:
        self.loop = asyncio.new_event_loop()
        self.loop.set_default_executor(AtOnce(1))
        self.disk = Disk(home)
        self.disk.open()
        self.controller = LocalController(home, sampler)
        way = InProcess(self.controller)
        self.learner = Learner(model, model, str(home), way, THREADS, replay_seconds=replay_seconds)
        thread, *more = self.learner.journals
        thread.close()
        self.learner.journals = (self.disk, *more)  # type: ignore[assignment]
        self.learner.engine_thread = AtOnce(1)
        self.controller.learner = InProcess(self.learner)
        self.run(self.learner.start())

    def run(self, awaited: Any) -> Any:
        """What comes of it."""

        async def bounded() -> Any:
            task = asyncio.ensure_future(awaited)
            for _ in range(TICKS):
                if task.done():
                    return task.result()
                await asyncio.sleep(0)
            raise AssertionError(f"it does not end: {task}")

        return self.loop.run_until_complete(bounded())

    def tick(self, count: int) -> None:
        async def ticks() -> None:
            for _ in range(count):
                await asyncio.sleep(0)

        self.loop.run_until_complete(ticks())

    def end(self) -> None:
        """As a crash: the disk as it was has been copied before."""
        self.disk.broken, self.disk.room = False, None
        self.disk.before_sync = lambda: None
        self.disk.release()

        async def cancel() -> None:
            while tasks := asyncio.all_tasks() - {asyncio.current_task()}:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

        self.loop.run_until_complete(cancel())
        for log in self.learner.logs.values():
            with contextlib.suppress(OSError):
                log.journal.close()
        self.loop.close()
        self.controller.registry.db.close()
        self.disk.close()
