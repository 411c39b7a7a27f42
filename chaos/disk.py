"""A small file system of its own for a service's home, which can be full."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

SIZE = 1 << 30  # bytes; no memory is taken for what is not written


class Disk:
    """A tmpfs at `folder`, where this user may mount one (`there`), else that folder as it is."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.there = False

    def __enter__(self) -> Disk:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.there = self._mount("-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs")
        return self

    def __exit__(self, *exc: object) -> None:
        if self.there:
            # Lazily: processes that are on their way out may have files open.
            subprocess.run(["umount", "-l", str(self.folder)], check=True)

    def fill(self) -> None:
        """From now on no file can take another block."""
        self._resize(self._used())

    def empty(self) -> None:
        self._resize(SIZE)

    def _resize(self, size: int) -> None:
        # What was written meanwhile makes the size too small to be taken: again with what it is then.
        for _ in range(100):
            if self._mount("-o", f"remount,size={size}"):
                return
            size = max(size, self._used())
        raise OSError(f"{self.folder} cannot be given {size} bytes")

    def _used(self) -> int:
        state = os.statvfs(self.folder)
        return (state.f_blocks - state.f_bfree) * state.f_frsize

    def _mount(self, *options: str) -> bool:
        done = subprocess.run(
            ["mount", *options, str(self.folder)], capture_output=True, check=False
        )
        return done.returncode == 0
