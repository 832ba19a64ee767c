"""The cross-compiled library and what runs it here; tests that need them skip where Debian's packages are missing, and say which."""

from __future__ import annotations

import functools
import shutil

import pytest

from ecmfq_export.engine.cross_compile import cross_compile, cross_tools
from ecmfq_export.engine.plugin_library import PluginLibrary, host_platform

PLATFORM = "linux-aarch64"
SYSROOT = "/usr/aarch64-linux-gnu"  # the C library that comes with Debian's cross compiler


def require_tools() -> None:
    """Skip the test unless this machine cross-compiles."""
    if host_platform() == PLATFORM:
        pytest.skip("this machine is an aarch64 one: nothing is cross-compiled on it")
    missing = [f"{tool.name} ({tool.install})" for tool in cross_tools(PLATFORM) if not tool.path]
    if missing:
        pytest.skip(f"not on this machine: {', '.join(missing)}")


@functools.cache
def _library() -> PluginLibrary:
    return cross_compile(PLATFORM, (87,))


def library() -> PluginLibrary:
    """The library for Jetson and DGX Spark, compiled once and kept."""
    require_tools()
    return _library()


def emulator() -> list[str]:
    """The command before an aarch64 program; skips where it is missing."""
    require_tools()
    found = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if found is None:
        pytest.skip("not on this machine: qemu-aarch64 (apt-get install qemu-user)")
    return [found, "-L", SYSROOT]
