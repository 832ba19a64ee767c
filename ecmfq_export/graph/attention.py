"""Grouped-query attention over a static key/value cache, in opset 24 operators.

The cache form that ONNX Runtime runs and TensorRT builds: TensorScatter writes the new keys and values at each sequence's
``write_indices``, Attention reads the whole cache under a float mask and has one output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from ecmfq_export.graph.builder import GraphBuilder
from ecmfq_export.models.spec import GqaSpec


@dataclass(frozen=True)
class AttentionInputs:
    """Graph inputs that every layer shares; see graph/decoder.py for shapes."""

    cos: ir.Value
    sin: ir.Value
    mask: ir.Value
    write_indices: ir.Value


Linear = Callable[[str, ir.Value], ir.Value]
"""Emit the projection of that name for an input [batch, seq, in]."""

Norm = Callable[[str, ir.Value], ir.Value]
"""Emit the RMS norm of that name over the last axis."""


def emit_attention(
    b: GraphBuilder,
    spec: GqaSpec,
    x: ir.Value,
    inputs: AttentionInputs,
    past: tuple[ir.Value, ir.Value],
    linear: Linear,
    norm: Norm,
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Attention of `x` [batch, seq, hidden].

    Args:
        past: key and value cache, each [batch, num_kv_heads, max_seq, head_dim].

    Returns:
        output [batch, seq, hidden], and the caches with the new keys and values written.
    """
    query = _heads(b, linear("q_proj", x), spec.num_heads, spec.head_dim, "q")
    key = _heads(b, linear("k_proj", x), spec.num_kv_heads, spec.head_dim, "k")
    value = _heads(b, linear("v_proj", x), spec.num_kv_heads, spec.head_dim, "v")
    if spec.qk_norm:
        query, key = norm("q_norm", query), norm("k_norm", key)
    query, key, value = (
        b.op("Transpose", v, perm=[0, 2, 1, 3], name=f"{n}_transpose") for n, v in (("q", query), ("k", key), ("v", value))
    )
    query = b.op("RotaryEmbedding", query, inputs.cos, inputs.sin, interleaved=0, name="q_rope")
    key = b.op("RotaryEmbedding", key, inputs.cos, inputs.sin, interleaved=0, name="k_rope")
    cached_key = b.op("TensorScatter", past[0], key, inputs.write_indices, axis=2, mode="linear", name="k_cache")
    cached_value = b.op("TensorScatter", past[1], value, inputs.write_indices, axis=2, mode="linear", name="v_cache")
    attended = b.op("Attention", query, cached_key, cached_value, inputs.mask, scale=spec.head_dim**-0.5, name="attention")
    merged = b.op("Transpose", attended, perm=[0, 2, 1, 3], name="o_transpose")
    merged = b.op("Reshape", merged, b.shape_const(0, 0, spec.num_heads * spec.head_dim), name="o_merge")
    return linear("o_proj", merged), cached_key, cached_value


def _heads(b: GraphBuilder, x: ir.Value, heads: int, head_dim: int, name: str) -> ir.Value:
    return b.op("Reshape", x, b.shape_const(0, 0, heads, head_dim), name=f"{name}_heads")
