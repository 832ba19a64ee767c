"""What a decoder is made of, in the field's terms and independent of any family.

A family (``models/<family>.py``) reads its Hugging Face config into a :class:`ModelSpec`; everything after it (stages,
graph, validation) reads fields of the spec and never a family's name.

Canonical tensor names, shared by the loader, the stages, the quantized checkpoint and the graph::

    embed_tokens.weight                          [vocab_size, hidden_size]
    layers.{i}.input_layernorm.weight            [hidden_size]
    layers.{i}.self_attn.{q,k,v,o}_proj.weight   [out_features, in_features]   (.bias where GqaSpec.bias, GqaSpec.output_bias)
    layers.{i}.self_attn.{q,k}_norm.weight       [head_dim]                    (where GqaSpec.qk_norm)

    layers.{i}.self_attn.q_proj.weight           [num_heads * qk_head_dim, hidden_size]   (MlaSpec without q_lora_rank)
    layers.{i}.self_attn.q_a_proj.weight         [q_lora_rank, hidden_size]               (MlaSpec with q_lora_rank)
    layers.{i}.self_attn.q_a_norm.weight         [q_lora_rank]                            (the same)
    layers.{i}.self_attn.q_b_proj.weight         [num_heads * qk_head_dim, q_lora_rank]   (the same)
    layers.{i}.self_attn.kv_a_proj.weight        [kv_lora_rank + qk_rope_head_dim, hidden_size]
    layers.{i}.self_attn.kv_a_norm.weight        [kv_lora_rank]
    layers.{i}.self_attn.kv_b_proj.weight        [num_heads * (qk_nope_head_dim + v_head_dim), kv_lora_rank]
    layers.{i}.self_attn.o_proj.weight           [hidden_size, num_heads * v_head_dim]

    layers.{i}.post_attention_layernorm.weight   [hidden_size]
    layers.{i}.mlp.router.weight                 [router_rows, hidden_size]    (num_experts, but for MoESpec.type_parts)
    layers.{i}.mlp.router.selection_bias         [router_rows]                 (where RouterSpec.selection_bias)
    layers.{i}.mlp.experts.gate_up_proj          [total_experts, 2 * intermediate_size, hidden_size], gate rows first
    layers.{i}.mlp.experts.down_proj             [total_experts, hidden_size, intermediate_size]
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
    divided by their sum (plus ``renormalize_epsilon``, and at least ``renormalize_floor``) where ``renormalize``, times ``scaling``.

    A group's score is the sum of its two best selection scores (DeepSeek-V3, arXiv 2412.19437).
    """

    scoring: Literal["softmax", "sigmoid"]
    renormalize: bool
    scaling: float = 1.0
    selection_bias: bool = False
    num_groups: int = 1
    top_groups: int = 1
    renormalize_epsilon: float = 0.0
    renormalize_floor: float = 0.0


@dataclass(frozen=True)
class MoESpec:
    """A routed mixture-of-experts MLP.

    Shared experts are experts that every token takes with weight 1. They stand behind the routed ones: ids ``num_experts`` to
    ``total_experts - 1``, in slots ``top_k`` to ``num_slots - 1``. A shared MLP of width ``S * intermediate_size`` is exactly S
    of them, since a gated MLP is a sum over its intermediate channels.

    Attributes:
        num_experts, top_k: routed experts, and how many of them a token takes.
        num_shared_experts: S.
        type_parts: where text tokens and image tokens have routed experts of their own (ERNIE-4.5-VL), of how many stacked experts
            ("pieces", each `intermediate_size` wide) one of theirs is made, by type; empty where all tokens share the routed ones.
            The stack holds the pieces of all text experts, then of all image experts; `num_experts` counts pieces and `top_k` slots,
            of which a token whose experts have fewer pieces leaves some empty (id -1).
    """

    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    router: RouterSpec
    activation: Literal["silu_glu"] = "silu_glu"
    num_shared_experts: int = 0
    type_parts: tuple[int, ...] = ()

    @property
    def experts_per_type(self) -> int:
        """Routed experts that tokens of one type choose from; `num_experts` where types share them."""
        return self.num_experts // sum(self.type_parts) if self.type_parts else self.num_experts

    @property
    def picks(self) -> int:
        """How many of them a token takes."""
        return self.top_k // max(self.type_parts, default=1)

    @property
    def router_rows(self) -> int:
        """Rows of the router's weight: one for each expert of each type."""
        return self.experts_per_type * max(1, len(self.type_parts))

    @property
    def total_experts(self) -> int:
        """Routed and shared experts."""
        return self.num_experts + self.num_shared_experts

    @property
    def num_slots(self) -> int:
        """Experts that each token takes, routed and shared."""
        return self.top_k + self.num_shared_experts


@dataclass(frozen=True)
class DenseMlpSpec:
    """A gated dense MLP."""

    hidden_size: int
    intermediate_size: int
    activation: Literal["silu_glu"] = "silu_glu"


@dataclass(frozen=True)
class GqaSpec:
    """Grouped-query attention with optional per-head RMS norms of queries and keys; scale ``head_dim ** -0.5``.

    The first ``RopeSpec.head_dim`` channels of a head are rotated, which may be all.

    Attributes:
        bias: whether the projections of queries, keys and values have one.
        output_bias: whether the output projection has one.
        rope_interleaved: whether rotary channels lie in pairs (x0, x1), (x2, x3), ... instead of halves.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    qk_norm: bool
    bias: bool = False
    output_bias: bool = False
    rope_interleaved: bool = False

    @property
    def key_head_dim(self) -> int:
        """Size of a cached key."""
        return self.head_dim

    @property
    def value_head_dim(self) -> int:
        """Size of a cached value."""
        return self.head_dim

    @property
    def scale(self) -> float:
        """What query-key products are multiplied by."""
        return self.head_dim**-0.5


@dataclass(frozen=True)
class MlaSpec:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), used here with its keys and values expanded.

    Queries have ``qk_nope_head_dim`` channels without and, after them, ``qk_rope_head_dim`` channels with rotary embedding. Keys
    and values come from a normed latent of ``kv_lora_rank`` channels; one rotated key part is shared by all heads.

    Attributes:
        q_lora_rank: rank of the queries' own latent; None where they are projected directly.
        rope_interleaved: whether rotary channels lie in pairs (x0, x1), (x2, x3), ... instead of halves.
        latent_norm_eps: of the latents' RMS norms, which do not use the model's epsilon.
    """

    num_heads: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    kv_lora_rank: int
    q_lora_rank: int | None = None
    rope_interleaved: bool = True
    latent_norm_eps: float = 1e-6

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def num_kv_heads(self) -> int:
        """Heads of the expanded keys and values."""
        return self.num_heads

    @property
    def key_head_dim(self) -> int:
        """Size of a cached key."""
        return self.qk_head_dim

    @property
    def value_head_dim(self) -> int:
        """Size of a cached value."""
        return self.v_head_dim

    @property
    def scale(self) -> float:
        """What query-key products are multiplied by."""
        return self.qk_head_dim**-0.5


AttentionSpec = GqaSpec | MlaSpec


@dataclass(frozen=True)
class RopeSpec:
    """Rotary embedding.

    Attributes:
        kind: ``rope``: a token's place in the sequence. ``mrope_interleaved`` (Qwen3-VL): three axes (temporal, height, width)
            that own frequencies in the order T H W T H W ... ``mrope`` (Qwen2-VL, GLM-4.5V): the same axes own sections of neighbouring
            frequencies, T, then H, then W. ``mrope_alternating`` (ERNIE-4.5-VL): H W H W ... as long as they have frequencies, then T.
        sections: frequencies that each axis owns (sum ``head_dim / 2``); empty for ``rope``.
        head_dim: channels of a head that are rotated.
    """

    kind: Literal["mrope_interleaved", "mrope", "mrope_alternating", "rope"]
    theta: float
    sections: tuple[int, ...]
    head_dim: int


@dataclass(frozen=True)
class DecoderLayerSpec:
    """One decoder layer: RMS norm, attention, residual, RMS norm, MLP, residual."""

    index: int
    attention: AttentionSpec
    mlp: MoESpec | DenseMlpSpec


@dataclass(frozen=True)
class VisionSpec:
    """The vision tower's interface: sizes that the host side needs to prepare its inputs.

    Attributes:
        num_position_embeddings: entries of the learned square position table.
        position_interpolation: how the table is resampled: ``bilinear`` with aligned corners, ``bicubic`` without, ``bucket`` where each
            patch takes one entry, ``own`` where there is an entry for each patch of a frame, or ``none`` where the tower has no table.
        patch_order: of the processor's patches: ``merge_block`` (those that are merged are adjacent) or ``raster``.
        queries: where image tokens come from learned queries instead of merged patches (Aria): pairs of the patches of a square canvas,
            whose side is an image's longer one, and how many queries read it. Such towers have no rotary embedding.
        class_token: whether each frame has a token beside its patches that they attend to and it to them, and that is dropped in the end
            (InternVL). Such towers have no rotary embedding, and frames are tiles of one size.
    """

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
    position_interpolation: Literal["bilinear", "bicubic", "bucket", "own", "none"] = "bilinear"
    patch_order: Literal["merge_block", "raster"] = "merge_block"
    queries: tuple[tuple[int, int], ...] = ()
    class_token: bool = False

    @property
    def patch_features(self) -> int:
        """Values of one flattened patch."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def position_taps(self) -> int:
        """Entries of the position table that one patch reads."""
        return {"bilinear": 4, "bicubic": 16, "bucket": 1, "own": 1, "none": 0}[self.position_interpolation]


@dataclass(frozen=True)
class ModelSpec:
    """A vision-language model with a mixture-of-experts decoder.

    The first ``len(vision.deepstack_layers)`` decoder layers each add one dense DeepStack feature tensor to their output. Token
    ids that the config does not name are None.

    Attributes:
        video_token_id, audio_token_id: placeholders of inputs that are not run; prompts that hold them are refused.
        image_expert_ids: tokens that go to the image experts where types have experts of their own (MoESpec.type_parts).
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
    vision_start_token_id: int | None
    vision_end_token_id: int | None
    video_token_id: int | None
    audio_token_id: int | None = None
    image_expert_ids: tuple[int, ...] = ()

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers with routed experts."""
        return tuple(layer.index for layer in self.layers if isinstance(layer.mlp, MoESpec))

    @property
    def num_shared_experts(self) -> int:
        """Shared experts of each routed layer; 0 where no layer is routed."""
        return max((layer.mlp.num_shared_experts for layer in self.layers if isinstance(layer.mlp, MoESpec)), default=0)

    @property
    def output_projection(self) -> str:
        """Canonical name of the matrix that makes logits of the last states."""
        return "embed_tokens.weight" if self.tie_word_embeddings else "lm_head.weight"

    @property
    def num_deepstack(self) -> int:
        """How many DeepStack feature tensors the decoder takes."""
        return len(self.vision.deepstack_layers)
