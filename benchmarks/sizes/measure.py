"""Run a command and watch it: seconds, CPU seconds and peak memory, whole and by stage of the bundle that it writes."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STAGES = {"rotated": "rotate", "calibration": "calibrate", "smoothing": "smooth", "quantized": "quantize", "onnx": "export graphs",
          "report": "validate"}
_TICK = os.sysconf("SC_CLK_TCK")
_POLL_SECONDS = 0.1


@dataclass
class StageCost:
    """What one stage took.

    Attributes:
        seconds: wall time; cpu_seconds: user and system time of the process and its children.
        peak_bytes: largest resident memory that the kernel saw (VmHWM).
        anonymous_bytes: largest resident memory that belongs to no file, as far as polling saw it.
    """

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_bytes: int = 0
    anonymous_bytes: int = 0


@dataclass
class Cost:
    """What the command took: ``whole``, and one entry a stage in the order in which they ran."""

    returncode: int
    whole: StageCost
    stages: dict[str, StageCost] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {"whole": vars(self.whole), "stages": {name: vars(cost) for name, cost in self.stages.items()}}


def running_stage(bundle: Path | None) -> str:
    """The stage whose working directory is there."""
    if bundle is None:
        return "run"
    for directory in (bundle / "stages", bundle, bundle / "engines"):
        for partial in sorted(directory.glob(".*.partial")):
            name = partial.name[1:].removesuffix(".partial")
            return STAGES.get(name, "build engines")
    return "between stages"


def _status(pid: int) -> dict[str, int]:
    fields = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("VmHWM", "VmRSS", "RssAnon"):
            fields[name] = int(value.split()[0]) * 1024
    return fields


def _cpu_seconds(pid: int) -> float:
    text = Path(f"/proc/{pid}/stat").read_text()
    parts = text[text.rindex(")") + 2 :].split()
    return sum(int(value) for value in parts[11:15]) / _TICK


def run_measured(command: list[str], log: Path, bundle: Path | None = None, environment: dict[str, str] | None = None) -> Cost:
    """Run `command`, its output to `log`; `bundle` tells the stages apart by their working directories."""
    started = time.perf_counter()
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
        cost = Cost(0, StageCost())
        watcher = threading.Thread(target=_watch, args=(process.pid, bundle, cost), daemon=True)
        watcher.start()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = cost.returncode = os.waitstatus_to_exitcode(status)
    watcher.join()
    cost.whole.seconds = time.perf_counter() - started
    cost.whole.cpu_seconds = usage.ru_utime + usage.ru_stime
    cost.whole.peak_bytes = max([usage.ru_maxrss * 1024, *(stage.peak_bytes for stage in cost.stages.values())])
    cost.whole.anonymous_bytes = max((stage.anonymous_bytes for stage in cost.stages.values()), default=0)
    return cost


def _watch(pid: int, bundle: Path | None, cost: Cost) -> None:
    stage, began, cpu = running_stage(bundle), time.perf_counter(), 0.0
    while True:
        try:
            now, memory, used = running_stage(bundle), _status(pid), _cpu_seconds(pid)
        except (OSError, ValueError):
            return
        if not memory:  # a zombie has none
            return
        entry = cost.stages.setdefault(stage, StageCost())
        entry.peak_bytes = max(entry.peak_bytes, memory.get("VmHWM", 0))
        entry.anonymous_bytes = max(entry.anonymous_bytes, memory.get("RssAnon", 0))
        moment = time.perf_counter()
        entry.seconds += moment - began
        entry.cpu_seconds += used - cpu
        began, cpu = moment, used
        if now != stage:
            stage = now
            # The kernel's high-water mark starts again with the stage.
            Path(f"/proc/{pid}/clear_refs").write_text("5")
        time.sleep(_POLL_SECONDS)
