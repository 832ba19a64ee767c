"""The plugin library, ``libecmfq_plugin.so``: where it is, what it holds, and whether it is the one a bundle was made with."""

from __future__ import annotations

import ctypes
import hashlib
import platform
import re
import struct
from dataclasses import dataclass
from pathlib import Path

from ecmfq_export.compiled_library import find_library
from ecmfq_export.errors import BuildError

LIBRARY_NAME = "libecmfq_plugin.so"
LOCAL_LIBRARY_NAME = "libecmfq_plugin.local.so"
"""In an engine folder: compiled on the device itself, and taken before the one that the bundle brought."""
ABI_VERSION = 1  # ECMFQ_ABI_VERSION of plugins/capi/ecmfq.h
_INSTALL = "pip install . (compiles it), or: cmake -S plugins -B build/plugins -G Ninja && cmake --build build/plugins"

_ELF_PLATFORMS = {62: "linux-x86_64", 183: "linux-aarch64"}  # e_machine
_BUILD_INFO = re.compile(rb"ecmfq-build cuda=(\d+) ")
_GLIBC = re.compile(rb"\0GLIBC_(\d+)\.(\d+)(?=\0)")
_FATBIN_MAGIC = struct.pack("<I", 0xBA55ED50)


@dataclass(frozen=True)
class PluginLibrary:
    """What a library file is.

    Attributes:
        path: the file.
        sha256: of its bytes, hexadecimal.
        bytes: its size.
        platform: ``linux-x86_64`` or ``linux-aarch64``.
        compute_capabilities: SM versions that it holds machine code for, ascending.
        cuda: version of the CUDA compiler, e.g. ``13.0``; a driver of an older major version loads none of the kernels. Empty where
            the library does not say.
        glibc: the oldest C library that it loads with, e.g. ``2.35``; empty where it needs none.
    """

    path: Path
    sha256: str
    bytes: int
    platform: str
    compute_capabilities: tuple[int, ...]
    cuda: str = ""
    glibc: str = ""


def find_plugin_library() -> Path:
    """The library of this installation.

    Raises:
        BuildError: there is none.
    """
    return find_library(LIBRARY_NAME, "plugin library", _INSTALL)


def read_plugin_library(path: Path) -> PluginLibrary:
    """Facts about a library, read from its bytes; nothing of it is run.

    Raises:
        BuildError: no such file, or not a shared object for a platform that is known.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BuildError(f"the plugin library cannot be read: {error}", _INSTALL) from error
    machine = struct.unpack_from("<H", data, 18)[0] if len(data) >= 64 and data[:5] == b"\x7fELF\x02" else -1
    if machine not in _ELF_PLATFORMS:
        raise BuildError(f"{path} is not a 64-bit shared object for {' or '.join(_ELF_PLATFORMS.values())}", _INSTALL)
    return PluginLibrary(path, hashlib.sha256(data).hexdigest(), len(data), _ELF_PLATFORMS[machine], _cubin_archs(data),
                         _cuda_version(data), _glibc_version(data))


def check_plugin_library(path: Path, sha256: str | None = None) -> PluginLibrary:
    """A library that this process can load and that speaks this version's ABI.

    Args:
        path: the file.
        sha256: what a bundle's manifest says of it; None: not checked.

    Raises:
        BuildError: missing, damaged, changed since the bundle was made, for another platform, or of another ABI version.
    """
    library = read_plugin_library(path)
    if sha256 is not None and library.sha256 != sha256:
        raise BuildError(f"{path}: sha256 is {library.sha256}, the manifest says {sha256}",
                         "the file was changed after the bundle was made; build the engines again")
    if library.platform != host_platform():
        raise BuildError(f"{path} is for {library.platform}, this machine is {host_platform()}", "run 'pip install .' on this machine")
    handle = load_plugin_library(path)
    handle.ecmfq_abi_version.restype = ctypes.c_uint32
    if handle.ecmfq_abi_version() != ABI_VERSION:
        raise BuildError(f"{path} has ABI version {handle.ecmfq_abi_version()}, this version of ecmfq-export needs {ABI_VERSION}",
                         _INSTALL)
    return library


def load_plugin_library(path: Path) -> ctypes.CDLL:
    """dlopen it. It depends on the CUDA driver only when a kernel is launched, so this works without a GPU.

    Raises:
        BuildError: the loader's message.
    """
    try:
        handle = ctypes.CDLL(str(path.resolve()))
        handle.ecmfq_abi_version, handle.getCreators  # noqa: B018  (AttributeError where a symbol is missing)
    except (OSError, AttributeError) as error:
        raise BuildError(f"{path} cannot be loaded as a plugin library: {error}", _INSTALL) from error
    return handle


def host_platform() -> str:
    """This machine's platform as targets name it, e.g. ``linux-x86_64``."""
    return f"linux-{platform.machine()}"


def _cuda_version(data: bytes) -> str:
    """Of the constant ``ecmfq_build_info``: 13000 is 13.0."""
    match = _BUILD_INFO.search(data)
    number = int(match[1]) if match else 0
    return f"{number // 1000}.{number % 1000 // 10}" if number else ""


def _glibc_version(data: bytes) -> str:
    """The newest symbol version of the C library among the names in the string table."""
    seen = [(int(major), int(minor)) for major, minor in _GLIBC.findall(data)]
    return ".".join(map(str, max(seen))) if seen else ""


def _cubin_archs(data: bytes) -> tuple[int, ...]:
    """SM versions of the machine code in every CUDA fat binary of an object.

    A fat binary is magic, u16 version, u16 header size, u64 size of what follows; then entries of u16 kind (2: machine code),
    u16 version, u32 header size, u64 payload size, ..., and the SM version as u32 at byte 28.
    """
    found: set[int] = set()
    start = data.find(_FATBIN_MAGIC)
    while start >= 0:
        _, _, header, size = struct.unpack_from("<IHHQ", data, start)
        at, end = start + header, start + header + size
        if end > len(data) or header < 16:
            start = data.find(_FATBIN_MAGIC, start + 4)  # the same four bytes by chance
            continue
        while at + 32 <= end:
            kind, _, entry_header, payload = struct.unpack_from("<HHIQ", data, at)
            if entry_header < 32:
                break
            if kind == 2:
                found.add(struct.unpack_from("<I", data, at + 28)[0])
            at += entry_header + payload
        start = data.find(_FATBIN_MAGIC, end)
    return tuple(sorted(found))
