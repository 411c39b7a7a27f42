"""The weights that a run published by operations of their own, in a folder beside its log, for samplers
that are started anew. (What every step publishes is the run's state itself.)

They have to outlive processes, not the machine, and are not fsynced: a damaged one is passed over.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

KEPT = 8  # versions that clients were pinned to

logger = logging.getLogger(__name__)


class PublishedWeights:
    """One run's: the last `KEPT` of those that are to be kept, and the newest."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, seq_id: int, version: int, flat: np.ndarray, keep: bool) -> None:
        """What operation `seq_id` publishes; `flat` float32 `[P]`. Where it cannot be written, samplers
        that are started anew will not have it."""
        file = self.folder / f"{seq_id:020d}-{version}-{'kept' if keep else 'newest'}.npy"
        temporary = file.with_name(f".tmp-{file.name}")
        try:
            self.folder.mkdir(exist_ok=True)
            np.save(temporary, flat)
            os.replace(temporary, file)
            for old in self._superseded():
                old.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("version %d is not written beside the log: %s", version, error)

    def _superseded(self) -> list[Path]:
        *before, _ = files = self._files()
        kept = [file for file in files if _told(file)[1]]
        return [file for file in before if file not in kept[-KEPT:]]

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("[0-9]*.npy"))

    def read(self) -> Iterator[tuple[int, np.ndarray, bool]]:
        """Version, parameters, and whether it is to be kept, in the order of their publication."""
        for file in self._files():
            version, keep = _told(file)
            try:
                yield version, np.load(file, allow_pickle=False), keep
            except (OSError, ValueError, EOFError) as error:
                logger.warning("%s cannot be read: %s", file, error)


def _told(file: Path) -> tuple[int, bool]:
    _, version, kind = file.stem.split("-")
    return int(version), kind == "kept"
