"""sha256 of files, remembered while a file is the one that was read: a checkpoint is read for its hash once, not once a stage."""

from __future__ import annotations

import contextlib
import contextvars
import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

SMALLEST = 1 << 20
"""Bytes of the smallest file that is remembered; smaller ones are read again, which costs nothing."""

_SETTLED_NS = 2_000_000_000
"""A file that changed so shortly before it was read is not remembered: a second change could leave its times as they were."""

_CHUNK = 1 << 22


def sha256_file(path: Path) -> str:
    """Hex digest of a file's bytes, read in chunks of 4 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


class FileHashes:
    """Remembers hashes under a file's real path, device, inode, size, and times of modification and of change of status.

    The last time cannot be set back by a program, so a file that was written to in any way, or put in another's place, is read again.

    Args:
        kept_in: a JSON file that carries what is known to the next process; None for this process only. What cannot be read in it,
            or not be written to it, is left out: it saves time and decides nothing.
    """

    def __init__(self, kept_in: Path | None = None) -> None:
        self.kept_in = kept_in
        self._known: dict[str, list[int | str]] = {} if kept_in is None else _read(kept_in)

    def sha256(self, path: Path) -> str:
        """Hex digest of a file's bytes; the file is read only where it is not known as it is now."""
        began = time.time_ns()
        status = path.stat()
        if status.st_size < SMALLEST:
            return sha256_file(path)
        name, identity = str(path.resolve()), _identity(status)
        known = self._known.get(name)
        if known is not None and known[:-1] == identity:
            return str(known[-1])
        digest = sha256_file(path)
        if _identity(path.stat()) == identity and began - max(status.st_mtime_ns, status.st_ctime_ns) > _SETTLED_NS:
            self._known[name] = [*identity, digest]
            self._keep()
        return digest

    def _keep(self) -> None:
        if self.kept_in is None:
            return
        temporary = self.kept_in.with_name(f"{self.kept_in.name}.{os.getpid()}.tmp")
        with contextlib.suppress(OSError):
            self.kept_in.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(self._known, indent=1), encoding="utf-8")
            temporary.rename(self.kept_in)


_active: contextvars.ContextVar[FileHashes | None] = contextvars.ContextVar("file_hashes", default=None)


def active() -> FileHashes:
    """What :func:`remembered` opened; outside of it something that remembers nothing beyond one call."""
    return _active.get() or FileHashes()


@contextlib.contextmanager
def remembered(kept_in: Path) -> Iterator[FileHashes]:
    """Inside, every fingerprint is taken through one :class:`FileHashes` that is kept in this file; nesting keeps the outer one."""
    outer = _active.get()
    if outer is not None:
        yield outer
        return
    hashes = FileHashes(kept_in)
    token = _active.set(hashes)
    try:
        yield hashes
    finally:
        _active.reset(token)


def _identity(status: os.stat_result) -> list[int | str]:
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _read(file: Path) -> dict[str, list[int | str]]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(data, dict):
        return {}
    return {name: row for name, row in data.items() if isinstance(row, list) and len(row) == 6 and isinstance(row[-1], str)}
