"""The PyTorch reference of a decoder, driven by its spec, one layer in memory at a time.

A floating-point checkpoint gives transformers' own numbers; a quantized one gives the integer arithmetic that the plugin
and the graphs are held to (``EcmfqRoutedMoE`` for experts, dynamic per-token int8 for dense linears).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from threading import Lock

import torch
from torch.nn import functional as F

from ecmfq_export.models import torch_math
from ecmfq_export.models.inputs import DecoderInputs
from ecmfq_export.models.moe_vlm import MoEVLM, layer_shapes
from ecmfq_export.models.spec import DecoderLayerSpec, GqaSpec, MlaSpec, MoESpec
from ecmfq_export.models.torch_math import Dispatch, IntegerWeight, Routing, quantized_grouped_linear, quantized_linear
from ecmfq_export.quant.activation import quantize_per_token
from ecmfq_export.quant.hadamard import block_hadamard
from ecmfq_export.quant.qtensor import QTensor


@dataclass
class LayerCache:
    """Keys (rotated) and values of one layer, [B, kv_heads, S_kv, key_head_dim or value_head_dim]; grows by what each call appends."""

    key: torch.Tensor | None = None
    value: torch.Tensor | None = None

    def append(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add new positions along S_kv and return all of them."""
        if self.key is not None and self.value is not None:
            key, value = torch.cat((self.key, key), dim=2), torch.cat((self.value, value), dim=2)
        self.key, self.value = key, value
        return key, value

    def take(self, rows: torch.Tensor) -> LayerCache:
        """A new cache that holds `rows` [n] int64 of this one, each as often as it is listed: many sequences go on from one."""
        if self.key is None or self.value is None:
            return LayerCache()
        return LayerCache(self.key[rows], self.value[rows])


@dataclass
class DecoderLayer:
    """One decoder layer with its weights.

    Attributes:
        spec: what it is made of.
        eps: of its RMS norms.
        tensors: floating tensors by canonical suffix (``"input_layernorm.weight"``), in the computing dtype.
        quantized: quantized weights by canonical suffix; a weight is in exactly one of the two.
        down_block: block of the Hadamard between the intermediate and the down projection, whose weight has it in its columns
            too; 1 for none.
    """

    spec: DecoderLayerSpec
    eps: float
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    quantized: dict[str, QTensor] = field(default_factory=dict)
    down_block: int = 1
    _widened: dict[str, tuple[QTensor, IntegerWeight]] = field(default_factory=dict, repr=False)
    _lock: Lock = field(default_factory=Lock, repr=False, compare=False)

    def forward(
        self,
        hidden: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        mask: torch.Tensor,
        cache: LayerCache | None = None,
        types: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The layer's output [B, S, hidden]; arguments as :meth:`attend` and :meth:`mlp`. DeepStack features are added by the caller."""
        out, _ = self.attend(self.attention_input(hidden), cos, sin, mask, cache)
        hidden = hidden + out
        return hidden + self.mlp(self.moe_input(hidden), types)

    __call__ = forward

    def attention_input(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the attention's first projections read: the input norm's output [B, S, hidden]."""
        return torch_math.rms_norm(hidden, self.tensors["input_layernorm.weight"], self.eps)

    def attend(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        mask: torch.Tensor,
        cache: LayerCache | None = None,
        need_weights: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention on normed x [B, S, hidden].

        Args:
            cos, sin: [B, S, rotated channels of a head].
            mask: additive [B, 1, S, S_kv].
            cache: earlier positions; new ones are appended to it.
            need_weights: also return the probabilities.

        Returns:
            out [B, S, hidden], to be added to the residual stream; probabilities [B, heads, S, S_kv] or None.
        """
        context, probs = self.attention_context(x, cos, sin, mask, cache)
        return self.linear(context, "self_attn.o_proj"), probs if need_weights else None

    def attention_context(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        mask: torch.Tensor,
        cache: LayerCache | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the output projection reads, [B, S, heads * value_head_dim], and the probabilities; arguments as :meth:`attend`."""
        spec = self.spec.attention
        query, key, value = self._gqa(x, cos, sin, spec) if isinstance(spec, GqaSpec) else self._mla(x, cos, sin, spec)
        if cache is not None:
            key, value = cache.append(key, value)
        return torch_math.attention(query, key, value, mask, spec)

    def q_latent(self, x: torch.Tensor) -> torch.Tensor:
        """What q_b_proj reads (MLA with ``q_lora_rank``), [B, S, q_lora_rank], for normed x [B, S, hidden]."""
        eps = self._latent_spec().latent_norm_eps
        return torch_math.rms_norm(self.linear(x, "self_attn.q_a_proj"), self.tensors["self_attn.q_a_norm.weight"], eps)

    def kv_latent(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What kv_b_proj reads (MLA), [B, S, kv_lora_rank], and the unrotated shared key part [B, S, qk_rope_head_dim]."""
        spec = self._latent_spec()
        latent, rope = self.linear(x, "self_attn.kv_a_proj").split([spec.kv_lora_rank, spec.qk_rope_head_dim], dim=-1)
        return torch_math.rms_norm(latent, self.tensors["self_attn.kv_a_norm.weight"], spec.latent_norm_eps), rope

    def _gqa(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, spec: GqaSpec) -> tuple[torch.Tensor, ...]:
        query, key, value = (_heads(self.linear(x, f"self_attn.{name}_proj"), spec.head_dim) for name in "qkv")
        if spec.qk_norm:
            query = torch_math.rms_norm(query, self.tensors["self_attn.q_norm.weight"], self.eps)
            key = torch_math.rms_norm(key, self.tensors["self_attn.k_norm.weight"], self.eps)
        if spec.rope_interleaved:
            query, key = torch_math.pairs_to_halves(query), torch_math.pairs_to_halves(key)
        return torch_math.rotate(query, cos, sin), torch_math.rotate(key, cos, sin), value

    def _mla(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, spec: MlaSpec) -> tuple[torch.Tensor, ...]:
        if spec.q_lora_rank is None:
            query = self.linear(x, "self_attn.q_proj")
        else:
            query = self.linear(self.q_latent(x), "self_attn.q_b_proj")
        latent, key_rope = self.kv_latent(x)
        query_nope, query_rope = _heads(query, spec.qk_head_dim).split([spec.qk_nope_head_dim, spec.qk_rope_head_dim], -1)
        expanded = _heads(self.linear(latent, "self_attn.kv_b_proj"), spec.qk_nope_head_dim + spec.v_head_dim)
        key_nope, value = expanded.split([spec.qk_nope_head_dim, spec.v_head_dim], -1)
        rope = (query_rope, key_rope.unsqueeze(1))
        if spec.rope_interleaved:
            rope = tuple(torch_math.pairs_to_halves(part) for part in rope)
        query_rope, key_rope = (torch_math.rotate(part, cos, sin) for part in rope)
        key_rope = key_rope.expand(-1, spec.num_heads, -1, -1)
        return torch.cat((query_nope, query_rope), -1), torch.cat((key_nope, key_rope), -1), value

    def moe_input(self, hidden: torch.Tensor) -> torch.Tensor:
        """What router and experts (or the dense MLP) read: the second norm's output [B, S, hidden]."""
        return torch_math.rms_norm(hidden, self.tensors["post_attention_layernorm.weight"], self.eps)

    def mlp(self, x: torch.Tensor, types: torch.Tensor | None = None) -> torch.Tensor:
        """The routed or dense MLP on normed x [B, S, hidden], to be added to the residual stream.

        Args:
            types: int64 [B, S], ``DecoderInputs.router_types``; read only where types have experts of their own.
        """
        if isinstance(self.spec.mlp, MoESpec):
            tokens = x.reshape(-1, x.shape[-1])
            return self.experts(tokens, self.route(tokens, None if types is None else types.reshape(-1))).view(x.shape)
        return self.linear(self.dense_intermediate(x), "mlp.down_proj")

    def dense_intermediate(self, x: torch.Tensor) -> torch.Tensor:
        """What a dense MLP's down_proj reads, [..., intermediate], for x [..., hidden]."""
        return self._down_input(F.silu(self.linear(x, "mlp.gate_proj")) * self.linear(x, "mlp.up_proj"))

    def route(self, x: torch.Tensor, types: torch.Tensor | None = None) -> Routing:
        """Routing of tokens x [T, hidden].

        Args:
            types: int64 [T], as for :meth:`mlp`.

        Raises:
            ValueError: none are given, and types have experts of their own.
        """
        mlp = self._moe()
        bias = self.tensors.get("mlp.router.selection_bias")
        if mlp.type_parts:
            if types is None:
                raise ValueError(f"layer {self.spec.index} routes by token types, and none are given")
            return torch_math.route_by_type(x, self.tensors["mlp.router.weight"], mlp, types, bias)
        return torch_math.route(x, self.tensors["mlp.router.weight"], mlp.router, mlp.top_k, bias, mlp.num_shared_experts)

    def experts(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """The weighted sum of routed and shared experts on tokens x [T, hidden] to [T, hidden].

        Quantized weights compute what docs/graph.md says of ``EcmfqRoutedMoE``: x quantized once a token, the intermediate once a
        row, integer products, slots summed in ascending order.
        """
        where = self.dispatch(routing)
        rows = self.expert_down(self.expert_intermediate(x, where), where)
        return self.combine(rows, where, routing).to(x.dtype)

    def dispatch(self, routing: Routing) -> Dispatch:
        """The routed pairs sorted by expert."""
        mlp = self._moe()
        return torch_math.dispatch(routing.topk_ids, mlp.total_experts, empty_slots=bool(mlp.type_parts))

    def expert_intermediate(self, x: torch.Tensor, where: Dispatch) -> torch.Tensor:
        """What down_proj reads: ``silu(gate) * up`` (in blocks of a Hadamard where `down_block` says so) [T * num_slots, intermediate],
        rows as in `where`, for tokens x [T, hidden]."""
        name = "mlp.experts.gate_up_proj"
        if name in self.quantized:
            qx, scale = quantize_per_token(x)
            gate_up = quantized_grouped_linear(qx[where.token], scale[where.token], self._integers(name), where)
        else:
            gate_up = torch_math.grouped_linear(x[where.token], self.tensors[name], where.offsets)
        gate, up = gate_up.chunk(2, dim=-1)
        return self._down_input(F.silu(gate) * up)

    def expert_down(self, inner: torch.Tensor, where: Dispatch) -> torch.Tensor:
        """Each pair's expert output [T * num_slots, hidden], rows as in `where`."""
        name = "mlp.experts.down_proj"
        if name in self.quantized:
            qx, scale = quantize_per_token(inner)
            return quantized_grouped_linear(qx, scale, self._integers(name), where)
        return torch_math.grouped_linear(inner, self.tensors[name], where.offsets)

    def combine(self, rows: torch.Tensor, where: Dispatch, routing: Routing) -> torch.Tensor:
        """The tokens' weighted sums [T, hidden] of expert outputs `rows`."""
        return torch_math.combine(rows, where, routing.topk_weights)

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """The dense projection of canonical suffix `name` (without ``.weight``), floating or quantized."""
        bias = self.tensors.get(f"{name}.bias")
        if f"{name}.weight" in self.quantized:
            return quantized_linear(x, self._integers(f"{name}.weight"), bias).to(x.dtype)
        return F.linear(x, self.tensors[f"{name}.weight"], bias)

    def to(self, device: str) -> DecoderLayer:
        """The layer with its weights on `device`; itself where they are there."""
        if all(tensor.device == torch.device(device) for tensor in self.tensors.values()):
            return self
        tensors = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        quantized = {name: weight.to(device) for name, weight in self.quantized.items()}
        return DecoderLayer(self.spec, self.eps, tensors, quantized, self.down_block)

    def _down_input(self, inner: torch.Tensor) -> torch.Tensor:
        return inner if self.down_block == 1 else block_hadamard(inner.shape[-1], self.down_block).apply(inner)

    def drop_integers(self) -> None:
        """Forget the widened form of quantized weights, four bytes a value; it is made again when it is needed."""
        self._widened.clear()

    def _integers(self, name: str) -> IntegerWeight:
        """The widened form of a quantized weight, kept until another QTensor takes its place."""
        weight = self.quantized[name]
        with self._lock:  # threads that compute experts of the same layer share it
            kept = self._widened.get(name)
            if kept is None or kept[0] is not weight:
                kept = self._widened[name] = (weight, IntegerWeight.of(weight))
        return kept[1]

    def _latent_spec(self) -> MlaSpec:
        if not isinstance(self.spec.attention, MlaSpec):
            raise ValueError(f"layer {self.spec.index} has no latent attention")
        return self.spec.attention

    def _moe(self) -> MoESpec:
        if not isinstance(self.spec.mlp, MoESpec):
            raise ValueError(f"layer {self.spec.index} is dense")
        return self.spec.mlp


def _heads(x: torch.Tensor, head_dim: int) -> torch.Tensor:
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def load_layer(model: MoEVLM, index: int, dtype: torch.dtype = torch.float32) -> DecoderLayer:
    """Decoder layer `index`, floating tensors in `dtype`, quantized weights as they are.

    Raises:
        CheckpointError: a damaged tensor.
    """
    spec = model.spec.layers[index]
    layer = DecoderLayer(spec, model.spec.rms_norm_eps)
    for suffix in layer_shapes(model.spec, spec):
        name = f"layers.{index}.{suffix}"
        if model.quantization is not None and name in model.quantization.blocks:
            layer.down_block = model.quantization.blocks[name]
        if model.recipe(name) == "float":
            layer.tensors[suffix] = model.tensor(name).to(dtype)
        else:
            layer.quantized[suffix] = model.qtensor(name)
    return layer


def final_norm(model: MoEVLM, hidden: torch.Tensor) -> torch.Tensor:
    """What the output projection reads: the last layer's [..., hidden] after the final norm."""
    return torch_math.rms_norm(hidden, model.tensor("norm.weight").to(hidden.dtype), model.spec.rms_norm_eps)


@dataclass(frozen=True)
class OutputHead:
    """Final norm and output projection, in memory.

    Attributes:
        norm: [hidden], in the computing dtype; eps: of the norm.
        weight: [vocab, hidden], in the computing dtype or quantized.
    """

    norm: torch.Tensor
    eps: float
    weight: torch.Tensor | IntegerWeight

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """The last layer's [..., hidden] to float32 logits [..., vocab]."""
        normed = torch_math.rms_norm(hidden, self.norm, self.eps)
        if isinstance(self.weight, IntegerWeight):
            return quantized_linear(normed, self.weight)
        return F.linear(normed, self.weight).float()


def load_head(model: MoEVLM, dtype: torch.dtype = torch.float32) -> OutputHead:
    """The model's head, floating tensors in `dtype`; reads the output projection from disk."""
    name = model.spec.output_projection
    weight = model.tensor(name).to(dtype) if model.recipe(name) == "float" else IntegerWeight.of(model.qtensor(name))
    return OutputHead(model.tensor("norm.weight").to(dtype), model.spec.rms_norm_eps, weight)


def decoder_logits(model: MoEVLM, hidden: torch.Tensor) -> torch.Tensor:
    """Final norm and output projection, read for this one call: the last layer's [..., hidden] to float32 logits [..., vocab]."""
    return load_head(model, hidden.dtype)(hidden)


def run_decoder(
    model: MoEVLM,
    inputs: DecoderInputs,
    layers: Iterable[DecoderLayer] | None = None,
    on_layer: Callable[[int, torch.Tensor], None] | None = None,
    caches: list[LayerCache] | None = None,
) -> torch.Tensor:
    """Float32 logits [B, S, vocab] of a prepared batch.

    Args:
        layers: loaded layers in order, e.g. to run several batches without reading them again; by default each is read from
            disk and dropped after use.
        on_layer: called with the layer's index and its output [B, S, hidden], DeepStack features included.
        caches: one for each layer, to continue a sequence; ``inputs.mask`` then spans the cached positions too.
    """
    loaded = (load_layer(model, i, inputs.inputs_embeds.dtype) for i in range(model.spec.num_layers))
    hidden = inputs.inputs_embeds
    for index, layer in enumerate(loaded if layers is None else layers):
        cache = None if caches is None else caches[index]
        hidden = layer.forward(hidden, inputs.cos, inputs.sin, inputs.mask, cache, inputs.router_types)
        if index < len(inputs.deepstack):
            hidden = hidden + inputs.deepstack[index]
        if on_layer is not None:
            on_layer(index, hidden)
    return decoder_logits(model, hidden)


__all__ = [
    "DecoderLayer", "LayerCache", "OutputHead", "Routing", "decoder_logits", "final_norm", "load_head", "load_layer", "quantized_linear",
    "run_decoder",
]  # fmt: skip
