"""Optimization profiles: the smallest, the usual and the largest shape of every engine input."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx

from ecmfq_export.engine.graph_file import load_graph
from ecmfq_export.errors import BuildError

Range = tuple[int, int, int]
Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def profile_shapes(onnx_path: Path, ranges: Mapping[str, Range]) -> dict[str, Shapes]:
    """Shapes (min, opt, max) of every graph input whose dimensions are symbolic, by the symbols' names.

    Args:
        onnx_path: the graph; its weights are not read.
        ranges: symbol to (min, opt, max), e.g. ``{"batch": (1, 1, 4), "seq": (1, 128, 1024)}``. Every symbol of the graph's
            inputs must be named, so that a new one cannot slip into an engine with a guessed range.

    Raises:
        BuildError: a symbol without a range, a dimension without a name, or a range that is not min <= opt <= max.
    """
    for name, (low, opt, high) in ranges.items():
        if not 0 <= low <= opt <= high:
            raise BuildError(f"range of '{name}' is min {low}, opt {opt}, max {high}", "it must be 0 <= min <= opt <= max")
    graph = load_graph(onnx_path).graph
    shapes: dict[str, Shapes] = {}
    for value in graph.input:
        dims = value.type.tensor_type.shape.dim
        if all(dim.HasField("dim_value") for dim in dims):
            continue
        per_kind: list[tuple[int, ...]] = []
        for kind in range(3):
            per_kind.append(tuple(_size(dim, ranges, kind, value.name, onnx_path) for dim in dims))
        shapes[value.name] = (per_kind[0], per_kind[1], per_kind[2])
    return shapes


def decode_ranges(ranges: Mapping[str, Range]) -> dict[str, Range]:
    """The same ranges with one token a sequence: what a decoder is called with after its prompt."""
    return {**ranges, "seq": (1, 1, 1)}


def _size(dim: onnx.TensorShapeProto.Dimension, ranges: Mapping[str, Range], kind: int, name: str, path: Path) -> int:
    if dim.HasField("dim_value"):
        return dim.dim_value
    if dim.dim_param not in ranges:
        known = ", ".join(sorted(ranges)) or "none"
        raise BuildError(f"{path}: input '{name}' has the dimension '{dim.dim_param}', which has no range",
                         f"dimensions with a range: {known}")
    return ranges[dim.dim_param][kind]
