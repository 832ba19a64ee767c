"""Read an engine file back: what is really in it, by its own bytes.

A TensorRT-RTX engine cannot be deserialized without a GPU, so a machine that builds one ahead of time has only its bytes to
check. The layout below was found by comparing engines of TensorRT-RTX 1.7.1 (it is not documented) and is verified on
reading: whatever does not hold is an error, never a guess.

    0   "vtrt"                         16  size of the file, u64
    24  version, four bytes            32  capability mask, u64, one bit per SM of ``_MASK_BITS``
    64  section table: u32 tag (reversed), u32 0, u64 offset, u64 size; PLGN embedded plugin library, ENGN, WGHT weights

Inside ENGN every value is tagged: a string is 0c 80 01 00, u64 length, bytes; an int32 is 07 80 01 00, value; a byte array is
01 80 03 80 01 00, u64 length, bytes. A plugin layer is: layer name, unique name, tensors, plugin name, version, namespace,
number of fields, fields (name, length, type name, bytes), "V3ONE".
"""

from __future__ import annotations

import hashlib
import mmap
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path

from ecmfq_export.errors import BuildError

PLUGIN_NAME = "EcmfqRoutedMoE"

_MASK_BITS = (75, 80, 86, 89, 120, 121)
_TABLE = 64
_MAX_IO = 4096
_STRING = b"\x0c\x80\x01\x00"
_STRING_HEAD = re.compile(rb"\x13\x80\x01\x00(.{8})\x01\x80\x0c\x80\x01\x00\1", re.DOTALL)
_INT = b"\x07\x80\x01\x00"
_BYTES = b"\x01\x80\x03\x80\x01\x00"
_V3_MARK = _STRING + struct.pack("<Q", 5) + b"V3ONE"
_REBUILD = "build the engine again"


@dataclass(frozen=True)
class PluginNode:
    """One plugin layer of an engine: the layer's name, the plugin, and its serialized int32 fields."""

    layer: str
    plugin: str
    version: str
    namespace: str
    fields: dict[str, int]


@dataclass(frozen=True)
class EngineInfo:
    """What an engine file holds, JSON-able with :func:`dataclasses.asdict`.

    Attributes:
        path: file name, without its folder.
        bytes, sha256: of the whole file.
        runtime: ``tensorrt_rtx`` or ``tensorrt``.
        runtime_version: of the builder, e.g. ``1.7.1.116``.
        compute_capabilities: SM versions that it runs on.
        sections: bytes of each section (weights: ``WGHT``).
        io_names: network inputs and outputs, in order.
        plugin_nodes: every plugin layer whose record was read.
        num_custom_layers: plugin layers of any kind, counted apart from the records.
        plugin_library_sha256: of the library embedded in the engine; empty where none is.
        build: what only the build knew (seconds, scratch memory, I/O shapes); empty when read from a file alone.
    """

    path: str
    bytes: int
    sha256: str
    runtime: str
    runtime_version: str
    compute_capabilities: tuple[int, ...]
    sections: dict[str, int]
    io_names: tuple[str, ...]
    plugin_nodes: tuple[PluginNode, ...]
    num_custom_layers: int
    plugin_library_sha256: str
    build: dict[str, object] = field(default_factory=dict)


def read_engine_file(path: Path) -> EngineInfo:
    """Read a TensorRT-RTX engine. Its weights are mapped, not loaded.

    Raises:
        BuildError: not such an engine, truncated, or of a layout that this version cannot read.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            if size < _TABLE + 24 or file.read(4) != b"vtrt":
                raise BuildError(f"{path} is no TensorRT-RTX engine ({size} bytes)",
                                 "a TensorRT engine can only be read on its own device, with that version of TensorRT")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _read(path, data, size)
    except (OSError, struct.error) as error:
        raise BuildError(f"the engine cannot be read: {error}", _REBUILD) from error


def expect_plugin_nodes(info: EngineInfo, count: int, plugin: str = PLUGIN_NAME) -> None:
    """Check that the engine holds exactly `count` layers of our plugin, and no layer of another.

    Raises:
        BuildError: another number; with the layers that were found.
    """
    found = [node for node in info.plugin_nodes if node.plugin == plugin]
    if len(found) != count or info.num_custom_layers != count:
        layers = ", ".join(node.layer for node in found) or "none"
        raise BuildError(f"{info.path} holds {len(found)} {plugin} layers of {info.num_custom_layers} plugin layers, expected "
                         f"{count}; found: {layers}", "build with -v and look for the missing layer in the build log")


def _read(path: Path, data: mmap.mmap, size: int) -> EngineInfo:
    claimed = struct.unpack_from("<Q", data, 16)[0]
    if claimed != size:
        raise BuildError(f"{path} has {size} bytes, its header says {claimed}: it is truncated or damaged", _REBUILD)
    sections = _sections(path, data, size)
    if "ENGN" not in sections:
        raise _unknown(path, f"no ENGN section among {sorted(sections)}")
    mask = struct.unpack_from("<Q", data, 32)[0]
    if mask == 0 or mask >> len(_MASK_BITS):
        raise _unknown(path, f"capability mask {mask:#x}")
    start, length = sections["ENGN"]
    engine = data[start : start + length]
    library = sections.get("PLGN")
    return EngineInfo(
        path=path.name, bytes=size, sha256=hashlib.sha256(data).hexdigest(), runtime="tensorrt_rtx",
        runtime_version=".".join(str(part) for part in data[24:28]),
        compute_capabilities=tuple(sm for bit, sm in enumerate(_MASK_BITS) if mask >> bit & 1),
        sections={name: length for name, (_, length) in sections.items()}, io_names=_io_names(path, engine),
        plugin_nodes=_plugin_nodes(path, engine), num_custom_layers=engine.count(_V3_MARK),
        plugin_library_sha256=hashlib.sha256(data[library[0] : sum(library)]).hexdigest() if library else "",
    )


def _sections(path: Path, data: mmap.mmap, size: int) -> dict[str, tuple[int, int]]:
    """Name to (offset, size). The table ends where the first section begins."""
    sections: dict[str, tuple[int, int]] = {}
    at, end = _TABLE, size
    while at + 24 <= end:
        tag, zero, offset, length = struct.unpack_from("<4sIQQ", data, at)
        name = tag[::-1].decode("ascii", errors="replace")
        if zero != 0 or not name.isalpha() or offset + length > size or offset < at + 24:
            raise _unknown(path, f"section '{name}' at {offset} with {length} bytes")
        sections[name] = (offset, length)
        at, end = at + 24, min(end, offset)
    return sections


def _io_names(path: Path, engine: bytes) -> tuple[str, ...]:
    """The engine's table of tensors lists every input and output twice: as a set, then in order."""
    names = [engine[head.end() : head.end() + length] for head, length in _strings(engine, 0, len(engine))]
    text = [name.decode(errors="replace") for name in names[1:]]  # the first is the network's name
    for count in range(1, min(len(text) // 2, _MAX_IO) + 1):
        first, second = text[:count], text[count : 2 * count]
        if len(set(second)) == count and set(first) == set(second):
            return tuple(second)
    raise _unknown(path, "no table of inputs and outputs")


def _strings(engine: bytes, start: int, end: int) -> list[tuple[re.Match[bytes], int]]:
    """Named strings (with their 13 80 head) and their lengths."""
    found = []
    for head in _STRING_HEAD.finditer(engine, start, end):
        length = struct.unpack("<Q", head[1])[0]
        if head.end() + length <= len(engine):
            found.append((head, length))
    return found


def _plugin_nodes(path: Path, engine: bytes) -> tuple[PluginNode, ...]:
    nodes = []
    name = PLUGIN_NAME.encode()
    pattern = re.escape(_STRING + struct.pack("<Q", len(name)) + name)
    for match in re.finditer(pattern, engine):
        cursor = _Cursor(path, engine, match.start() - 14)
        plugin, version, namespace = cursor.string(), cursor.string(), cursor.string()
        fields: dict[str, int] = {}
        for _ in range(cursor.integer()):
            field_name, length, kind, value = cursor.string(), cursor.integer(), cursor.string(), cursor.array()
            if kind != "INT32" or length != 1 or len(value) != 4:
                raise _unknown(path, f"field '{field_name}' of {length} {kind}")
            fields[field_name] = struct.unpack("<i", value)[0]
        if not engine.startswith(b"\x13\x80\x01\x00", cursor.at) or _V3_MARK not in engine[cursor.at : cursor.at + 64]:
            raise _unknown(path, "a plugin record without its end")
        nodes.append(PluginNode(_layer_name(engine, match.start() - 14), plugin, version, namespace, fields))
    return tuple(nodes)


def _layer_name(engine: bytes, before: int) -> str:
    """The last string but one before a plugin record; the last is the same with a suffix that makes it unique."""
    near = _strings(engine, max(0, before - 65536), before)[-2:]
    names = [engine[head.end() : head.end() + length].decode(errors="replace") for head, length in near]
    return names[0] if len(names) == 2 and names[1].startswith(names[0]) else ""


class _Cursor:
    """Reads tagged values one after the other; anything else than the tag that must be there is an error."""

    def __init__(self, path: Path, data: bytes, at: int) -> None:
        self.path, self.data, self.at = path, data, at

    def string(self) -> str:
        head = _STRING_HEAD.match(self.data, self.at)
        if head is None:
            raise _unknown(self.path, f"no string at byte {self.at} of ENGN")
        length = struct.unpack("<Q", head[1])[0]
        self.at = head.end() + length
        return self.data[head.end() : self.at].decode(errors="replace")

    def integer(self) -> int:
        if not self.data.startswith(_INT, self.at):
            raise _unknown(self.path, f"no integer at byte {self.at} of ENGN")
        self.at += 8
        return struct.unpack_from("<i", self.data, self.at - 4)[0]

    def array(self) -> bytes:
        if not self.data.startswith(_BYTES, self.at):
            raise _unknown(self.path, f"no byte array at byte {self.at} of ENGN")
        length = struct.unpack_from("<Q", self.data, self.at + 6)[0]
        self.at += 14 + length
        return self.data[self.at - length : self.at]


def _unknown(path: Path, what: str) -> BuildError:
    return BuildError(f"{path} has a layout that this version cannot read back: {what}",
                      "known: engines of TensorRT-RTX 1.7; pip install 'tensorrt-rtx~=1.7.1' and " + _REBUILD)
