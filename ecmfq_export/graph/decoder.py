"""The decoder as an ONNX graph, emitted straight from a ModelSpec; floating point, experts as one EcmfqMoE node a layer.

Inputs, in order (T is the graph's type)::

    inputs_embeds    [batch, seq, hidden] T         token embeddings, image features in their places
    rope_cos, _sin   [batch, seq, rotated / 2] T    runtime.host_inputs.rope_tables
    attention_mask   [batch, 1, seq, max_seq] T     runtime.host_inputs.attention_mask
    write_indices    [batch] int64                  tokens in the cache before this call
    router_types     [batch, seq] int64             runtime.host_inputs.router_types (only where types have experts of their own)
    last_index       [batch] int64                  position whose logits are wanted (``logits="last"`` only)
    deepstack_{i}    [batch, seq, hidden] T         added to layer i's output; zeros at text positions
    past_key_{l}, past_value_{l}  [batch, num_kv_heads, max_seq, head_dim] T   (attention.cache_head_dim)

Outputs: ``logits`` [batch, seq or 1, vocab] float32, then ``present_key_{l}``, ``present_value_{l}`` as the past ones.
The residual stream after layer l (DeepStack included) is the value ``hidden_{l}``; :func:`add_taps` makes outputs of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import onnx_ir as ir

from ecmfq_export.errors import UnsupportedError
from ecmfq_export.graph import ops
from ecmfq_export.graph.attention import AttentionInputs, cache_head_dim, emit_attention
from ecmfq_export.graph.builder import IR_VERSION, OPSET, GraphBuilder
from ecmfq_export.graph.router import emit_router
from ecmfq_export.models.moe_vlm import layer_shapes
from ecmfq_export.models.spec import DecoderLayerSpec, DenseMlpSpec, MlaSpec, ModelSpec, MoESpec

if TYPE_CHECKING:
    import torch

F32, I64 = ir.DataType.FLOAT, ir.DataType.INT64


class WeightSource(Protocol):
    """The part of models.moe_vlm.MoEVLM that the emitter uses: shapes at once, data when the graph is written."""

    spec: ModelSpec

    def tensor(self, name: str) -> torch.Tensor: ...

    def has(self, name: str) -> bool: ...


def emit_decoder(model: WeightSource, max_seq_len: int, dtype: ir.DataType, logits: str = "all") -> ir.Model:
    """The floating-point decoder graph of `model`; no weight is read.

    Args:
        max_seq_len: length of the static cache.
        dtype: FLOAT16 or FLOAT, of activations, caches and weights (routers and logits are float32).
        logits: ``"all"`` positions, or ``"last"``: only the one that ``last_index`` names.

    Raises:
        UnsupportedError: a layer this emitter has no form for.
    """
    return _Emitter(model, max_seq_len, dtype, logits).emit()


def add_taps(model: ir.Model) -> None:
    """Make the residual stream after every layer an output ``hidden_{l}`` [batch, seq, hidden], for validation."""
    values = {v.name: v for node in model.graph for v in node.outputs}
    embeds = model.graph.inputs[0]
    present = {v.name for v in model.graph.outputs}
    for name in sorted((n for n in values if n and n.startswith("hidden_")), key=lambda n: int(n.split("_")[1])):
        if name not in present:
            values[name].shape, values[name].type = embeds.shape, embeds.type
            model.graph.outputs.append(values[name])


class _Emitter:
    def __init__(self, model: WeightSource, max_seq_len: int, dtype: ir.DataType, logits: str) -> None:
        self.model, self.spec = model, model.spec
        self.max_seq_len, self.logits = max_seq_len, logits
        self.b = GraphBuilder(dtype)
        self.types: list[ir.Value] = []
        self._layer_shapes: dict[int, dict[str, tuple[int, ...]]] = {}

    def emit(self) -> ir.Model:
        spec, b = self.spec, self.b
        hidden_shape = ["batch", "seq", spec.hidden_size]
        hidden = _input("inputs_embeds", b.dtype, hidden_shape)
        tables = [_input(f"rope_{n}", b.dtype, ["batch", "seq", spec.rope.head_dim // 2]) for n in ("cos", "sin")]
        mask = _input("attention_mask", b.dtype, ["batch", 1, "seq", self.max_seq_len])
        write = _input("write_indices", I64, ["batch"])
        self.types = [_input("router_types", I64, ["batch", "seq"])] if spec.image_expert_ids else []
        last = [_input("last_index", I64, ["batch"])] if self.logits == "last" else []
        deepstack = [_input(f"deepstack_{i}", b.dtype, hidden_shape) for i in range(spec.num_deepstack)]
        inputs = [hidden, *tables, mask, write, *self.types, *last, *deepstack]
        shared = AttentionInputs(*tables, mask, write, spec.rope.head_dim)
        presents: list[ir.Value] = []
        for layer in spec.layers:
            cache = ["batch", layer.attention.num_kv_heads, self.max_seq_len, cache_head_dim(layer.attention)]
            past = tuple(_input(f"past_{kind}_{layer.index}", b.dtype, cache) for kind in ("key", "value"))
            inputs += past
            hidden, *present = self._layer(layer, hidden, shared, past)
            if layer.index < spec.num_deepstack:
                hidden = b.op("Add", hidden, deepstack[layer.index], name=f"layers.{layer.index}/deepstack")
            hidden.name = f"hidden_{layer.index}"
            for kind, value in zip(("key", "value"), present, strict=True):
                _output(value, f"present_{kind}_{layer.index}", b.dtype, cache)
            presents += present
        outputs = [self._head(hidden, last), *presents]
        graph = ir.Graph(
            inputs,
            outputs,
            nodes=b.nodes,
            initializers=list(b.initializers.values()),
            name="decoder",
            opset_imports={"": OPSET, ops.DOMAIN: ops.VERSION},
        )
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="ecmfq_export")

    def _layer(
        self, layer: DecoderLayerSpec, hidden: ir.Value, shared: AttentionInputs, past: tuple[ir.Value, ir.Value]
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        b, prefix = self.b, f"layers.{layer.index}"

        def linear(name: str, x: ir.Value) -> ir.Value:
            return self._linear(f"{prefix}.self_attn.{name}", name, x)

        def norm(name: str, x: ir.Value) -> ir.Value:
            epsilon = layer.attention.latent_norm_eps if isinstance(layer.attention, MlaSpec) else None
            return self._norm(f"{prefix}.self_attn.{name}", name, x, epsilon)

        with b.scope(prefix):
            x = self._norm(f"{prefix}.input_layernorm", "input_layernorm", hidden)
            with b.scope("self_attn"):
                x, key, value = emit_attention(b, layer.attention, x, shared, past, linear, norm)
            hidden = b.op("Add", hidden, x, name="attention_residual")
            x = self._norm(f"{prefix}.post_attention_layernorm", "post_attention_layernorm", hidden)
            with b.scope("mlp"):
                x = self._moe(prefix, layer.mlp, x) if isinstance(layer.mlp, MoESpec) else self._dense(prefix, layer.mlp, x)
            return b.op("Add", hidden, x, name="mlp_residual"), key, value

    def _moe(self, prefix: str, spec: MoESpec, x: ir.Value) -> ir.Value:
        if spec.activation not in ops.ACTIVATIONS:
            raise UnsupportedError(f"{prefix}: activation {spec.activation}", f"supported: {', '.join(ops.ACTIVATIONS)}")
        b, name = self.b, f"{prefix}.mlp.router.weight"
        with b.scope("router"):
            weight = b.weight(name, F32, [spec.hidden_size, spec.router_rows], lambda: self.model.tensor(name).float().T)
            bias = None
            if spec.router.selection_bias:
                bias_name = f"{prefix}.mlp.router.selection_bias"
                bias = b.weight(bias_name, F32, [spec.router_rows], lambda: self.model.tensor(bias_name))
            ids, weights = emit_router(b, spec, x, weight, bias, self.types[0] if spec.type_parts else None)
        e, i, h = spec.total_experts, spec.intermediate_size, spec.hidden_size
        gate_up = self._weight(f"{prefix}.mlp.experts.gate_up_proj", [e, 2 * i, h])
        down = self._weight(f"{prefix}.mlp.experts.down_proj", [e, h, i])
        return b.op(ops.FLOAT_MOE, x, ids, weights, gate_up, down, domain=ops.DOMAIN, name="experts", **ops.moe_attributes(spec))

    def _dense(self, prefix: str, spec: DenseMlpSpec, x: ir.Value) -> ir.Value:
        gate = self._linear(f"{prefix}.mlp.gate_proj", "gate_proj", x)
        up = self._linear(f"{prefix}.mlp.up_proj", "up_proj", x)
        silu = self.b.op("Mul", gate, self.b.op("Sigmoid", gate, name="sigmoid"), name="silu")
        return self._linear(f"{prefix}.mlp.down_proj", "down_proj", self.b.op("Mul", silu, up, name="gated"))

    def _head(self, hidden: ir.Value, last: list[ir.Value]) -> ir.Value:
        b, spec = self.b, self.spec
        if last:
            # [batch] -> [batch, 1, 1]: one position a sequence, before the norm and the large projection.
            index = b.op("Reshape", last[0], b.shape_const(-1, 1, 1), name="last_position")
            hidden = b.op("GatherND", hidden, index, batch_dims=1, name="last_hidden")
        x = self._norm("norm", "norm", hidden)
        source = spec.output_projection
        weight = b.weight("lm_head.weight", b.dtype, [spec.hidden_size, spec.vocab_size], lambda: self.model.tensor(source).T, source)
        logits = b.op("MatMul", x, weight, name="lm_head")
        if b.dtype != F32:
            logits = b.cast(logits, F32, "logits_cast")
        _output(logits, "logits", F32, ["batch", 1 if last else "seq", spec.vocab_size])
        return logits

    def _linear(self, canonical: str, name: str, x: ir.Value) -> ir.Value:
        """x [..., in] times a weight stored [in, out], as MatMul takes it, plus the bias where the checkpoint has one."""
        shape = self._shapes(canonical)
        weight = self.b.weight(
            f"{canonical}.weight",
            self.b.dtype,
            [shape[1], shape[0]],
            lambda: self.model.tensor(f"{canonical}.weight").T,
        )
        out = self.b.op("MatMul", x, weight, name=name)
        if self.model.has(f"{canonical}.bias"):
            out = self.b.op("Add", out, self._weight(f"{canonical}.bias", [shape[0]]), name=f"{name}_bias")
        return out

    def _shapes(self, canonical: str) -> tuple[int, int]:
        """[out, in] of a dense projection, from the spec."""
        rows, columns = self._shape(f"{canonical}.weight")
        return rows, columns

    def _shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor by canonical name."""
        if name == "norm.weight":
            return (self.spec.hidden_size,)
        _, index, suffix = name.split(".", 2)
        layer = self.spec.layers[int(index)]
        if layer.index not in self._layer_shapes:
            self._layer_shapes[layer.index] = layer_shapes(self.spec, layer)
        return self._layer_shapes[layer.index][suffix]

    def _norm(self, canonical: str, name: str, x: ir.Value, epsilon: float | None = None) -> ir.Value:
        scale = self._weight(f"{canonical}.weight", list(self._shape(f"{canonical}.weight")))
        return self.b.op("RMSNormalization", x, scale, axis=-1, epsilon=self.spec.rms_norm_eps if epsilon is None else epsilon, name=name)

    def _weight(self, name: str, shape: list[int]) -> ir.Value:
        return self.b.weight(name, self.b.dtype, shape, lambda: self.model.tensor(name))


def _input(name: str, dtype: ir.DataType, shape: list[int | str]) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


def _output(value: ir.Value, name: str, dtype: ir.DataType, shape: list[int | str]) -> None:
    value.name, value.shape, value.type = name, ir.Shape(shape), ir.TensorType(dtype)
