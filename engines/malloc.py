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
    allocations (its bug 14581). Measured: a checkpointed pass of SmolLM2-135M over 8,192 tokens, which
    uses 1.1 GB at once, takes 7.6 GB otherwise, and 1.1 so. The price is a page fault a page.
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
