"""The Python module that builds and runs a target's engines: ``tensorrt_rtx`` or ``tensorrt``, imported when used.

Both have the same shape, so one builder and one runner serve; this file holds what differs in getting them.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

from ecmfq_export.engine.soname_shim import provide_unversioned_name
from ecmfq_export.errors import BuildError
from ecmfq_export.target import EngineSpec

INSTALL = {
    "tensorrt_rtx": "pip install 'tensorrt-rtx~=1.7.1'",
    "tensorrt": "on a Jetson: apt install python3-libnvinfer (part of JetPack) and use a venv with --system-site-packages; "
                "elsewhere: pip install tensorrt",
}
# What TensorRT says of a machine without a driver while it builds for another one. Not a cause of anything.
_NO_DRIVER = re.compile(r"CUDA (driver version is insufficient|initialization failure)|cudaError 35")


def load_module(engine: EngineSpec) -> ModuleType:
    """Import the target's module and check its version.

    Raises:
        BuildError: not installed, not loadable, or of a version that the target does not admit.
    """
    try:
        module = importlib.import_module(engine.runtime)
        version = module.__version__
    except (ImportError, AttributeError, OSError) as error:
        raise BuildError(f"the Python package '{engine.runtime}' cannot be imported: {error}", INSTALL[engine.runtime]) from error
    if not _admits(engine, version):
        raise BuildError(f"{engine.runtime} is version {version}; the target takes {engine.min_version} to {engine.max_version}.x",
                         INSTALL[engine.runtime])
    if engine.runtime == "tensorrt_rtx":
        provide_unversioned_name()
    return module


def _admits(engine: EngineSpec, version: str) -> bool:
    def parts(text: str) -> list[int]:
        return [int(part) for part in re.findall(r"\d+", text)]

    seen, low, high = parts(version), parts(engine.min_version), parts(engine.max_version)
    return seen[: len(low)] >= low and seen[: len(high)] <= high


def clean(message: str) -> str:
    """A message without the lines about the missing driver; empty where nothing else is left."""
    return "\n".join(line for line in message.splitlines() if not _NO_DRIVER.search(line)).strip()


class LogLines:
    """Collects what TensorRT says. ``errors`` are real ones, ``lines`` is everything, as 'SEVERITY text'."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.lines: list[str] = []
        self.errors: list[str] = []
        self._stream = stream

    def add(self, severity: str, message: str) -> None:
        self.lines.append(f"{severity} {message}")
        if severity.endswith("ERROR") and clean(message):
            self.errors.append(message)
        if self._stream is not None and severity != "VERBOSE":
            print(f"{severity} {message}", file=self._stream)

    def find(self, pattern: str) -> int | None:
        """The integer in the last line that matches, None where none does."""
        for line in reversed(self.lines):
            match = re.search(pattern, line)
            if match:
                return int(match[1])
        return None

    def write(self, path: Path) -> None:
        path.write_text("\n".join(self.lines) + "\n", encoding="utf-8")


# TensorRT keeps the first logger of a process for what plugins and global objects say, also after the builder that it was
# given to is gone. So there is one a module, it lives as long as the process, and it fills whichever LogLines is current.
_loggers: dict[str, Any] = {}


def make_logger(module: ModuleType, log: LogLines) -> Any:
    """The process's logger of this module, filling `log` from now on."""
    if module.__name__ not in _loggers:

        class Logger(module.ILogger):  # type: ignore[name-defined,misc]
            def __init__(self) -> None:
                module.ILogger.__init__(self)
                self.sink = log

            def log(self, severity: Any, message: str) -> None:
                self.sink.add(severity.name, message)

        _loggers[module.__name__] = Logger()
    _loggers[module.__name__].sink = log
    return _loggers[module.__name__]
