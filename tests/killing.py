"""Ending a computation by SIGKILL at a chosen moment, in a forked child so that nothing has to be imported again."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable

from tests.forking import fork

_CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir"}


def run_in_child(action: Callable[[], object], kill_at: int = 0, kill_before: str = "") -> tuple[int, int]:
    """Run `action` in a child; its exit code (-9 where it was killed) and how often it changed the file system.

    Args:
        kill_at: the change at which the child is killed, before it happens, counted from 1; 0 lets it end.
        kill_before: a path whose coming into being by a rename kills the child, before it happens.
    """
    reading, writing = os.pipe()
    pid = fork()
    if pid == 0:
        os.close(reading)
        count = 0

        def watch(event: str, arguments: tuple) -> None:
            nonlocal count
            opened = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if opened or event in _CHANGES:
                count += 1
                named = event == "os.rename" and kill_before and os.fspath(arguments[1]) == kill_before
                if count == kill_at or named:
                    os.kill(os.getpid(), signal.SIGKILL)

        code = 1
        try:
            sys.addaudithook(watch)
            action()
            code = 0
            os.write(writing, count.to_bytes(8, "little"))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        count = int.from_bytes(stream.read(), "little")
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), count
