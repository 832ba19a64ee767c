"""A graph that is larger than memory should be, run piece by piece: one ONNX Runtime session after the other, each over a few layers.

The nodes, their order and their weights are the graph's own; a piece ends where nothing but the residual stream goes on, at the value
``hidden_{l}`` that the decoder's graph has behind every layer. Sessions are opened when their turn comes and closed behind it, so memory
is that of one piece, mapped weights included, whatever the number of layers. The last one alone stays open for the next call: it has the
output matrix, which takes seconds to open. That is for checking a model once, not for serving it.

In float32 the results have the bits of the whole graph. In float16 they differ by a rounding between pieces: ONNX Runtime computes most
operators in float32, and within one session it leaves out the step through float16 that the graph has there; a piece takes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from ecmfq_export.engine.graph_file import load_graph, tensor_bytes
from ecmfq_export.engine.ort_runner import OrtRunner, open_model, require_values
from ecmfq_export.engine.runner import check_feeds
from ecmfq_export.heap import give_back

PIECE_BYTES = 1 << 29
"""Weights of a piece: a layer of Qwen3-VL-30B-A3B has 0.33 GB, and graphs of small models stay whole."""

BOUNDARY = "hidden_"
"""Prefix of the values between layers."""


@dataclass(frozen=True)
class Piece:
    """A part of a graph.

    Attributes:
        model: a graph of its own, without weights.
        inputs, outputs: names of what it takes and gives.
    """

    model: onnx.ModelProto
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class OrtPieces:
    """A :class:`~ecmfq_export.engine.runner.Runner` over one ONNX file, which holds one session of its last piece between calls.

    A graph whose weights fit one piece is opened once, like :class:`~ecmfq_export.engine.ort_runner.OrtRunner`'s.

    Args:
        path, threads, extra_outputs: as OrtRunner's.
        piece_bytes: weights that a piece has at most; a layer or an output matrix that is larger is a piece of its own.

    Raises:
        UserError: as OrtRunner's; what ONNX Runtime refuses in a later piece comes when the piece is run.
    """

    def __init__(self, path: Path, *, threads: int = 0, extra_outputs: Sequence[str] = (), piece_bytes: int = PIECE_BYTES) -> None:
        self._path, self._threads = Path(path), threads
        model = load_graph(self._path)
        require_values(model, self._path, extra_outputs)
        self._outputs = [value.name for value in model.graph.output]
        self._outputs += [name for name in extra_outputs if name not in self._outputs]
        self._pieces = list(cut(model, self._outputs, piece_bytes))
        self._inputs = {value.name: _kind(value) for value in model.graph.input}
        self._last: onnxruntime.InferenceSession | None = None
        self._whole = OrtRunner(self._path, threads=threads, extra_outputs=extra_outputs) if len(self._pieces) == 1 else None

    def release(self) -> None:
        """Close what is open between calls, where it can be opened again."""
        self._last = None

    @property
    def pieces(self) -> list[Piece]:
        return list(self._pieces)

    @property
    def input_names(self) -> list[str]:
        return list(self._inputs)

    @property
    def output_names(self) -> list[str]:
        return list(self._outputs)

    @property
    def device_bytes(self) -> int:
        return 0

    @property
    def inputs(self) -> dict[str, tuple[np.dtype, list[int | str | None]]]:
        """Dtype and shape of every input; a free extent is its symbol's name or None."""
        return dict(self._inputs)

    def run(self, feeds: Mapping[str, np.ndarray], outputs: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        wanted = self._outputs if outputs is None else list(outputs)
        if self._whole is not None:
            return self._whole.run(feeds, wanted)
        check_feeds(feeds, self._inputs)
        values, needed = dict(feeds), set(wanted)
        plan: list[tuple[int, list[str]]] = []  # pieces that give anything of use, and what
        for index in reversed(range(len(self._pieces))):
            names = [name for name in self._pieces[index].outputs if name in needed]
            if names:  # an empty list would ask a session for everything
                plan.insert(0, (index, names))
                needed.update(self._pieces[index].inputs)
        for step, (index, names) in enumerate(plan):
            found = self._session(index).run(names, {name: values[name] for name in self._pieces[index].inputs})
            # Copies: an array that a session gave out keeps the memory of all its runs.
            values.update(zip(names, map(np.array, found), strict=True))
            del found
            later = {name for other, _ in plan[step + 1 :] for name in self._pieces[other].inputs}
            for name in [name for name in values if name not in wanted and name not in later]:
                del values[name]
            give_back(cycles=False)
        return {name: values[name] for name in wanted}

    def _session(self, index: int) -> onnxruntime.InferenceSession:
        if index + 1 == len(self._pieces) and self._last is not None:
            return self._last
        session = open_model(self._pieces[index].model.SerializeToString(), self._path, self._threads, brief=True)
        if index + 1 == len(self._pieces):
            self._last = session
        return session


def cut(model: onnx.ModelProto, outputs: Sequence[str], piece_bytes: int) -> Iterator[Piece]:
    """The graph in pieces of at most `piece_bytes` of weights, as far as it can be cut between layers.

    Args:
        outputs: names of values that the pieces give together; the graph's own and others.

    A place to cut is behind a node that gives a value ``hidden_*`` where everything else that later nodes read is an input of the
    graph or a weight.
    """
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    nodes = list(graph.node)
    reads = [_reads(node) for node in nodes]
    last_use = {name: index for index, names in enumerate(reads) for name in names}
    open_until: dict[str, int] = {}
    segments: list[tuple[int, int]] = []  # of nodes, [start, stop), as small as they can be cut
    start = 0
    for index, node in enumerate(nodes):
        open_until |= {name: last_use[name] for name in node.output if last_use.get(name, index) > index}
        alive = [name for name, until in open_until.items() if until > index]
        if any(name.startswith(BOUNDARY) for name in node.output) and all(name in node.output for name in alive):
            segments.append((start, index + 1))
            start = index + 1
    if start < len(nodes):
        segments.append((start, len(nodes)))
    sizes = []
    for first, stop in segments:
        names = set().union(*reads[first:stop]) & set(weights)
        sizes.append(sum(tensor_bytes(weights[n].data_type, weights[n].dims, n) for n in names))
    merged: list[tuple[int, int, int]] = []
    for (first, stop), size in zip(segments, sizes, strict=True):
        if merged and merged[-1][2] + size <= piece_bytes:
            merged[-1] = (merged[-1][0], stop, merged[-1][2] + size)
        else:
            merged.append((first, stop, size))
    kinds = {value.name: value for value in (*graph.input, *graph.output)}
    stream = graph.input[0].type.tensor_type
    for first, stop, _ in merged:
        made = {name for node in nodes[first:stop] for name in node.output if name}
        read = set().union(*reads[first:stop])
        takes = [name for name in dict.fromkeys(n for names in reads[first:stop] for n in sorted(names))
                 if name not in made and name not in weights]
        gives = [name for name in outputs if name in made]
        gives += sorted(name for name in made if last_use.get(name, -1) >= stop and name not in gives)
        part = onnx.GraphProto(name=graph.name)
        part.node.extend(nodes[first:stop])
        part.initializer.extend(tensor for tensor in graph.initializer if tensor.name in read)
        part.input.extend(kinds.get(name) or _like(stream, name) for name in takes)
        part.output.extend(kinds.get(name) or _like(stream, name, shape=False) for name in gives)
        piece = onnx.ModelProto(ir_version=model.ir_version, graph=part)
        piece.opset_import.extend(model.opset_import)
        piece.functions.extend(model.functions)
        yield Piece(piece, tuple(takes), tuple(gives))


def _reads(node: onnx.NodeProto) -> set[str]:
    """Names that a node takes, those that graphs inside it take from outside included."""
    names = {name for name in node.input if name}
    for attribute in node.attribute:
        for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            own = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
            for inner in graph.node:
                names |= _reads(inner) - own
                own |= set(inner.output)
    return names


def _like(stream: onnx.TypeProto.Tensor, name: str, shape: bool = True) -> onnx.ValueInfoProto:
    """A value of the residual stream's type: the graph's first input is its start."""
    value = onnx.ValueInfoProto(name=name)
    value.type.tensor_type.elem_type = stream.elem_type
    if shape:
        value.type.tensor_type.shape.CopyFrom(stream.shape)
    return value


def _kind(value: onnx.ValueInfoProto) -> tuple[np.dtype, list[int | str | None]]:
    tensor = value.type.tensor_type
    shape: list[int | str | None] = [dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None for dim in tensor.shape.dim]
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)), shape
