"""An ONNX file, checked before a native library sees it: ONNX Runtime and TensorRT parse it in C++ and trust what it says.

What is checked here is what would lead a reader out of the directory, make it allocate without bound or recurse without end:
where weights lie and how large they are, types and extents, and functions that call themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx

from ecmfq_export import bundle
from ecmfq_export.errors import BuildError, BundleError, UserError

MAX_BYTES = 2**31 - 1
"""What protobuf allows; weights lie beside the graph."""
_AGAIN = "export the model again"
_MAX_EXTENT = 2**40
_EXTERNAL_KEYS = {"location", "offset", "length", "checksum"}
BITS = {
    onnx.TensorProto.FLOAT: 32, onnx.TensorProto.FLOAT16: 16, onnx.TensorProto.BFLOAT16: 16, onnx.TensorProto.DOUBLE: 64,
    onnx.TensorProto.INT8: 8, onnx.TensorProto.UINT8: 8, onnx.TensorProto.INT16: 16, onnx.TensorProto.INT32: 32,
    onnx.TensorProto.INT64: 64, onnx.TensorProto.BOOL: 8, onnx.TensorProto.INT4: 4, onnx.TensorProto.UINT4: 4,
    onnx.TensorProto.FLOAT8E4M3FN: 8,
}  # fmt: skip
"""Bits of a value of every element type that graphs here have."""


def load_graph(path: Path) -> onnx.ModelProto:
    """The graph without its weights, its structure and its weights' places checked.

    Raises:
        UserError: no regular file, no ONNX, or a tensor or function that does not hold; with its name.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such ONNX file", "run 'ecmfq-export export' first")
    if path.stat().st_size > MAX_BYTES:
        raise BuildError(f"{path} cannot be read as ONNX: {path.stat().st_size} bytes are more than protobuf allows", _AGAIN)
    try:
        model = onnx.load_model_from_string(path.read_bytes())
    except Exception as error:  # protobuf's and the file system's errors; all are about this file
        raise BuildError(f"{path} cannot be read as ONNX: {error}", _AGAIN) from error
    if not model.HasField("graph") or not model.opset_import:
        raise BuildError(f"{path} cannot be read as ONNX: it has no graph, or says no operator set", _AGAIN)
    _check_texts(path, model)
    _check_functions(path, model)
    weights = [(tensor, True) for tensor in model.graph.initializer]
    nodes = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    for tensor, external in (*weights, *((tensor, False) for tensor in _attribute_tensors(path, nodes))):
        _check_tensor(path, tensor, external)
    if model.graph.sparse_initializer:
        raise BuildError(f"{path} has sparse weights, which are not supported", _AGAIN)
    for value in [*model.graph.input, *model.graph.output]:
        _check_value(path, value)
    return model


def tensor_bytes(data_type: int, shape: Iterable[int], name: str) -> int:
    """Bytes of a tensor of this type and shape.

    Raises:
        BuildError: a type without a known size.
    """
    if data_type not in BITS:
        known = data_type in onnx.TensorProto.DataType.values()
        kind = onnx.TensorProto.DataType.Name(data_type) if known else str(data_type)
        raise BuildError(f"tensor '{name}' is of type {kind}, whose size is not known")
    return -(-math.prod(shape) * BITS[data_type] // 8)


def _check_texts(path: Path, model: onnx.ModelProto) -> None:
    """Every name is UTF-8: protobuf hands out bytes for a name that is not, which nothing here expects."""
    texts: list[object] = [opset.domain for opset in model.opset_import]
    for function in model.functions:
        texts += [function.name, function.domain, *function.input, *function.output]
    graphs = [model.graph]
    nodes = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    while nodes or graphs:
        for graph in graphs:
            for value in (*graph.input, *graph.output, *graph.value_info):
                texts += [value.name, *(dim.dim_param for dim in value.type.tensor_type.shape.dim)]
            for tensor in graph.initializer:
                texts += [tensor.name, *(text for entry in tensor.external_data for text in (entry.key, entry.value))]
        inner: list[onnx.GraphProto] = []
        for node in nodes:
            texts += [node.name, node.op_type, node.domain, *node.input, *node.output]
            for attribute in node.attribute:
                texts += [attribute.name, attribute.ref_attr_name, attribute.t.name]
                inner += [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]
        graphs, nodes = inner, [node for graph in inner for node in graph.node]
    wrong = [text for text in texts if not isinstance(text, str)]
    if wrong:
        raise BuildError(f"{path} cannot be read as ONNX: the name {str(wrong[0])[:80]} is no UTF-8", _AGAIN)


def _check_value(path: Path, value: onnx.ValueInfoProto) -> None:
    kind = value.type.tensor_type
    if not value.type.HasField("tensor_type") or not kind.HasField("shape"):
        raise BuildError(f"{path}: '{_shown(value.name)}' is no tensor of a known rank", _AGAIN)
    for dim in kind.shape.dim:
        if dim.HasField("dim_value") and not 0 <= dim.dim_value <= _MAX_EXTENT:
            raise BuildError(f"{path}: '{_shown(value.name)}' has an extent of {dim.dim_value}", _AGAIN)


def _check_tensor(path: Path, tensor: onnx.TensorProto, may_be_external: bool) -> None:
    name = _shown(tensor.name)
    if any(not 0 <= extent <= _MAX_EXTENT for extent in tensor.dims) or math.prod(tensor.dims) > _MAX_EXTENT:
        raise BuildError(f"{path}: tensor '{name}' has the shape {list(tensor.dims)[:8]}", _AGAIN)
    external = tensor.data_location == onnx.TensorProto.EXTERNAL
    if not external and not tensor.external_data:
        if tensor.data_type == onnx.TensorProto.STRING:
            return
        size = tensor_bytes(tensor.data_type, tensor.dims, name)
        if tensor.HasField("raw_data") and len(tensor.raw_data) != size:
            raise BuildError(f"{path}: tensor '{name}' has {len(tensor.raw_data)} bytes of data, its shape needs {size}", _AGAIN)
        return
    if not may_be_external or not external or tensor.HasField("raw_data"):
        raise BuildError(f"{path}: tensor '{name}' names a file for its data, and should not", _AGAIN)
    _check_place(path, tensor, name)


def _check_place(path: Path, tensor: onnx.TensorProto, name: str) -> None:
    entries = [(entry.key, entry.value) for entry in tensor.external_data]
    place = dict(entries)
    if len(place) != len(entries) or not {"location"} <= set(place) <= _EXTERNAL_KEYS:
        raise BuildError(f"{path}: the data of tensor '{name}' are described by {sorted(_shown(key) for key, _ in entries)[:8]}", _AGAIN)
    try:
        file = bundle.inside(path.parent, place["location"])
    except (BundleError, OSError, ValueError) as error:
        what = error.what if isinstance(error, BundleError) else str(error)
        raise BuildError(f"{path}: the data of tensor '{name}': {what}", "weights lie beside their graph") from None
    if not file.is_file():
        raise BuildError(f"{path}: the data of tensor '{name}' should be in {file}, which is no file", "copy the whole bundle")
    numbers = {key: place.get(key, "0" if key == "offset" else "") for key in ("offset", "length")}
    wanted, size = tensor_bytes(tensor.data_type, tensor.dims, name), file.stat().st_size
    numbers["length"] = numbers["length"] or str(wanted)
    if any(not (text.isascii() and text.isdigit() and len(text) < 16) for text in numbers.values()):
        raise BuildError(f"{path}: the data of tensor '{name}' are at {numbers}", "offset and length are whole numbers")
    offset, length = int(numbers["offset"]), int(numbers["length"])
    if length != wanted or offset + length > size:
        raise BuildError(f"{path}: tensor '{name}' needs {wanted} bytes; it has {length} from {offset} in {file.name} of {size}", _AGAIN)


def _attribute_tensors(path: Path, nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    """Tensors inside nodes, also of graphs inside nodes; protobuf itself limits how deep they nest."""
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            if attribute.HasField("sparse_tensor") or attribute.sparse_tensors:
                raise BuildError(f"{path}: node '{_shown(node.name)}' has a sparse constant, which is not supported", _AGAIN)
            for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from graph.initializer
                yield from _attribute_tensors(path, graph.node)


def _calls(nodes: Iterable[onnx.NodeProto]) -> Iterator[tuple[str, str]]:
    for node in nodes:
        yield node.domain, node.op_type
        for attribute in node.attribute:
            for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _calls(graph.node)


def _check_functions(path: Path, model: onnx.ModelProto) -> None:
    """No function twice, none that comes back to itself: a runtime inlines them until nothing is left to inline."""
    functions = {(function.domain, function.name): set(_calls(function.node)) for function in model.functions}
    if len(functions) != len(model.functions):
        raise BuildError(f"{path} defines a function twice", _AGAIN)
    left = {key: called & set(functions) for key, called in functions.items()}
    while left:
        done = [key for key, called in left.items() if not called & set(left)]
        if not done:
            raise BuildError(f"{path}: function '{_shown(next(iter(left))[1])}' calls itself", _AGAIN)
        for key in done:
            del left[key]


def _shown(name: str) -> str:
    return name if len(name) <= 120 else name[:117] + "..."
