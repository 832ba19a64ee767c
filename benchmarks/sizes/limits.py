"""A hard limit on a command's memory, page cache included: a control group that the kernel kills the command in when it needs more.

What stays inside such a limit needs no more memory than that: mapped files and the cache of files that are read and written count too,
though the kernel takes those back before it kills anything.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

V1 = Path("/sys/fs/cgroup/memory")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_size(text: str) -> int:
    """Bytes of ``8G`` and the like.

    Raises:
        SystemExit: another form.
    """
    match = re.fullmatch(r"(\d+)([KMGT]?)", text)
    if match is None:
        raise SystemExit(f"'{text}' is no size; write 8G or 6500M")
    return int(match[1]) * _UNITS[match[2]]


@contextlib.contextmanager
def limited(command: list[str], size: int | None) -> Iterator[tuple[list[str], dict[str, Any]]]:
    """The command that runs `command` within `size` bytes, and a dict that holds what the kernel counted when the block ends.

    Raises:
        SystemExit: this system lets nobody make such a group.
    """
    facts: dict[str, Any] = {}
    if size is None:
        yield command, facts
        return
    facts |= {"memory_max": size}
    if not (V1 / "memory.limit_in_bytes").is_file():
        if shutil.which("systemd-run") is None:
            raise SystemExit("--memory-max needs the memory controller of cgroup v1, or systemd-run")
        user = [] if os.geteuid() == 0 else ["--user"]
        scope = ["systemd-run", *user, "--scope", "--quiet", "-p", f"MemoryMax={size}", "-p", "MemorySwapMax=0"]
        yield [*scope, *command], facts | {"by": "systemd-run"}
        return
    own = next(line.split(":", 2)[2] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.split(":", 2)[1] == "memory")
    group = V1 / own.lstrip("/") / f"ecmfq-sizes-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(size))
    except OSError as error:
        raise SystemExit(f"--memory-max: {error}") from None
    try:
        yield ["/bin/sh", "-c", f'echo $$ > "{group}/cgroup.procs" && exec "$@"', "sh", *command], facts
        facts |= {"by": "cgroup v1", "peak_with_page_cache": int((group / "memory.max_usage_in_bytes").read_text()),
                  "times_at_the_limit": int((group / "memory.failcnt").read_text())}
        killed = re.search(r"oom_kill (\d+)", (group / "memory.oom_control").read_text())
        facts["killed_for_memory"] = int(killed[1]) if killed else None
    finally:
        with contextlib.suppress(OSError):
            group.rmdir()
