"""Writing a safetensors file tensor by tensor, so that only one of them is in memory, and never half a file under its name."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ecmfq_export.models.checkpoint import DTYPES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorToWrite:
    """A tensor's header entry, and a function that makes it when its turn comes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorToWrite:
        """A tensor that is in memory already."""
        return cls(tensor.dtype, tuple(tensor.shape), lambda: tensor)


def write_safetensors(file: Path, tensors: Mapping[str, TensorToWrite]) -> int:
    """Write `file` beside its name, sync it and rename it into place; return the bytes of its tensors.

    Raises:
        OSError: the disk is full or the directory cannot be written; no file of that name is left by this call.
        ValueError: a tensor that is not what was announced.
    """
    # Wide types first keeps every tensor aligned to its own size; names make the file the same on every run.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, dict[str, object]] = {}
    end = 0
    for name in order:
        tensor = tensors[name]
        start, end = end, end + math.prod(tensor.shape) * tensor.dtype.itemsize
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    temporary = file.with_name(file.name + ".tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(struct.pack("<Q", len(text)))
            stream.write(text)
            for name in order:
                tensor = tensors[name].make()
                if tensor.dtype != tensors[name].dtype or tuple(tensor.shape) != tensors[name].shape:
                    raise ValueError(f"'{name}' is {tensor.dtype} {list(tensor.shape)}, not what was announced")
                if tensor.numel():
                    stream.write(memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy()))
            stream.flush()
            os.fsync(stream.fileno())
        temporary.rename(file)
    finally:
        temporary.unlink(missing_ok=True)
    return end
