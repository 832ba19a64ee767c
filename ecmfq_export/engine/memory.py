"""Does it fit? Weights + KV cache + other inputs and outputs + scratch against the target's memory, before building."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx

from ecmfq_export.engine.graph_file import load_graph, tensor_bytes
from ecmfq_export.errors import BuildError
from ecmfq_export.target import Target

Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]

@dataclass(frozen=True)
class MemoryNeeds:
    """Bytes on the device at the profile's largest shapes.

    Attributes:
        weights: all initializers.
        kv_cache: inputs that a TensorScatter node updates, counted once (updated in place).
        io: the other inputs and outputs.
        scratch: activations and workspace; 0 before the build, which alone knows.
    """

    weights: int
    kv_cache: int
    io: int
    scratch: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.io + self.scratch


def memory_needs(onnx_path: Path, profiles: Mapping[str, Shapes]) -> MemoryNeeds:
    """Count from the graph alone; its weights are not read.

    Raises:
        BuildError: an initializer or input of a type without a known size.
    """
    graph = load_graph(onnx_path).graph
    weights = sum(tensor_bytes(t.data_type, list(t.dims), t.name) for t in graph.initializer)
    cached = {node.input[0] for node in graph.node if node.op_type == "TensorScatter"}
    updated = {node.output[0] for node in graph.node if node.op_type == "TensorScatter"}
    symbols = _largest_symbols(graph, profiles)
    kv_cache = io = 0
    for value in [*graph.input, *graph.output]:
        tensor = value.type.tensor_type
        shape = [dim.dim_value if dim.HasField("dim_value") else symbols.get(dim.dim_param, 1) for dim in tensor.shape.dim]
        size = tensor_bytes(tensor.elem_type, shape, value.name)
        if value.name in cached:
            kv_cache += size
        elif value.name not in updated:
            io += size
    return MemoryNeeds(weights, kv_cache, io)


def check_memory(needs: MemoryNeeds, target: Target) -> None:
    """Refuse what cannot fit.

    Raises:
        BuildError: the sum is larger than the target's ``memory_bytes``; with all the numbers.
    """
    limit = target.limits.memory_bytes
    if needs.total > limit:
        raise BuildError(
            f"target '{target.name}' has {_gib(limit)}, the engine needs {_gib(needs.total)}: weights {_gib(needs.weights)}, KV "
            f"cache {_gib(needs.kv_cache)}, other inputs and outputs {_gib(needs.io)}, scratch {_gib(needs.scratch)}",
            "export with a smaller --max-seq-len or --max-batch, or for a target with more memory")


def _largest_symbols(graph: onnx.GraphProto, profiles: Mapping[str, Shapes]) -> dict[str, int]:
    symbols: dict[str, int] = {}
    for value in graph.input:
        if value.name not in profiles:
            continue
        for dim, size in zip(value.type.tensor_type.shape.dim, profiles[value.name][2], strict=False):
            if dim.dim_param:
                symbols[dim.dim_param] = max(symbols.get(dim.dim_param, 0), size)
    return symbols


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
