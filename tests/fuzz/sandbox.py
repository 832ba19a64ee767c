"""Runs a case under watch: only our errors come out, no file outside is touched, memory and CPU time stay bounded."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ecmfq_export
from ecmfq_export.errors import UserError

MEMORY = 3 << 29
"""Bytes of address space that a case may add to what the process has: far above any tiny model's needs."""
CPU_SECONDS, REAL_SECONDS = 20, 300
"""A case takes milliseconds; this is what counts as a hang."""

_LIBRARIES = tuple(os.path.realpath(path) + "/" for path in {
    *sysconfig.get_paths().values(), *(p for p in sys.path if p and Path(p).is_dir()), *ecmfq_export.__path__, sys.prefix,
    sys.base_prefix, "/proc", "/sys", "/dev", "/usr/share", "/usr/lib", "/lib", "/etc/ssl",
} if os.path.realpath(path) != "/")  # fmt: skip
_WRITES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.chmod", "os.chown",
           "shutil.rmtree", "shutil.copyfile", "shutil.move", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn",
           "socket.connect", "ctypes.dlopen"}  # fmt: skip

_root: str | None = None
_seen: list[str] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _root is None:
        return
    if event == "open":
        name, mode, flags = arguments
        if isinstance(name, int):
            return
        path = os.path.realpath(os.fsdecode(name)) if isinstance(name, str | bytes | os.PathLike) else str(name)
        wrote = (isinstance(mode, str) and any(c in mode for c in "wax+")) or (
            isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if wrote or not path.startswith((_root, *_LIBRARIES)):
            _seen.append(f"{'write' if wrote else 'read'} {path}")
    elif event in _WRITES:
        _seen.append(f"{event} {arguments[:2]}")


_hooked = False


class Hang(BaseException):
    """Not an Exception, so that no handler of the code under test can take it for an error of a library."""


def _too_long(signum: int, frame: Any) -> None:
    raise Hang(f"no end after {CPU_SECONDS} s of CPU or {REAL_SECONDS} s in all")


@contextlib.contextmanager
def watched(root: Path) -> Iterator[list[str]]:
    """Within it files outside `root` and Python's own are noted, memory and time are limited."""
    global _root, _hooked
    if not _hooked:
        sys.addaudithook(_hook)  # stays for the process's life; it does nothing while _root is None
        _hooked = True
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    old = [signal.signal(number, _too_long) for number in (signal.SIGPROF, signal.SIGALRM)]
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    signal.setitimer(signal.ITIMER_REAL, REAL_SECONDS)
    _seen.clear()
    _root = os.path.realpath(root) + "/"
    try:
        yield _seen
    finally:
        _root = None
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        for number, handler in zip((signal.SIGPROF, signal.SIGALRM), old, strict=True):
            signal.signal(number, handler)


def outcome(root: Path, read: Callable[[], object]) -> UserError | None:
    """Run `read`; the UserError it ends with, or None where it took what it was given.

    Raises:
        AssertionError: any other end, or a file touched outside.
    """
    with watched(root) as seen:
        try:
            read()
            error = None
        except UserError as caught:
            error = caught
        except (Exception, Hang) as caught:
            raise AssertionError(f"{type(caught).__name__}: {str(caught)[:500]}") from caught
        except BaseException as caught:
            # A panic of a Rust library is no Exception.
            if type(caught).__name__ != "PanicException":
                raise
            raise AssertionError(f"{type(caught).__name__}: {str(caught)[:500]}") from caught
    assert not seen, f"files outside: {seen[:3]}"
    if error is not None:
        str(error).encode("utf-8", "backslashreplace")
        assert len(str(error)) < 20_000, "a message nobody reads"
    return error
