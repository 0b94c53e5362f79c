"""Settings of the C library's heap, which it reads when a process starts.

glibc gives large blocks back to the system when they are freed, and every page of the next one
faults anew: that would drown what is measured. This module imports no torch, so that the tool can
start itself again at once.
"""

from __future__ import annotations

import os
import sys

KEPT_HEAP = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
    "MALLOC_TOP_PAD_": str(1 << 28),
}


def heap_is_kept() -> bool:
    """Whether this process was started so that freed memory stays in the heap."""
    return all(os.environ.get(name) == value for name, value in KEPT_HEAP.items())


def keep_heap() -> None:
    """Starts this process anew with these settings, where there is a glibc to read them."""
    if sys.platform == "linux" and not heap_is_kept():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEPT_HEAP)
