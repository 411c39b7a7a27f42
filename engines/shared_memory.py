"""Parameters that other processes of this machine read where they are, without a copy."""

from __future__ import annotations

import mmap
import os
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class SharedArray:
    """A float32 array in memory without a name, which goes when the last process lets go of it.

    Attributes:
        file: its descriptor in this process.
        values: the array.
    """

    file: int
    values: np.ndarray

    @classmethod
    def empty(cls, size: int) -> SharedArray:
        file = os.memfd_create("tinsmith")  # not /dev/shm, which containers keep small
        os.truncate(file, 4 * size)
        return cls(file, np.frombuffer(mmap.mmap(file, 4 * size), np.float32))

    @property
    def path(self) -> str:
        """By which another process opens it; for as long as this one has it."""
        return f"/proc/{os.getpid()}/fd/{self.file}"

    def __del__(self) -> None:
        os.close(self.file)


def open_shared(path: str) -> memoryview:
    """The bytes of a `SharedArray`, here. They must not be written."""
    with open(path, "r+b") as file:  # what is mapped to be read only, torch warns of
        return _mapped(file.fileno(), os.fstat(file.fileno()).st_ino)


_recent: OrderedDict[int, memoryview] = OrderedDict()  # by inode


def _mapped(file: int, inode: int) -> memoryview:
    """The last two are kept: mapping takes longer than reading, and a run's versions take turns
    between two."""
    if inode not in _recent:
        _recent[inode] = memoryview(mmap.mmap(file, 0))
    _recent.move_to_end(inode)
    if len(_recent) > 2:
        _recent.popitem(last=False)
    return _recent[inode]


class SharedArrays:
    """Hands out shared arrays. Memory that was in use before is several times as fast to fill as
    new memory, whose pages the system has to find first: one array that came back is kept."""

    def __init__(self) -> None:
        self._spare: SharedArray | None = None

    def take(self, values: np.ndarray) -> SharedArray:
        """One with these values."""
        spare, self._spare = self._spare, None
        if spare is None or spare.values.shape != values.shape:
            spare = SharedArray.empty(values.size)
        np.copyto(spare.values, values)
        return spare

    def give_back(self, array: SharedArray) -> None:
        """Nobody reads it any more."""
        self._spare = array
