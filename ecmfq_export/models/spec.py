"""What a decoder is made of, in the field's terms and independent of any family.

A family (``models/<family>.py``) reads its Hugging Face config into a :class:`ModelSpec`; everything after it (stages,
graph, validation) reads fields of the spec and never a family's name.

Canonical tensor names, shared by the loader, the stages, the quantized checkpoint and the graph::

    embed_tokens.weight                          [vocab_size, hidden_size]
    layers.{i}.input_layernorm.weight            [hidden_size]
    layers.{i}.self_attn.{q,k,v,o}_proj.weight   [out_features, in_features]   (.bias where GqaSpec.bias)
    layers.{i}.self_attn.{q,k}_norm.weight       [head_dim]                    (where GqaSpec.qk_norm)
    layers.{i}.post_attention_layernorm.weight   [hidden_size]
    layers.{i}.mlp.router.weight                 [num_experts, hidden_size]
    layers.{i}.mlp.router.selection_bias         [num_experts]                 (where RouterSpec.selection_bias)
    layers.{i}.mlp.experts.gate_up_proj          [num_experts, 2 * intermediate_size, hidden_size], gate rows first
    layers.{i}.mlp.experts.down_proj             [num_experts, hidden_size, intermediate_size]
    layers.{i}.mlp.{gate,up,down}_proj.weight    dense layers
    norm.weight                                  [hidden_size]
    lm_head.weight                               [vocab_size, hidden_size]     (absent where tie_word_embeddings)
    vision.*                                     the vision tower, in the family's own names
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RouterSpec:
    """How router logits become ``topk_ids`` and ``topk_weights``.

    Scores are ``scoring(router_logits)``. Selection takes the ``top_k`` largest of scores (plus the selection bias, which
    never enters the weights), limited to the best ``top_groups`` of ``num_groups`` groups. Weights are the selected scores,
    divided by their sum where ``renormalize``, times ``scaling``.
    """

    scoring: Literal["softmax", "sigmoid"]
    renormalize: bool
    scaling: float = 1.0
    selection_bias: bool = False
    num_groups: int = 1
    top_groups: int = 1


@dataclass(frozen=True)
class MoESpec:
    """A routed mixture-of-experts MLP."""

    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    router: RouterSpec
    activation: Literal["silu_glu"] = "silu_glu"
    num_shared_experts: int = 0


@dataclass(frozen=True)
class DenseMlpSpec:
    """A gated dense MLP."""

    hidden_size: int
    intermediate_size: int
    activation: Literal["silu_glu"] = "silu_glu"


@dataclass(frozen=True)
class GqaSpec:
    """Grouped-query attention with optional per-head RMS norms of queries and keys; scale ``head_dim ** -0.5``."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    qk_norm: bool
    bias: bool = False


@dataclass(frozen=True)
class RopeSpec:
    """Rotary embedding over three axes (temporal, height, width).

    ``sections`` are the frequencies that each axis owns (sum ``head_dim / 2``); interleaved means T H W T H W ... order
    instead of contiguous chunks (Qwen3-VL).
    """

    kind: Literal["mrope_interleaved"]
    theta: float
    sections: tuple[int, int, int]
    head_dim: int


@dataclass(frozen=True)
class DecoderLayerSpec:
    """One decoder layer: RMS norm, attention, residual, RMS norm, MLP, residual."""

    index: int
    attention: GqaSpec
    mlp: MoESpec | DenseMlpSpec


@dataclass(frozen=True)
class VisionSpec:
    """The vision tower's interface: sizes that the host side needs to prepare its inputs."""

    hidden_size: int
    num_layers: int
    num_heads: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    out_hidden_size: int
    num_position_embeddings: int
    deepstack_layers: tuple[int, ...]

    @property
    def patch_features(self) -> int:
        """Values of one flattened patch."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


@dataclass(frozen=True)
class ModelSpec:
    """A vision-language model with a mixture-of-experts decoder.

    The first ``len(vision.deepstack_layers)`` decoder layers each add one dense DeepStack feature tensor to their output.
    """

    family: str
    hidden_size: int
    vocab_size: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    max_position_embeddings: int
    rope: RopeSpec
    layers: tuple[DecoderLayerSpec, ...]
    vision: VisionSpec
    image_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    video_token_id: int

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers with routed experts."""
        return tuple(layer.index for layer in self.layers if isinstance(layer.mlp, MoESpec))

    @property
    def num_deepstack(self) -> int:
        """How many DeepStack feature tensors the decoder takes."""
        return len(self.vision.deepstack_layers)
