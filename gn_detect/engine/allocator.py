"""How the C library treats freed memory during training on a CPU."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of mallopt, in malloc.h
_LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Ask glibc to keep freed blocks for the next activation of the same size.

    By default it returns every large block to the system at once, and each step then faults the same pages in
    again: about a tenth of a CPU training step. This concerns the whole process, so only commands that train
    or evaluate call it.

    Returns:
        Whether the C library took the advice; False on other systems.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library, such as musl
        return False
    return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, _LARGEST))
