"""Wall and core time by phase, and peak memory beside what was there before."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Meter:
    """What is measured from when it is made.

    Attributes: ``seconds`` by phase, ``core_seconds`` by phase of all threads together; ``peak_bytes`` beside what the process held
    before.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.core_seconds: dict[str, float] = {}
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts from here
        self._before = _status("VmRSS")
        self._busy = _cpu()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time inside to phase `name`."""
        start, used = time.perf_counter(), time.process_time()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        self.core_seconds[name] = self.core_seconds.get(name, 0.0) + time.process_time() - used

    @property
    def peak_bytes(self) -> int:
        return _status("VmHWM") - self._before

    @property
    def others(self) -> float:
        """Cores that other processes used meanwhile, on average: figures mean something where this is close to 0."""
        wall, busy, own = (after - before for after, before in zip(_cpu(), self._busy, strict=True))
        return max(0.0, busy - own) / wall


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def _cpu() -> tuple[float, float, float]:
    """Now, seconds of all cores that were not idle, seconds of this process."""
    user, nice, system, _idle, _wait, interrupt, soft, steal = map(int, Path("/proc/stat").read_text().split(None, 9)[1:9])
    return time.perf_counter(), (user + nice + system + interrupt + soft + steal) / 100, time.process_time()
