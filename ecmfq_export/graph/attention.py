"""Grouped-query and latent attention over a static key/value cache, in opset 24 operators.

The cache form that ONNX Runtime runs and TensorRT builds: TensorScatter writes the new keys and values at each sequence's
``write_indices``, Attention reads the whole cache under a float mask and has one output. Latent attention caches its expanded
keys and values; TensorRT's Attention wants both of one shape, so the narrower ones are padded with zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from ecmfq_export.graph.builder import GraphBuilder
from ecmfq_export.models.spec import AttentionSpec, GqaSpec, MlaSpec


@dataclass(frozen=True)
class AttentionInputs:
    """Graph inputs that every layer shares; see graph/decoder.py for shapes.

    Attributes:
        rotated: channels of a head that cos and sin rotate.
    """

    cos: ir.Value
    sin: ir.Value
    mask: ir.Value
    write_indices: ir.Value
    rotated: int


Linear = Callable[[str, ir.Value], ir.Value]
"""Emit the projection of that name for an input [batch, seq, in]."""

Norm = Callable[[str, ir.Value], ir.Value]
"""Emit the RMS norm of that name over the last axis."""


def emit_attention(
    b: GraphBuilder,
    spec: AttentionSpec,
    x: ir.Value,
    inputs: AttentionInputs,
    past: tuple[ir.Value, ir.Value],
    linear: Linear,
    norm: Norm,
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Attention of `x` [batch, seq, hidden].

    Args:
        past: key and value cache, each [batch, num_kv_heads, max_seq, cache_head_dim].

    Returns:
        output [batch, seq, hidden], and the caches with the new keys and values written.
    """
    emit = _gqa if isinstance(spec, GqaSpec) else _mla
    query, key, value = emit(b, spec, x, inputs, linear, norm)
    query, key = (_pad(b, v, spec.key_head_dim, cache_head_dim(spec), n) for n, v in (("q", query), ("k", key)))
    value = _pad(b, value, spec.value_head_dim, cache_head_dim(spec), "v")
    cached_key = b.op("TensorScatter", past[0], key, inputs.write_indices, axis=2, mode="linear", name="k_cache")
    cached_value = b.op("TensorScatter", past[1], value, inputs.write_indices, axis=2, mode="linear", name="v_cache")
    attended = b.op("Attention", query, cached_key, cached_value, inputs.mask, scale=spec.scale, name="attention")
    if spec.value_head_dim < cache_head_dim(spec):
        attended, _ = _split(b, attended, (spec.value_head_dim, cache_head_dim(spec) - spec.value_head_dim), "o_unpad")
    merged = b.op("Transpose", attended, perm=[0, 2, 1, 3], name="o_transpose")
    merged = b.op("Reshape", merged, b.shape_const(0, 0, spec.num_heads * spec.value_head_dim), name="o_merge")
    return linear("o_proj", merged), cached_key, cached_value


def cache_head_dim(spec: AttentionSpec) -> int:
    """Channels of one head in the key and in the value cache."""
    return max(spec.key_head_dim, spec.value_head_dim)


def _pad(b: GraphBuilder, x: ir.Value, size: int, wanted: int, name: str) -> ir.Value:
    """x [batch, heads, seq, size] with zeros up to `wanted` channels."""
    return x if size == wanted else b.op("Pad", x, b.shape_const(*[0] * 7, wanted - size), name=f"{name}_pad")


def _gqa(
    b: GraphBuilder, spec: GqaSpec, x: ir.Value, inputs: AttentionInputs, linear: Linear, norm: Norm
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Rotated queries and keys, and values, [batch, heads, seq, head_dim]."""
    query = _heads(b, linear("q_proj", x), spec.num_heads, spec.head_dim, "q")
    key = _heads(b, linear("k_proj", x), spec.num_kv_heads, spec.head_dim, "k")
    value = _heads(b, linear("v_proj", x), spec.num_kv_heads, spec.head_dim, "v")
    if spec.qk_norm:
        query, key = norm("q_norm", query), norm("k_norm", key)
    query, key, value = (
        b.op("Transpose", v, perm=[0, 2, 1, 3], name=f"{n}_transpose") for n, v in (("q", query), ("k", key), ("v", value))
    )
    return _rotate(b, query, spec, inputs, "q"), _rotate(b, key, spec, inputs, "k"), value


def _rotate(b: GraphBuilder, x: ir.Value, spec: GqaSpec, inputs: AttentionInputs, name: str) -> ir.Value:
    """x [batch, heads, seq, head_dim], its first ``inputs.rotated`` channels rotated."""
    pairs = int(spec.rope_interleaved)
    if inputs.rotated == spec.head_dim:
        return b.op("RotaryEmbedding", x, inputs.cos, inputs.sin, interleaved=pairs, name=f"{name}_rope")
    first, rest = _split(b, x, (inputs.rotated, spec.head_dim - inputs.rotated), f"{name}_split")
    first = b.op("RotaryEmbedding", first, inputs.cos, inputs.sin, interleaved=pairs, name=f"{name}_rope")
    return b.op("Concat", first, rest, axis=-1, name=f"{name}_joined")


def _mla(
    b: GraphBuilder, spec: MlaSpec, x: ir.Value, inputs: AttentionInputs, linear: Linear, norm: Norm
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Queries and keys [batch, heads, seq, qk_head_dim], their last channels rotated, and values [batch, heads, seq, v_head_dim].

    Rotation leaves interleaved pairs where they are: queries and keys agree, and a product does not ask for the order.
    """
    heads, nope, rope = spec.num_heads, spec.qk_nope_head_dim, spec.qk_rope_head_dim
    if spec.q_lora_rank is None:
        query = linear("q_proj", x)
    else:
        query = linear("q_b_proj", norm("q_a_norm", linear("q_a_proj", x)))
    latent, key_rope = _split(b, linear("kv_a_proj", x), (spec.kv_lora_rank, rope), "kv_a_split")
    expanded = linear("kv_b_proj", norm("kv_a_norm", latent))
    query, expanded = (
        b.op("Transpose", _heads(b, v, heads, size, n), perm=[0, 2, 1, 3], name=f"{n}_transpose")
        for n, v, size in (("q", query, spec.qk_head_dim), ("kv", expanded, nope + spec.v_head_dim))
    )
    query_nope, query_rope = _split(b, query, (nope, rope), "q_split")
    key_nope, value = _split(b, expanded, (nope, spec.v_head_dim), "kv_split")
    key_rope = b.op("Unsqueeze", key_rope, b.const([1], ir.DataType.INT64, "axis_1"), name="k_rope_head")
    pairs = int(spec.rope_interleaved)
    query_rope, key_rope = (
        b.op("RotaryEmbedding", v, inputs.cos, inputs.sin, interleaved=pairs, name=f"{n}_rope")
        for n, v in (("q", query_rope), ("k", key_rope))
    )
    key_rope = b.op("Expand", key_rope, b.shape_const(1, heads, 1, 1), name="k_rope_expanded")
    query = b.op("Concat", query_nope, query_rope, axis=-1, name="q_joined")
    return query, b.op("Concat", key_nope, key_rope, axis=-1, name="k_joined"), value


def _split(b: GraphBuilder, x: ir.Value, sizes: tuple[int, int], name: str) -> tuple[ir.Value, ir.Value]:
    first, second = b.ops("Split", x, b.shape_const(*sizes), axis=-1, outputs=2, name=name)
    return first, second


def _heads(b: GraphBuilder, x: ir.Value, heads: int, head_dim: int, name: str) -> ir.Value:
    return b.op("Reshape", x, b.shape_const(0, 0, heads, head_dim), name=f"{name}_heads")
