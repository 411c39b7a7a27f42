"""What keeps a run: its log and its snapshots, in `runs/<id>/log` below the home.

Opening a run begins with a snapshot. Every operation is written when it comes, every result before
it is given. When going on from the last snapshot would take too long, a new one is due. The one
before it is kept, with what comes after it in the log, in case the last is damaged.
"""

from __future__ import annotations

import logging
import shutil
import uuid
from collections import OrderedDict
from concurrent.futures import Future
from pathlib import Path

import msgspec
from torch import Tensor

from ..primitives.errors import CorruptLog, StorageFailure, Unavailable
from . import records, snapshots
from .published import PublishedWeights
from .records import Record
from .snapshots import About
from .wal import Log, SyncThread

READ_BYTES_PER_SECOND = 50e6  # reading and decoding a log, roughly; part of what replay takes
SNAPSHOT_RESULTS = 1024
SNAPSHOT_RESULT_BYTES = 64 << 20

logger = logging.getLogger(__name__)


def log_folder(run_id: str) -> str:
    """Below the home."""
    return f"runs/{run_id}/log"


def new_run_key() -> str:
    return uuid.uuid4().hex


class Journal:
    """One run's. Not thread-safe but for `save`, which may run beside the rest.

    Args:
        service: as for `Log`.
    """

    def __init__(
        self,
        folder: Path,
        thread: SyncThread,
        replay_seconds: float,
        service: str | None = None,
        empty: bool = False,
    ) -> None:
        self.folder = folder
        self.replay_seconds = replay_seconds
        self.seconds = 0.0  # that replay would take
        self._longest = 0.0  # of one operation
        self._earlier = 0  # from where on the last snapshot needs the log
        self.log = Log(folder, thread, service=service, empty=empty)
        self.published = PublishedWeights(folder / "published")
        self._results: OrderedDict[int, Record] = OrderedDict()
        self._result_bytes = 0
        self._behind: list[Record] = []  # what could not be written yet, and goes before the next

    @classmethod
    def begin(
        cls,
        folder: Path,
        thread: SyncThread,
        replay_seconds: float,
        service: str | None,
        about: About,
        state: dict[str, Tensor],
    ) -> Journal:
        """A run's first, with a snapshot of how it starts; what was there before is deleted.

        Raises:
            StorageFailure: the disk is full or read-only.
        """
        journal = cls(folder, thread, replay_seconds, service, empty=True)
        try:
            snapshots.write(folder, about, state)
        except BaseException:
            journal.delete()
            raise
        return journal

    def read(self) -> tuple[About, dict[str, Tensor], list[tuple[int, Record]]]:
        """The newest snapshot that is whole and what the log has after it, with its positions.

        Raises:
            CorruptLog: one of them is damaged.
        """
        about, state = self._snapshot()
        self._earlier = about.position
        after = []
        for position, payload in self.log.records():
            try:
                record = records.decode(bytes(payload))
            except msgspec.MsgspecError as error:
                raise CorruptLog(f"{self.log.place(position)} holds no record: {error}") from error
            if record.seq_id >= about.next_seq_id:
                after.append((position, record))
        return about, state, after

    def _snapshot(self) -> tuple[About, dict[str, Tensor]]:
        damaged: dict[Path, CorruptLog] = {}
        for snapshot in reversed(snapshots.there(self.folder)):
            try:
                about, state = snapshots.read(snapshot)
                self._check_covers(about)
            except CorruptLog as error:
                damaged[snapshot] = error
                continue
            for path, why in damaged.items():
                logger.warning("%s: going on from %s", why, snapshot.name)
                snapshots.set_aside(path)
            return about, state
        found = "; ".join(map(str, damaged.values())) or f"{self.folder} holds no snapshot"
        raise CorruptLog(f"{found}. Resume the run from a checkpoint (path=...)")

    def _check_covers(self, about: About) -> None:
        """
        Raises:
            CorruptLog: the log has not all that comes after that snapshot.
        """
        if not self.log.start <= about.position <= self.log.end:
            raise CorruptLog(
                f"the log in {self.folder} covers bytes {self.log.start:,} to {self.log.end:,}; "
                f"the snapshot before operation {about.next_seq_id} goes on at {about.position:,}"
            )

    def write(self, record: Record) -> int:
        """Write a record after all before it; returns its position.

        Raises:
            InvalidInput: it is too large.
            StorageFailure: it could not be written.
            Unavailable: another process has taken the log.
        """
        while self._behind:
            self.log.append(self._behind[0].encode())
            del self._behind[0]
        payload = record.encode()
        self.seconds += len(payload) / READ_BYTES_PER_SECOND
        return self.log.append(payload)

    def write_later(self, record: Record) -> None:
        """Write a record if that can be done now, or else before the next one."""
        try:
            self.write(record)
        except (StorageFailure, Unavailable) as error:
            self._behind.append(record)
            logger.warning("%s", error)

    def write_result(self, record: Record) -> None:
        """Write what became of an operation, and keep it for the next snapshots."""
        self.write_later(record)
        self.keep(record)

    def keep(self, record: Record) -> None:
        self._results[record.seq_id] = record
        self._result_bytes += len(bytes(record.body))
        while self._result_bytes > SNAPSHOT_RESULT_BYTES or len(self._results) > SNAPSHOT_RESULTS:
            self.forget_result(next(iter(self._results)))

    def forget_result(self, seq_id: int) -> None:
        """Of an operation: it is in no later snapshot."""
        record = self._results.pop(seq_id, None)
        if record is not None:
            self._result_bytes -= len(bytes(record.body))

    def results(self, before: int) -> list[Record]:
        """The newest of operations with lower numbers."""
        return [record for seq_id, record in self._results.items() if seq_id < before]

    def on_disk(self) -> Future[None]:
        """Done once all that was written is on disk."""
        return self.log.synced()

    def took(self, seconds: float) -> None:
        """An operation that replay would do again took so long."""
        self.seconds += seconds
        self._longest = max(self._longest, seconds)

    @property
    def due(self) -> bool:
        """Whether a snapshot is: with one more operation replay could take too long."""
        another = min(self._longest, self.replay_seconds / 2)
        return self.seconds + another > self.replay_seconds

    def save(self, about: About, state: dict[str, Tensor]) -> None:
        """Write a snapshot, and delete what neither it nor the one before needs.

        Raises:
            StorageFailure: it could not be written; what there was stays.
            Unavailable: another process has taken the log.
        """
        self.log.claim.check()
        snapshots.write(self.folder, about, state)
        self.log.trim(self._earlier)
        self._earlier = about.position

    def close(self) -> None:
        """Wait until all is on disk."""
        self.log.close()

    def delete(self) -> None:
        """Close it, and delete the run's log and snapshots."""
        self.log.close()
        shutil.rmtree(self.folder, ignore_errors=True)
