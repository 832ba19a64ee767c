"""Make ``libtensorrt_rtx.so`` resolvable in this process, without a compiler and without restarting it.

The ONNX parser of PyPI's tensorrt-rtx 1.7 opens the unversioned name ``libtensorrt_rtx.so``, which the wheel does not carry
(it has ``libtensorrt_rtx.so.1``); without it the process aborts as soon as a plugin node is parsed. The dynamic loader takes
an object that is already loaded for any name that equals its SONAME, so it is enough to load, once, an empty shared object
that is called ``libtensorrt_rtx.so`` and needs ``libtensorrt_rtx.so.1``: symbols are then found through its dependency.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct

from ecmfq_export.errors import BuildError

UNVERSIONED = "libtensorrt_rtx.so"
VERSIONED = "libtensorrt_rtx.so.1"

_MACHINES = {"x86_64": 62, "aarch64": 183}  # e_machine
_BASE = 0  # a shared object is linked at address 0
_ELF_HEADER, _PROGRAM_HEADER, _SYMBOL = 64, 56, 24
_PAGE = 0x10000  # aarch64 kernels may have pages of 64 KiB

# One handle for the life of the process: unloading it would take the name away again.
_handle: ctypes.CDLL | None = None


def alias_object(soname: str, needed: str, machine: str) -> bytes:
    """An ELF64 shared object with a SONAME, one NEEDED entry and nothing else.

    Args:
        soname: the name the loader shall know it by.
        needed: the library whose symbols it stands for.
        machine: ``x86_64`` or ``aarch64``.

    Returns:
        the file's bytes, about 500.

    Raises:
        BuildError: another machine.
    """
    if machine not in _MACHINES:
        raise BuildError(f"no shared object can be written for a machine '{machine}'", f"known: {', '.join(_MACHINES)}")
    strings = b"\0" + soname.encode() + b"\0" + needed.encode() + b"\0"
    soname_at, needed_at = 1, 2 + len(soname.encode())
    dynamic_at = _ELF_HEADER + 2 * _PROGRAM_HEADER
    num_entries = 8
    hash_at = dynamic_at + 16 * num_entries
    symbols_at = hash_at + 20  # nbucket, nchain, one bucket, one chain, padding to 8
    symbols_at += -symbols_at % 8
    strings_at = symbols_at + _SYMBOL
    total = strings_at + len(strings)

    dynamic = [(1, needed_at), (14, soname_at), (4, hash_at), (5, strings_at), (6, symbols_at), (10, len(strings)), (11, _SYMBOL),
               (0, 0)]  # NEEDED, SONAME, HASH, STRTAB, SYMTAB, STRSZ, SYMENT, NULL
    assert len(dynamic) == num_entries
    header = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 3, _MACHINES[machine], 1, 0, _ELF_HEADER, 0, 0, _ELF_HEADER, _PROGRAM_HEADER, 2,
                          64, 0, 0)
    # Writable: the loader relocates the addresses in the dynamic section in place.
    load = struct.pack("<IIQQQQQQ", 1, 6, 0, _BASE, _BASE, total, total, _PAGE)
    dynamic_header = struct.pack("<IIQQQQQQ", 2, 6, dynamic_at, dynamic_at, dynamic_at, 16 * num_entries, 16 * num_entries, 8)
    body = b"".join(struct.pack("<QQ", tag, value) for tag, value in dynamic)
    hashes = struct.pack("<IIII", 1, 1, 0, 0)
    out = header + load + dynamic_header + body + hashes
    out += bytes(symbols_at - len(out)) + bytes(_SYMBOL) + strings
    assert len(out) == total
    return out


def provide_unversioned_name() -> None:
    """Load the alias once. Call it after ``import tensorrt_rtx`` (which loads the versioned library).

    Raises:
        BuildError: the versioned library is not loaded, or the loader refused the alias.
    """
    global _handle
    if _handle is not None or _is_loaded(UNVERSIONED):
        return
    if not _is_loaded(VERSIONED):
        raise BuildError(f"{VERSIONED} is not loaded in this process", "import tensorrt_rtx first")
    descriptor = os.memfd_create(UNVERSIONED)
    try:
        os.write(descriptor, alias_object(UNVERSIONED, VERSIONED, platform.machine()))
        _handle = ctypes.CDLL(f"/proc/self/fd/{descriptor}")
    except OSError as error:
        raise BuildError(f"the loader refused an alias of {VERSIONED}: {error}",
                         f"put a symlink {UNVERSIONED} to it in a directory on LD_LIBRARY_PATH") from error
    finally:
        os.close(descriptor)


def _is_loaded(name: str) -> bool:
    try:
        ctypes.CDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
    except OSError:
        return False
    return True
