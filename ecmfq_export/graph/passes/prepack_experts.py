"""Expert weights in the order that a target's kernels read them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from ecmfq_export.errors import UnsupportedError
from ecmfq_export.graph import ops
from ecmfq_export.quant.kernel_layout import prepack_mma_s8

Prepack = Callable[[np.ndarray, bool], np.ndarray]
"""Packed int4 [E, N, K / 2] and whether it holds gate and up rows, to the same shape in another order."""

LAYOUTS: dict[str, Prepack | None] = {"row_major": None, "mma_s8": prepack_mma_s8}

_QWEIGHTS = {3: True, 5: False}
"""Input index of EcmfqRoutedMoE's weights, and whether gate and up rows are in it."""


class PrepackExpertsPass(ir.passes.InPlacePass):
    """Reorder the weights of every EcmfqRoutedMoE node from row-major to `layout`, lazily, and say so on the node."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        if layout not in LAYOUTS:
            raise UnsupportedError(f"weight_layout '{layout}' is not supported", f"one of {', '.join(LAYOUTS)}")
        self.layout = layout

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite `model`; sizes that the layout does not tile raise a UserError when the weights are written."""
        prepack = LAYOUTS[self.layout]
        if prepack is None:
            return ir.passes.PassResult(model, False)
        modified = False
        for node in model.graph:
            if node.domain != ops.DOMAIN or node.op_type != ops.ROUTED_MOE:
                continue
            if node.attributes["weight_layout"].as_string() != "row_major":
                continue
            for index, interleave in _QWEIGHTS.items():
                value = node.inputs[index]
                value.const_value = _prepacked(value.const_value, prepack, interleave)
            node.attributes["weight_layout"] = ir.AttrString("weight_layout", self.layout)
            modified = True
        return ir.passes.PassResult(model, modified)


def _prepacked(tensor: ir.TensorProtocol, prepack: Prepack, interleave: bool) -> ir.LazyTensor:
    def load() -> ir.Tensor:
        packed = prepack(tensor.numpy(), interleave)
        if isinstance(tensor, ir.ExternalTensor):
            tensor.release()  # its file's mapping, which would stay resident for every layer until the end
        return ir.Tensor(packed, dtype=tensor.dtype, name=tensor.name)

    return ir.LazyTensor(load, dtype=tensor.dtype, shape=tensor.shape, name=tensor.name)
