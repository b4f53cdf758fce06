"""How the process allocates memory."""

import ctypes
import platform


def keep_freed_memory() -> None:
    """Has glibc keep freed memory, for the whole process.

    By default, large blocks and the end of the heap go back to the system, which fills them with zeros page by page
    each time they are allocated again.
    """
    if platform.libc_ver()[0] == "glibc":
        mmap_max, trim_threshold = -4, -1  # malloc.h: M_MMAP_MAX, M_TRIM_THRESHOLD
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
