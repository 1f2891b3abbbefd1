"""The memory allocator of a training process."""

from __future__ import annotations

import ctypes
import platform

# Parameters of glibc's mallopt (malloc.h).
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4


def keep_freed_memory() -> None:
    """Let this process keep the memory it frees; call it before the first tensor.

    Every step allocates and frees the same large tensors. glibc hands them back to the system each
    time and gets pages that must be cleared again, which takes a third of a training step on two cores.
    A setting of the whole process: for programs, not for libraries. Does nothing where there is no glibc.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)
