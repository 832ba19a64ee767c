"""Lazy reading of a Hugging Face safetensors directory: headers are checked at once, tensors come from disk one by one.

Reads ``model.safetensors`` or the shards that ``model.safetensors.index.json`` names. Nothing is unpickled.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ecmfq_export.errors import CheckpointError
from ecmfq_export.json_file import parse_json, read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

DTYPES: Mapping[str, torch.dtype] = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
}  # fmt: skip
"""safetensors dtypes that are read; others (float64, float8, complex) are refused by name."""

_MAX_HEADER = 100 << 20
_CHUNK = 1 << 20
"""Elements that the scan for NaN looks at in one go, small enough to stay in cache."""


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: `start` is its byte offset in `file`, counted from the file's beginning."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Checkpoint:
    """A safetensors directory. Build it with :meth:`open`; it holds headers only and keeps no file open."""

    def __init__(self, path: Path, entries: Mapping[str, TensorEntry]) -> None:
        self.path = path
        self._entries = dict(entries)

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Read and check every header.

        Raises:
            CheckpointError: no directory or no safetensors in it (pickle files are refused), a damaged or truncated file,
                an index that leaves the directory, names a missing shard, or disagrees with its shards, a tensor that is
                there twice, or a dtype that is not read.
        """
        path = Path(path)
        if not path.is_dir():
            raise CheckpointError(f"{path} is not a directory", "give the directory that holds config.json and *.safetensors")
        index = path / INDEX_FILE
        if index.is_file():
            return cls(path, _read_sharded(path, index))
        if (path / SINGLE_FILE).is_file():
            return cls(path, read_header(path / SINGLE_FILE))
        raise CheckpointError(*_nothing_found(path))

    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def entry(self, name: str) -> TensorEntry:
        """Where `name` lies.

        Raises:
            CheckpointError: no such tensor.
        """
        try:
            return self._entries[name]
        except KeyError:
            raise CheckpointError(f"{self.path} has no tensor '{name}'", "the checkpoint is incomplete") from None

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self.entry(name).dtype

    def load(self, name: str) -> torch.Tensor:
        """The whole tensor in its stored dtype, in memory of its own.

        Raises:
            CheckpointError: no such tensor, the file shrank since it was opened, or NaN or infinity in it.
        """
        entry = self.entry(name)
        return self._read(name, entry, 0, entry.shape)

    def load_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` of the first dimension, reading only their bytes; errors as :meth:`load`."""
        entry = self.entry(name)
        if not entry.shape or not 0 <= start <= stop <= entry.shape[0]:
            raise ValueError(f"rows {start}:{stop} of '{name}' {list(entry.shape)}")
        row_bytes = math.prod(entry.shape[1:]) * entry.dtype.itemsize
        return self._read(name, entry, start * row_bytes, (stop - start, *entry.shape[1:]))

    def _read(self, name: str, entry: TensorEntry, offset: int, shape: tuple[int, ...]) -> torch.Tensor:
        # A tensor allocated in its dtype is aligned for it; its bytes are then filled through a byte view.
        tensor = torch.empty(shape, dtype=entry.dtype, device="cpu")
        if tensor.numel():
            flat = tensor.view(-1).view(torch.uint8).numpy()
            try:
                with entry.file.open("rb") as stream:
                    stream.seek(entry.start + offset)
                    got = stream.readinto(memoryview(flat))
            except OSError as error:
                raise CheckpointError(f"{entry.file} cannot be read: {error.strerror or error}") from error
            if got != flat.nbytes:
                raise CheckpointError(
                    f"{entry.file}: '{name}' ends after {got} of {flat.nbytes} bytes",
                    "the file changed while it was read",
                )
        require_finite(tensor, name, entry.file)
        return tensor


def require_finite(tensor: torch.Tensor, name: str, file: Path) -> None:
    """Refuse NaN and infinity in a floating tensor, scanning in chunks of bounded memory.

    Raises:
        CheckpointError: naming the tensor, the first bad element and its value.
    """
    if not tensor.is_floating_point():
        return
    flat = tensor.reshape(-1)
    for begin in range(0, flat.numel(), _CHUNK):
        chunk = flat[begin : begin + _CHUNK]
        # The extremes carry NaN along, and finding them is 20 times faster than testing each element.
        low, high = torch.aminmax(chunk)
        if not (math.isfinite(low) and math.isfinite(high)):
            first = int((~torch.isfinite(chunk)).nonzero()[0])
            raise CheckpointError(
                f"tensor '{name}' in {file} holds {chunk[first].item()} at element {begin + first} of {flat.numel()}",
                "the weights are damaged or training diverged; download the checkpoint again or use another one",
            )


def read_header(file: Path) -> dict[str, TensorEntry]:
    """Entries of one safetensors file, checked against the file's size.

    Raises:
        CheckpointError: truncated, not safetensors, an inconsistent header, a tensor twice, or an unsupported dtype.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            if len(prefix) < 8:
                raise CheckpointError(f"{file} is truncated: {size} bytes", "download the file again")
            length = struct.unpack("<Q", prefix)[0]
            if length > size - 8 and length <= _MAX_HEADER:
                raise CheckpointError(
                    f"{file} is truncated: {size} bytes, its header alone takes {8 + length}", "download the file again"
                )
            if length > _MAX_HEADER:
                raise CheckpointError(f"{file} is no safetensors file: header length {length}", "download the file again")
            text = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from error
    try:
        header = parse_json(text)
    except ValueError as error:
        raise CheckpointError(f"{file}: its header is not JSON ({error})", "download the file again") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: its header is no JSON object", "download the file again")
    header.pop("__metadata__", None)
    return _check_layout(
        file, {name: _parse_entry(file, name, value, 8 + length) for name, value in header.items()}, 8 + length, size
    )


def _parse_entry(file: Path, name: str, value: Any, data_start: int) -> TensorEntry:
    def whole(items: Any) -> bool:
        return isinstance(items, list) and all(type(item) is int and item >= 0 for item in items)

    if not (
        isinstance(value, dict)
        and whole(value.get("shape"))
        and whole(value.get("data_offsets"))
        and len(value["data_offsets"]) == 2
    ):
        raise CheckpointError(f"{file}: the header entry of '{name}' is malformed", "download the file again")
    kind = value.get("dtype")
    dtype = DTYPES.get(kind) if isinstance(kind, str) else None
    if dtype is None:
        raise CheckpointError(
            f"{file}: '{name}' has dtype {kind!r}",
            f"supported: {', '.join(DTYPES)}; convert the checkpoint to bfloat16",
        )
    entry = TensorEntry(file, dtype, tuple(value["shape"]), data_start + value["data_offsets"][0])
    span = value["data_offsets"][1] - value["data_offsets"][0]
    if span != entry.num_bytes:
        raise CheckpointError(
            f"{file}: '{name}' {value['dtype']} {value['shape']} needs {entry.num_bytes} bytes, the header gives it {span}",
            "download the file again",
        )
    return entry


def _check_layout(file: Path, entries: dict[str, TensorEntry], data_start: int, size: int) -> dict[str, TensorEntry]:
    """Tensors must follow each other without overlap or hole up to the file's end (the safetensors format's own rule)."""
    end = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].num_bytes)):
        if entry.start != end:
            raise CheckpointError(
                f"{file}: '{name}' starts at byte {entry.start}, expected {end}",
                "the header is damaged; download the file again",
            )
        end = entry.start + entry.num_bytes
    if end > size:
        raise CheckpointError(f"{file} is truncated: {size} bytes, its header says {end}", "download the file again")
    if end < size:
        raise CheckpointError(f"{file} has {size - end} bytes more than its header says", "download the file again")
    return entries


def _read_sharded(path: Path, index: Path) -> dict[str, TensorEntry]:
    try:
        data = read_json(index)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{index} cannot be read: {error}", "download the index again") from None
    weight_map = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map", "download the index again")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or shard != Path(shard).name or "\\" in shard or not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{index}: '{name}' is said to lie in {shard!r}", "shards are .safetensors files beside the index"
            )
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if not (path / shard).is_file()]
    if missing:
        raise CheckpointError(f"{path} lacks {len(missing)} of {len(shards)} shards: {preview(missing)}", "finish the download")
    if SINGLE_FILE not in shards and (path / SINGLE_FILE).is_file():
        raise CheckpointError(
            f"{path} holds {SINGLE_FILE} and {INDEX_FILE}, which does not name it", "remove the one that is not meant"
        )
    entries: dict[str, TensorEntry] = {}
    for shard in shards:
        for name, entry in read_header(path / shard).items():
            if name in entries:
                raise CheckpointError(
                    f"tensor '{name}' is in {entries[name].file.name} and in {shard}", "remove one of the two"
                )
            if name not in weight_map:
                raise CheckpointError(
                    f"{shard} holds '{name}', which {INDEX_FILE} does not list",
                    "index and shards belong to different checkpoints",
                )
            entries[name] = entry
    lost = [name for name, shard in weight_map.items() if name not in entries or entries[name].file.name != shard]
    if lost:
        raise CheckpointError(
            f"{len(lost)} tensors are not in the shard that {INDEX_FILE} names: {preview(sorted(lost))}",
            "index and shards belong to different checkpoints",
        )
    return entries


def _nothing_found(path: Path) -> tuple[str, str]:
    names = sorted(item.name for item in path.iterdir() if item.is_file())
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl"))]
    shards = [name for name in names if name.endswith(".safetensors")]
    if shards:
        return f"{path} has {preview(shards)} but neither {SINGLE_FILE} nor {INDEX_FILE}", "finish the download"
    if pickles:
        return (
            f"{path} holds pickled weights only: {preview(pickles)}",
            "only safetensors is read, since unpickling runs code; save the model again with transformers 5",
        )
    return f"{path} holds no {SINGLE_FILE}", "give the directory of a Hugging Face checkpoint in safetensors"


def preview(names: list[str], limit: int = 3) -> str:
    """The first few names, and how many more there are."""
    head = ", ".join(names[:limit])
    return f"{head} and {len(names) - limit} more" if len(names) > limit else head
