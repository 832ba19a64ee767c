"""Freed heap memory goes back to the system at once, where the C library can do that (glibc).

Tensors of a few MB come from the heap, not from mappings of their own; when a tower of hundreds of them is dropped, glibc keeps the
holes, and a process that holds nothing still counts gigabytes as resident.
"""

from __future__ import annotations

import ctypes
import gc


def give_back(cycles: bool = True) -> None:
    """Let glibc return whole free pages (``malloc_trim``); nothing where the C library has no such call.

    Args:
        cycles: collect objects that refer to each other first, which takes a fraction of a second in a process with many.
    """
    if cycles:
        gc.collect()
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return
    trim(0)
