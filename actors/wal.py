"""A write-ahead log: records in files, in order, each whole or not there.

A log is a folder of segments, each named by the position of its first byte in the whole, and by
the claim (`claim.py`) of the process that wrote it. A segment ends where one of a later claim begins:
what a process writes that has lost its claim is not in the log. A record is a header (magic, length, how far the log was known to be on disk, CRC-32 of it all) and its
bytes. `append` writes; one thread fsyncs whatever logs were written to since it last looked, many
records of many logs for the price of one. After a crash the log ends at its last whole record.
What is not whole before a record that knew of it is no crash's doing, and refused.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import struct
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from ..primitives.errors import CorruptLog, InvalidInput, StorageFailure, Unavailable
from .claim import LOCK_SECONDS, Claim
from .durable import make_folder, sync

MAX_RECORD_BYTES = 1 << 30
SEGMENT_BYTES = 64 << 20
REPLAY_SECONDS = 15.0  # how long doing again what a run's log holds may take, if nobody says

_MAGIC = b"\xf5WAL"
_HEADER = struct.Struct("<4sIQI")
_CHECKED = struct.Struct("<IQ")
_NAME = re.compile(r"(\d{20})-(\d{10})\.wal")

logger = logging.getLogger(__name__)


def _checksum(length: int, synced: int, payload: bytes | memoryview) -> int:
    return zlib.crc32(payload, zlib.crc32(_CHECKED.pack(length, synced)))


@dataclass(frozen=True, order=True)
class _Segment:
    """A file; `begin`: the position of its first byte. `claim`: whose it is."""

    begin: int
    claim: int

    @property
    def name(self) -> str:
        return f"{self.begin:020d}-{self.claim:010d}.wal"


@dataclass(frozen=True)
class _Found:
    """A whole record in a segment's bytes, at `offset`."""

    offset: int
    synced: int
    payload: memoryview

    @property
    def end(self) -> int:
        return self.offset + _HEADER.size + len(self.payload)


def _record_at(data: memoryview, offset: int) -> _Found | None:
    if offset + _HEADER.size > len(data):
        return None
    magic, length, synced, checksum = _HEADER.unpack_from(data, offset)
    begin = offset + _HEADER.size
    if magic != _MAGIC or length > MAX_RECORD_BYTES or begin + length > len(data):
        return None
    payload = data[begin : begin + length]
    return (
        _Found(offset, synced, payload) if _checksum(length, synced, payload) == checksum else None
    )


def _records_after(data: bytes, offset: int) -> Iterator[_Found]:
    """Whole records somewhere after damage."""
    while (offset := data.find(_MAGIC, offset)) >= 0:
        found = _record_at(memoryview(data), offset)
        if found is not None:
            yield found
        offset += 1 if found is None else _HEADER.size + len(found.payload)


class SyncThread:
    """Fsyncs the logs that ask for it, all together."""

    def __init__(self) -> None:
        self._wanted: dict[Log, None] = {}
        self._condition = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="log-sync", daemon=True)
        self._thread.start()

    def ask(self, log: Log) -> None:
        with self._condition:
            self._wanted[log] = None
            self._condition.notify()

    def close(self) -> None:
        """End the thread, after what was asked for."""
        with self._condition:
            self._closed = True
            self._condition.notify()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._wanted or self._closed)
                if not self._wanted:
                    return
                logs, self._wanted = self._wanted, {}
            for log in logs:
                log.sync_now()


class Log:
    """Opens the log in `folder`, making it if there is none; one process at a time. Of one service
    the last that opens it has it (see `Claim`).

    Args:
        service: that this process belongs to.
        empty: delete what is in the folder first.

    Attributes:
        start, end: positions of its first byte and after its last.
        synced_end: up to where it is on disk.
        failure: why nothing can be appended any more. `StorageFailure`: an fsync failed; what was
            not on disk then is cut off, and opening it again goes on from there. `Unavailable`: another
            process has taken it.

    Raises:
        CorruptLog: damage before the last whole record.
        StorageFailure: the folder cannot be made or written to.
        Unavailable: a process of another service has it open.
    """

    def __init__(
        self,
        folder: Path,
        thread: SyncThread,
        *,
        segment_bytes: int = SEGMENT_BYTES,
        service: str | None = None,
        lock_seconds: float = LOCK_SECONDS,
        empty: bool = False,
    ) -> None:
        self.folder = folder
        self.failure: StorageFailure | Unavailable | None = None
        self._thread = thread
        self._segment_bytes = segment_bytes
        self._lock = threading.Lock()
        self._syncing = threading.Lock()  # taken before the other; while held, no file is closed
        self._waiting: list[Future[None]] = []
        self._rolled: list[int] = []  # files of earlier segments, not yet fsynced
        self._rolled_folder = False  # whether there is a segment that the folder may not name yet
        self._file: int | None = None
        self._torn = False  # the file may hold more than whole records
        try:
            make_folder(folder)
            self._folder_file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                above = max((s.claim for s in _all_segments(folder)), default=0)
                self.claim = Claim(folder, service, lock_seconds, above)
            except BaseException:
                os.close(self._folder_file)
                raise
            try:
                if empty:
                    _empty(folder)
                self._segments = self._valid_segments()
                self.start, self.end = self._cut()
                self.synced_end = self.end
                self._sync_earlier()
                self._begin_segment()
                self._drop_superseded()
                self._sync_files([], True)
            except BaseException:
                self._close_files()
                raise
        except OSError as error:
            raise StorageFailure(f"the log in {folder} cannot be opened: {error}") from error

    # ---- reading ----

    def _valid_segments(self) -> list[_Segment]:
        """Those that the log consists of: none that begins where one of a later claim had begun, and
        none of a claim later than this one."""
        kept: list[_Segment] = []
        for segment in sorted(_all_segments(self.folder), key=lambda s: (-s.claim, -s.begin)):
            if segment.claim > self.claim.number:
                continue
            if not kept or segment.claim == kept[-1].claim or segment.begin < kept[-1].begin:
                kept.append(segment)
        return kept[::-1]

    def _cut(self) -> tuple[int, int]:
        """Cut what a crash left half-written; returns where the log starts and ends."""
        start = end = self._segments[0].begin if self._segments else 0
        for segment, following in zip_longest(self._segments, self._segments[1:]):
            if segment.begin != end:
                break  # a segment is missing
            data = memoryview(self._path(segment).read_bytes())
            limit = segment.begin + len(data) if following is None else following.begin
            while end < limit and (found := _record_at(data, end - segment.begin)) is not None:
                end = segment.begin + found.end
            if end != limit:
                break
        else:
            return start, end
        self._refuse_damage(end)
        dropped = 0
        for segment in reversed(self._segments[1:]):
            if segment.begin < end:
                break
            dropped += self._path(segment).stat().st_size
            self._path(segment).unlink()
            self._segments.pop()
        segment = self._segments[-1]
        last = self._path(segment)
        dropped += last.stat().st_size - (end - segment.begin)
        os.truncate(last, end - segment.begin)
        logger.warning(
            "%s: cut to %d bytes, its last whole record; %d bytes after it were never acknowledged",
            last,
            end - segment.begin,
            dropped,
        )
        return start, end

    def _refuse_damage(self, end: int) -> None:
        """
        Raises:
            CorruptLog: the log was on disk beyond `end`, where it is not whole now.
        """
        for segment in self._segments:
            data = self._path(segment).read_bytes()
            after = _records_after(data, max(end - segment.begin, 0))
            if any(found.synced > end for found in after):
                raise CorruptLog(
                    f"{self.place(end)} is damaged, and whole records come after it: restore the "
                    "file, or resume the run from a checkpoint (path=...)"
                )

    def records(self) -> Iterator[tuple[int, memoryview]]:
        """What is in the log when this is called: position and bytes of every record."""
        segments, end = list(self._segments), self.end
        for segment, until in zip(segments, [*(s.begin for s in segments[1:]), end], strict=True):
            view, offset = memoryview(self._path(segment).read_bytes()), 0
            while (
                segment.begin + offset < until and (found := _record_at(view, offset)) is not None
            ):
                yield segment.begin + offset, found.payload
                offset = found.end

    def place(self, position: int) -> str:
        """File and offset of a position, for messages."""
        segment = max((s for s in self._segments if s.begin <= position), default=self._segments[0])
        return f"{self._path(segment)} at byte {position - segment.begin:,}"

    # ---- writing ----

    def append(self, payload: bytes) -> int:
        """Write a record (`synced` says when it is on disk); returns its position.

        Raises:
            InvalidInput: it is larger than `MAX_RECORD_BYTES`.
            StorageFailure: it could not be written. The log is as it was, and may be tried again.
        """
        if len(payload) > MAX_RECORD_BYTES:
            raise InvalidInput(
                f"an operation of {len(payload):,} bytes; a log's record holds up to "
                f"{MAX_RECORD_BYTES:,}: send smaller batches"
            )
        with self._lock:
            if self.failure is not None:
                raise self.failure
            try:
                return self._append(payload)
            except OSError as error:
                with contextlib.suppress(OSError):
                    self._mend()
                raise StorageFailure(
                    f"the log in {self.folder} cannot be written: {error}. Nothing was done; "
                    "try again when there is room"
                ) from error

    def _append(self, payload: bytes) -> int:
        self._mend()
        if self.end - self._segments[-1].begin >= self._segment_bytes:
            self._roll()
        assert self._file is not None
        length, synced = len(payload), self.synced_end
        header = _HEADER.pack(_MAGIC, length, synced, _checksum(length, synced, payload))
        self._torn = True
        written = os.writev(self._file, (header, payload))
        if written < len(header) + length:  # a full disk takes a part, and refuses the next
            rest = memoryview(header + payload)[written:]
            while rest:
                rest = rest[os.write(self._file, rest) :]
        self._torn = False
        position, self.end = self.end, self.end + len(header) + length
        return position

    def _mend(self) -> None:
        if self._torn:
            assert self._file is not None
            os.ftruncate(self._file, self.end - self._segments[-1].begin)
            self._torn = False

    def _roll(self) -> None:
        self.claim.check()
        before = self._file
        self._begin_segment()
        if before is not None:
            self._rolled.append(before)
        self._rolled_folder = True

    def _begin_segment(self) -> None:
        segment = _Segment(self.end, self.claim.number)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        self._file = os.open(self._path(segment), flags, 0o644)
        self._segments.append(segment)

    def _sync_earlier(self) -> None:
        """What is read may not have been on disk yet."""
        for segment in self._segments:
            sync(self._path(segment))

    def _drop_superseded(self) -> None:
        """Files that are not in the log, or hold nothing of it."""
        self._segments = self._valid_segments()
        for segment in _all_segments(self.folder):
            if segment not in self._segments and segment.claim < self.claim.number:
                self._path(segment).unlink(missing_ok=True)

    def synced(self) -> Future[None]:
        """Done once all that has been appended so far is on disk; fails as `failure` says."""
        future: Future[None] = Future()
        with self._lock:
            if self.failure is not None:
                future.set_exception(self.failure)
            elif self.synced_end == self.end:
                future.set_result(None)
            else:
                self._waiting.append(future)
        if not future.done():
            self._thread.ask(self)
        return future

    def sync_now(self) -> None:
        """For the sync thread."""
        with self._syncing:
            waiting, failure = self._sync()
        for future in waiting:
            if failure is None:
                future.set_result(None)
            else:
                future.set_exception(failure)

    def _sync(self) -> tuple[list[Future[None]], StorageFailure | Unavailable | None]:
        """Who waited, and why what they waited for is not on disk."""
        with self._lock:
            waiting, self._waiting = self._waiting, []
            if self.synced_end == self.end:  # by the fsync before; it may have been closed since
                return waiting, None
            rolled, self._rolled = self._rolled, []
            folder, self._rolled_folder = self._rolled_folder, False
            end, file = self.end, self._file
        failure: StorageFailure | Unavailable | None = self.failure
        if failure is None and file is not None:
            try:
                self._sync_files([*rolled, file], folder)
                self.claim.check()
            except Unavailable as error:
                failure = error
            except OSError as error:
                # What the kernel could not write it forgets: only the disk knows what is there.
                failure = StorageFailure(f"the log in {self.folder} could not be kept: {error}")
                failure.__cause__ = error
        with self._lock:
            if isinstance(failure, StorageFailure) and self.failure is None:
                self._cut_unsynced()
            self.failure = failure
            self.synced_end = max(self.synced_end, end) if failure is None else self.synced_end
        for opened in rolled:
            os.close(opened)
        return waiting, failure

    def _cut_unsynced(self) -> None:
        """Nobody was told of it, and a learner started later must not find it."""
        # A disk that does not even take this is as it is, and what another has is its own.
        with contextlib.suppress(OSError, Unavailable):
            self.claim.check()
            while self._segments[-1].begin > self.synced_end:
                self._path(self._segments[-1]).unlink()
                del self._segments[-1]
            last = self._segments[-1]
            os.truncate(self._path(last), self.synced_end - last.begin)

    def _sync_files(self, files: list[int], folder: bool) -> None:
        for file in files:
            os.fsync(file)
        if folder:
            os.fsync(self._folder_file)

    # ---- the end ----

    def trim(self, position: int) -> None:
        """Delete segments that hold nothing from `position` on; the last one stays."""
        with self._lock:
            while len(self._segments) > 1 and self._segments[1].begin <= position:
                self._path(self._segments[0]).unlink(missing_ok=True)
                del self._segments[0]
            self.start = self._segments[0].begin

    def close(self) -> None:
        """Once all is on disk, if it can be."""
        self.synced().exception()
        with self._syncing, self._lock:
            self.failure = self.failure or StorageFailure(f"the log in {self.folder} is closed")
            self._close_files()

    def _close_files(self) -> None:
        for file in (*self._rolled, self._file, self._folder_file):
            if file is not None:
                os.close(file)
        self._rolled, self._file = [], None
        self.claim.close()

    def _path(self, segment: _Segment) -> Path:
        return self.folder / segment.name


def _all_segments(folder: Path) -> list[_Segment]:
    found = map(_NAME.fullmatch, os.listdir(folder))
    return sorted(_Segment(int(match[1]), int(match[2])) for match in found if match)


def _empty(folder: Path) -> None:
    for entry in list(folder.iterdir()):
        if entry.is_dir():
            shutil.rmtree(entry)
        elif not entry.name.startswith("owner-"):
            entry.unlink()
