"""How the C library treats the memory of training steps."""

from __future__ import annotations

import ctypes


def keep_freed_memory() -> None:
    """Let glibc keep what is freed: a step's large tensors otherwise page-fault anew every time."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    except OSError:
        pass  # not glibc: slower, not wrong
