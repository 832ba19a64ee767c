"""A fork that a child survives: it never frees what libraries with threads of their own left in the parent."""

from __future__ import annotations

import gc
import os


def fork() -> int:
    """``os.fork`` behind a garbage collection, with what is left set aside in the child.

    Sessions of ONNX Runtime have threads, which a child does not inherit. A collection in the child that finds a session of an earlier
    test in a cycle would wait in its destructor for threads that are not there, for ever.
    """
    gc.collect()
    gc.freeze()
    pid = os.fork()
    if pid:
        gc.unfreeze()
    return pid
