"""Keep freed memory in the process: by default glibc returns large tensors to the kernel each time.

On a CPU, convolutional networks then spend most of their time in page faults. The CLI, the
benchmarks and the data workers call :func:`keep_memory` once; ``XATTN_ALLOCATOR=system`` opts out.
"""

from __future__ import annotations

import ctypes
import os
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def keep_memory(threshold: int = 1 << 30) -> bool:
    """Raise glibc's mmap and trim thresholds to ``threshold`` bytes; False where it has no effect."""
    if os.environ.get("XATTN_ALLOCATOR") == "system" or platform.libc_ver()[0] != "glibc":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    # Older glibc refuses an mmap threshold above 32 MiB.
    mmap = mallopt(M_MMAP_THRESHOLD, threshold) or mallopt(M_MMAP_THRESHOLD, 1 << 25)
    trim = mallopt(M_TRIM_THRESHOLD, threshold)
    return bool(mmap and trim)
