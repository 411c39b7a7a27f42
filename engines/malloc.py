"""The C library's allocator, where a pass should take no more memory than it must."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

M_MMAP_THRESHOLD = -3  # of <malloc.h>
KEPT_BYTES, FRUGAL_BYTES = 32 << 20, 1 << 20


@contextmanager
def frugal(wanted: bool = True) -> Iterator[None]:
    """Blocks of a megabyte and more that are freed meanwhile go back to the system.

    glibc keeps them otherwise, and before 2.38 hardly finds them again for torch's aligned
    allocations (its bug 14581): a checkpointed pass of 3,000 rows over 8 layers takes 830 MB where
    240 are in use at once, and so 400, for a page fault a page.
    """
    if not wanted or platform.libc_ver()[0] != "glibc":
        yield
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(M_MMAP_THRESHOLD, FRUGAL_BYTES)
    try:
        yield
    finally:
        mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
