"""A short way to write ONNX nodes with onnx-ir, and weights that are read from disk only when the file is written."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from ecmfq_export.errors import CheckpointError, UnsupportedError

if TYPE_CHECKING:
    import torch

OPSET = 24
"""First opset with TensorScatter, and Attention with one output over a static cache."""

IR_VERSION = 12

DTYPES = {"float16": ir.DataType.FLOAT16, "float32": ir.DataType.FLOAT}
"""Activation types of graphs. bfloat16 runs neither in ONNX Runtime's CPU kernels nor below SM80."""

SOURCE = "tensor"
"""Key of ``Value.meta`` under which a weight keeps its canonical name (models/spec.py) for the passes."""


def graph_dtype(name: str) -> ir.DataType:
    """The ONNX type of activations called `name`.

    Raises:
        UnsupportedError: another type than float16 and float32.
    """
    if name not in DTYPES:
        raise UnsupportedError(f"graph dtype '{name}' is not supported", f"use {' or '.join(DTYPES)}")
    return DTYPES[name]


class GraphBuilder:
    """Collects nodes and initializers under readable names (``layers.0/self_attn/q_proj``).

    Attributes:
        dtype: type of activations and floating-point weights.
        nodes: in order of creation, which is a topological order.
        initializers: by name.
    """

    def __init__(self, dtype: ir.DataType) -> None:
        self.dtype = dtype
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self._scope: list[str] = []
        self._used: dict[str, int] = {}

    @contextlib.contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Prefix the names of what is built inside."""
        self._scope.append(name)
        yield
        self._scope.pop()

    def op(self, op_type: str, *inputs: ir.Value | None, name: str = "", domain: str = "", **attributes: Any) -> ir.Value:
        """Append a node with one output and return that output."""
        return self.ops(op_type, *inputs, name=name, domain=domain, outputs=1, **attributes)[0]

    def ops(
        self, op_type: str, *inputs: ir.Value | None, outputs: int, name: str = "", domain: str = "", **attributes: Any
    ) -> Sequence[ir.Value]:
        """Append a node with several outputs."""
        full = self._unique(name or op_type)
        made = ir.node(op_type, inputs, attributes, domain=domain, num_outputs=outputs, name=full)
        for index, value in enumerate(made.outputs):
            value.name = f"{full}:{index}" if outputs > 1 else f"{full}:out"
        self.nodes.append(made)
        return made.outputs

    def replace(self, graph: ir.Graph, node: ir.Node, output: ir.Value) -> None:
        """Put what was built in `node`'s place in `graph`; `output` takes the name, type and uses of the node's output.

        An initializer that the graph already has under its name is shared.
        """
        for value in self.initializers.values():
            existing = graph.initializers.get(value.name)
            if existing is None:
                graph.register_initializer(value)
            else:
                ir.convenience.replace_all_uses_with(value, existing)
        graph.insert_before(node, self.nodes)
        old = node.outputs[0]
        output.name, output.shape, output.type = old.name, old.shape, old.type
        ir.convenience.replace_all_uses_with(old, output, replace_graph_outputs=True)
        graph.remove(node, safe=True)

    def const(self, value: Any, dtype: ir.DataType, name: str) -> ir.Value:
        """A small constant, shared by its `name`; call again with the same value to use it again."""
        if name not in self.initializers:
            array = np.asarray(value, dtype=dtype.numpy())
            self._add(name, ir.tensor(array, dtype=dtype, name=name))
        return self.initializers[name]

    def shape_const(self, *dims: int) -> ir.Value:
        """An int64 vector for Reshape and the like; 0 copies a dimension."""
        return self.const(dims, ir.DataType.INT64, "shape_" + "_".join(str(d).replace("-", "m") for d in dims))

    def weight(
        self,
        name: str,
        dtype: ir.DataType,
        shape: Sequence[int],
        load: Callable[[], torch.Tensor],
        source: str | None = None,
    ) -> ir.Value:
        """An initializer whose data `load` gives when the model is written.

        Args:
            name: of the initializer.
            dtype: of the initializer; the loaded tensor is converted, and must not overflow.
            shape: of the initializer.
            load: called once, at writing, and its result dropped after.
            source: canonical tensor name (default: `name`).
        """
        if name not in self.initializers:
            self._add(name, lazy_tensor(name, dtype, shape, load))
            self.initializers[name].meta[SOURCE] = source or name
        return self.initializers[name]

    def cast(self, value: ir.Value, dtype: ir.DataType, name: str = "Cast") -> ir.Value:
        """`value` as `dtype`, always a node: the caller knows whether one is needed."""
        return self.op("Cast", value, to=int(dtype), name=name)

    def _add(self, name: str, tensor: ir.TensorProtocol) -> None:
        value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.initializers[name] = value

    def _unique(self, name: str) -> str:
        full = "/".join([*self._scope, name])
        count = self._used.get(full, 0)
        self._used[full] = count + 1
        return f"{full}_{count}" if count else full


def lazy_tensor(name: str, dtype: ir.DataType, shape: Sequence[int], load: Callable[[], torch.Tensor]) -> ir.LazyTensor:
    """A tensor of `dtype` and `shape` that `load` reads when it is written; nothing is cached."""

    def materialize() -> ir.Tensor:
        return ir.Tensor(to_numpy(load(), dtype, name, tuple(shape)), dtype=dtype, name=name)

    return ir.LazyTensor(materialize, dtype=dtype, shape=ir.Shape(shape), name=name)


def to_numpy(tensor: torch.Tensor, dtype: ir.DataType, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Convert for ONNX.

    Raises:
        CheckpointError: a value that `dtype` cannot hold.
        ValueError: another shape than promised (a mistake of ours).
    """
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: loaded {tuple(tensor.shape)}, promised {shape}")
    if dtype == ir.DataType.INT4:
        return tensor.contiguous().numpy().astype(ml_dtypes.int4)
    if dtype in (ir.DataType.FLOAT16, ir.DataType.FLOAT):
        # NumPy has no bfloat16: by way of float32, which holds it exactly.
        with np.errstate(over="ignore"):
            converted = tensor.float().contiguous().numpy()
            converted = converted.astype(dtype.numpy(), copy=False)
        if not np.isfinite(converted).all():
            raise CheckpointError(
                f"{name} holds values up to {float(tensor.float().abs().max()):.4g}, beyond {dtype.name}",
                "export with dtype float32",
            )
        return converted
    return tensor.contiguous().numpy()
