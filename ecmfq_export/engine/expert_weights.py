"""Where the decoder engine has its quantized expert weights: inside (``engine``), or as inputs that the runtime fills once (``inputs``).

The builder keeps a copy of every weight that the network holds, so its memory grows with the layers; what comes in as an input it never
sees. With ``inputs`` the int4 weights of every plugin node become inputs of the network, of the same name, and stay in the bundle's
``onnx/decoder/experts.<layout>.data``, which the runner maps, copies to the device when the engine is opened, and binds. Scales and
group multipliers (half a per cent of them) stay in the engine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx

from ecmfq_export.engine.engine_file import PLUGIN_NAME
from ecmfq_export.engine.graph_file import load_graph
from ecmfq_export.errors import BuildError, BundleError

ENGINE, INPUTS = "engine", "inputs"
CHOICES = (ENGINE, INPUTS)
_PACKED = (3, 5)
"""Inputs of a plugin node that hold packed int4 weights (graph/ops.py)."""


def weights_as_inputs(onnx_path: Path) -> tuple[onnx.ModelProto, list[str]]:
    """The graph with the packed weights of its plugin nodes as inputs behind its own, and their names; the file stays as it is.

    Raises:
        BuildError: no plugin node has such weights.
    """
    model = load_graph(onnx_path)
    graph = model.graph
    packed = {node.input[place] for node in graph.node if node.op_type == PLUGIN_NAME for place in _PACKED if place < len(node.input)}
    moved = [tensor for tensor in graph.initializer if tensor.name in packed]
    if not moved:
        raise BuildError(f"{onnx_path} has no {PLUGIN_NAME} node with packed weights that could be inputs",
                         f"build with --expert-weights {ENGINE}")
    for tensor in moved:
        graph.initializer.remove(tensor)
        graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    return model, [tensor.name for tensor in moved]


def places(onnx_path: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """Where these weights of the graph lie: file beside it, offset and bytes there, dtype and shape; each by name.

    Raises:
        BuildError: a name that is no weight of the graph in a file of its own, or a damaged graph.
    """
    tensors = {tensor.name: tensor for tensor in load_graph(onnx_path).graph.initializer}
    out = {}
    for name in names:
        entries = {entry.key: entry.value for entry in tensors[name].external_data} if name in tensors else {}
        if "location" not in entries:
            raise BuildError(f"{onnx_path} has no weight '{name[:120]}' in a file beside it", "build the engine again")
        tensor = tensors[name]
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
        out[name] = {"file": entries["location"], "offset": int(entries.get("offset", "0")),
                     "bytes": int(np.prod(tensor.dims)) * dtype.itemsize, "dtype": dtype.name, "shape": list(tensor.dims)}
    return out


def mapped_weights(onnx_path: Path, names: list[str]) -> dict[str, np.ndarray]:
    """These weights of the graph, mapped read-only from their file: int8 of the graph's shapes.

    The caller has checked the hashes of the graph and of its files.

    Raises:
        BundleError: a weight that is not there as the engine takes it.
    """
    out: dict[str, np.ndarray] = {}
    for name, place in places(onnx_path, names).items():
        if place["dtype"] != "int8":
            raise BundleError(f"{onnx_path}: '{name}' is {place['dtype']}, the engine takes int8", "build the engine again")
        out[name] = np.memmap(onnx_path.parent / place["file"], np.int8, "r", place["offset"], tuple(place["shape"]))
    return out
