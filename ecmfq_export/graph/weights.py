"""Weights beside the graph: streamed into external data files, one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import onnx_ir as ir
from safetensors.numpy import save_file

INLINE_BYTES = 1024
"""Smaller tensors stay in the graph file: shapes, scalars, and what shape inference reads."""


def externalize(model: ir.Model, directory: Path, file_name: Callable[[str], str]) -> dict[str, int]:
    """Write every weight of `model` that is not in a file of `directory` yet, and let the model refer to the files.

    Args:
        directory: of the model; the files are written beside it, as ONNX asks.
        file_name: initializer name to the file that takes it.

    Returns:
        Bytes by file name, of the files written now.
    """
    groups: dict[str, list[ir.Value]] = {}
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None or isinstance(tensor, ir.ExternalTensor):
            continue
        if tensor.nbytes > INLINE_BYTES:
            groups.setdefault(file_name(value.name), []).append(value)
        elif isinstance(tensor, ir.LazyTensor):
            # Read now: an error while a graph is serialized would reach the user as the serializer's.
            value.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=tensor.name)
    written = {}
    for name, values in groups.items():
        tensors = ir.external_data.convert_tensors_to_external([v.const_value for v in values], directory, name)
        for value, tensor in zip(values, tensors, strict=True):
            value.const_value = tensor
        written[name] = (directory / name).stat().st_size
    return written


def save_embeddings(path: Path, name: str, table: np.ndarray) -> None:
    """A safetensors file of one table [rows, hidden], which the runtime maps and reads by row."""
    save_file({name: np.ascontiguousarray(table)}, path)


def files_of(model: ir.Model) -> set[str]:
    """External data files that `model` refers to."""
    tensors: Iterable[ir.TensorProtocol | None] = (v.const_value for v in model.graph.initializers.values())
    return {str(t.location) for t in tensors if isinstance(t, ir.ExternalTensor)}
