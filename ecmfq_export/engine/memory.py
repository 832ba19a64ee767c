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
        kv_cache: the cache's inputs and outputs, counted once where TensorScatter updates them in place, else both.
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

    def __add__(self, other: MemoryNeeds) -> MemoryNeeds:
        """Both engines loaded at once; they run one after the other, but each context keeps its scratch."""
        return MemoryNeeds(self.weights + other.weights, self.kv_cache + other.kv_cache, self.io + other.io, self.scratch + other.scratch)

    def __str__(self) -> str:
        scratch = f", scratch {_gib(self.scratch)}" if self.scratch else ", scratch known after the build"
        return (f"{_gib(self.total)}: weights {_gib(self.weights)}, KV cache {_gib(self.kv_cache)}, other inputs and outputs "
                f"{_gib(self.io)}{scratch}")


def memory_needs(onnx_path: Path, profiles: Mapping[str, Shapes]) -> MemoryNeeds:
    """Count from the graph alone; its weights are not read.

    Raises:
        BuildError: an initializer or input of a type without a known size.
    """
    graph = load_graph(onnx_path).graph
    weights = sum(tensor_bytes(t.data_type, list(t.dims), t.name) for t in graph.initializer)
    # In place: one buffer for both. ScatterElements on an input, which is how older parsers are given the cache, needs two.
    cached = {node.input[0] for node in graph.node if node.op_type in ("TensorScatter", "ScatterElements")}
    updated = {node.output[0] for node in graph.node if node.op_type == "TensorScatter"}
    copied = {node.output[0] for node in graph.node if node.op_type == "ScatterElements"}
    symbols = _largest_symbols(graph, profiles)
    kv_cache = io = 0
    for value in [*graph.input, *graph.output]:
        tensor = value.type.tensor_type
        shape = [dim.dim_value if dim.HasField("dim_value") else symbols.get(dim.dim_param, 1) for dim in tensor.shape.dim]
        size = tensor_bytes(tensor.elem_type, shape, value.name)
        if value.name in cached or value.name in copied:
            kv_cache += size
        elif value.name not in updated:
            io += size
    return MemoryNeeds(weights, kv_cache, io)


def check_memory(needs: MemoryNeeds, target: Target, device_bytes: int | None = None, what: str = "the engine needs") -> None:
    """Refuse what cannot fit.

    Args:
        device_bytes: memory of the device at hand, where there is one; None: the target's figure alone counts.
        what: what needs it, for the message.

    Raises:
        BuildError: the sum is larger than the target's ``memory_bytes``, or than the device has; with all the numbers.
    """
    limit, has = target.limits.memory_bytes, f"target '{target.name}' has"
    if device_bytes is not None and device_bytes < limit:
        limit, has = device_bytes, "this device has"
    if needs.total > limit:
        raise BuildError(f"{has} {_gib(limit)}, {what} {needs}",
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
