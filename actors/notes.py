"""What a process is doing, noted where the end of the process leaves it.

A file of small slots, mapped into memory: to note an operation costs a few microseconds and no
system call, and the pages outlive a `kill -9`. (They do not outlive the machine, whose operations
are in the logs of their runs.)
"""

from __future__ import annotations

import logging
import mmap
import os
import socket
import time
from collections.abc import Iterable
from pathlib import Path

import msgspec

FOLDER = "processes"  # below the home
SLOT = 256
SLOTS = 256  # of operations; more at once are not noted
FREE, UNDER_WAY, IN_PASS = range(3)

logger = logging.getLogger(__name__)


class Doing(msgspec.Struct, frozen=True, omit_defaults=True):
    """An operation under way: `op` is its number in the run's log, or the request's id; `began` in
    Unix seconds. `computing`: the process was computing it, not only holding it."""

    kind: str
    run: str = ""
    op: int | str = 0
    tokens: int = 0
    began: float = 0.0
    computing: bool = False

    def __str__(self) -> str:
        what = self.kind
        if self.op:
            what += f", operation {self.op}" if isinstance(self.op, int) else f", request {self.op}"
        return what + (f" of run {self.run}" if self.run else "")


class Owner(msgspec.Struct, frozen=True):
    """Whose notes they are."""

    process: str
    pid: int
    host: str


class Notes:
    """Written by one process, from any of its threads.

    Args:
        path: the file; None, or where the disk has no room for it: nothing is noted.
        process: what the process is.
    """

    def __init__(self, path: Path | None, process: str) -> None:
        self._map: mmap.mmap | None = None
        self._free = list(range(SLOTS, 0, -1))
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb+") as file:
                # Room for all of it now: of a full disk's hole a mapped page kills who writes to it.
                file.write(bytes(SLOT * (1 + SLOTS)))
                file.flush()
                self._map = mmap.mmap(file.fileno(), 0)
        except OSError as error:
            logger.warning("nothing will be told of what the %s was doing: %s", process, error)
            return
        self._write(0, msgspec.json.encode(Owner(process, os.getpid(), socket.gethostname())))

    def _write(self, slot: int, body: bytes) -> None:
        assert self._map is not None
        at, body = slot * SLOT, body[: SLOT - 3]
        self._map[at + 1 : at + 3 + len(body)] = len(body).to_bytes(2, "little") + body
        self._map[at] = UNDER_WAY  # last: a slot is whole or not there

    def begin(self, kind: str, run: str, op: int | str, tokens: int) -> int:
        """Returns what `end` and `in_pass` call it."""
        if self._map is None or not self._free:
            return 0
        slot = self._free.pop()
        name = op[:64] if isinstance(op, str) else op  # the whole fits into a slot
        doing = Doing(kind[:32], run[:80], name, tokens, round(time.time(), 3))
        self._write(slot, msgspec.json.encode(doing))
        return slot

    def in_pass(self, slots: Iterable[int], computing: bool) -> None:
        """These are being computed just now, or no longer."""
        if self._map is not None:
            for slot in slots:
                if slot and self._map[slot * SLOT] != FREE:
                    self._map[slot * SLOT] = IN_PASS if computing else UNDER_WAY

    def end(self, slot: int) -> None:
        if self._map is not None and slot:
            self._map[slot * SLOT] = FREE
            self._free.append(slot)


def notes_path(home: str, actor: str) -> Path | None:
    """Where an actor, by its id, keeps its notes; None where the home is no folder."""
    return None if "://" in home else Path(home, FOLDER, actor)


def read_notes(path: Path | None) -> tuple[Owner, list[Doing]] | None:
    """Those computing first, then by age; None if there are no notes."""
    try:
        data = path.read_bytes() if path is not None else b""
        if len(data) < SLOT:
            return None
        owner = msgspec.json.decode(_body(data, 0), type=Owner)
        found = []
        for slot in range(1, len(data) // SLOT):
            state = data[slot * SLOT]
            if state != FREE:
                doing = msgspec.json.decode(_body(data, slot), type=Doing)
                found.append(msgspec.structs.replace(doing, computing=state == IN_PASS))
    except (OSError, msgspec.DecodeError):
        return None
    return owner, sorted(found, key=lambda doing: (not doing.computing, doing.began))


def was_doing(path: Path | None, run: str | None, now: float | None = None) -> str:
    """What a process that is gone was doing, for an error that a client of `run` gets: of other
    runs, which may be somebody else's, only how many."""
    noted = read_notes(path)
    if noted is None or not noted[1]:
        return ""
    now = time.time() if now is None else now
    own = [doing for doing in noted[1] if run is not None and doing.run == run]
    told = [f"{doing}, for {now - doing.began:.1f} s" for doing in own[:4]]
    if len(noted[1]) > len(told):
        told.append(f"{len(noted[1]) - len(told)} {'other' if told else 'of other runs'}")
    return f" (it was at: {'; '.join(told)})"


def _body(data: bytes, slot: int) -> bytes:
    at = slot * SLOT
    return data[at + 3 : at + 3 + int.from_bytes(data[at + 1 : at + 3], "little")]
