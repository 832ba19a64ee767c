"""The DeepSeek-V3 decoder inside a vision-language model: its config, its tensor names, how its experts lie on disk.

Facts are those of transformers 5.23, ``models/deepseek_v3``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ecmfq_export.errors import CheckpointError, UnsupportedError
from ecmfq_export.models.config_fields import BOOKKEEPING, MAX_LAYERS, WRITTEN_BY_TRANSFORMERS_4, ConfigFields, one_rope_spelling
from ecmfq_export.models.float_source import ExpertPart
from ecmfq_export.models.spec import DecoderLayerSpec, DenseMlpSpec, MlaSpec, MoESpec, RopeSpec, RouterSpec

HARMLESS = BOOKKEEPING | WRITTEN_BY_TRANSFORMERS_4 | {
    "attention_dropout": "training only",
    "aux_loss_alpha": "training loss of the router",
    "seq_aux": "training loss of the router",
    "output_router_logits": "asks for the training loss of the router",
    "ep_size": "how training was spread over machines",
    "pretraining_tp": "how training was spread over machines",
    "num_nextn_predict_layers": "heads for speculative decoding; their tensors would be refused as left over",
    "num_mtp_layers": "heads for speculative decoding; their tensors would be refused as left over",
}
"""Fields of the text section, and of any section that transformers 4 wrote, that do not change inference."""


def read_layers(text: ConfigFields, hidden_size: int) -> tuple[DecoderLayerSpec, ...]:
    """The decoder layers of a text section.

    Raises:
        CheckpointError: sizes contradict each other.
        UnsupportedError: a value that changes the model and is not handled.
    """
    text.expect("model_type", "deepseek_v3", why="another decoder than this family's")
    text.expect("hidden_act", "silu", why="experts and kernels are gated by SiLU")
    text.expect("attention_bias", False, why="latent attention is handled without biases")
    text.expect("scoring_func", "sigmoid", None, why="transformers' class always scores with a sigmoid")
    text.expect("topk_method", "noaux_tc", None, why="transformers' class always adds the selection bias")
    text.expect("moe_layer_freq", 1, None, why="transformers' class routes every layer after the dense ones")
    attention = _read_attention(text)
    moe = read_moe(text, hidden_size)
    dense = DenseMlpSpec(hidden_size, text.whole("intermediate_size"))
    num_layers, num_dense = text.whole("num_hidden_layers", maximum=MAX_LAYERS), text.whole("first_k_dense_replace", 0)
    return tuple(DecoderLayerSpec(i, attention, dense if i < num_dense else moe) for i in range(num_layers))


def _read_attention(text: ConfigFields) -> MlaSpec:
    num_heads = text.whole("num_attention_heads")
    text.expect("num_key_value_heads", num_heads, None, why=f"keys and values are expanded for all num_attention_heads = {num_heads}")
    spec = MlaSpec(
        num_heads=num_heads,
        qk_nope_head_dim=text.whole("qk_nope_head_dim"),
        qk_rope_head_dim=text.whole("qk_rope_head_dim", 2),
        v_head_dim=text.whole("v_head_dim"),
        kv_lora_rank=text.whole("kv_lora_rank"),
        q_lora_rank=None if text.take("q_lora_rank") is None else text.whole("q_lora_rank"),
        rope_interleaved=text.flag("rope_interleave"),
    )
    if spec.qk_rope_head_dim % 2:
        raise CheckpointError(f"config.json: {text.label('qk_rope_head_dim')} = {spec.qk_rope_head_dim}", "expected an even number")
    text.expect("qk_head_dim", spec.qk_head_dim, None, why="it is qk_nope_head_dim + qk_rope_head_dim")
    text.expect("head_dim", spec.qk_rope_head_dim, None, why="transformers' class rotates qk_rope_head_dim channels")
    return spec


def read_moe(text: ConfigFields, hidden_size: int) -> MoESpec:
    """Routed and shared experts behind DeepSeek-V3's router; errors as :func:`read_layers`."""
    num_experts, top_k = text.whole("n_routed_experts"), text.whole("num_experts_per_tok")
    groups, top_groups = text.whole("n_group"), text.whole("topk_group")
    if num_experts % groups or top_groups > groups or top_k > top_groups * (num_experts // groups):
        raise CheckpointError(
            f"config.json: num_experts_per_tok = {top_k} of n_routed_experts = {num_experts} from topk_group = {top_groups} of "
            f"n_group = {groups} groups", "the groups must divide the experts, and hold those that are selected",
        )
    if groups > 1 and num_experts // groups < 2:
        raise UnsupportedError(f"config.json: {num_experts} experts in n_group = {groups} groups", "a group's score needs two experts")
    router = RouterSpec(
        scoring="sigmoid", renormalize=text.flag("norm_topk_prob"), scaling=text.number("routed_scaling_factor"),
        selection_bias=True, num_groups=groups, top_groups=top_groups, renormalize_epsilon=1e-20,
    )
    shared = 0 if text.take("n_shared_experts") is None else text.whole("n_shared_experts", 0)
    return MoESpec(hidden_size, text.whole("moe_intermediate_size"), num_experts, top_k, router, num_shared_experts=shared)


def read_rope(text: ConfigFields, given: Mapping[str, Any], defaults: Any, head_dim: int) -> RopeSpec:
    """Rotary settings of a text section; `defaults` has the historical spellings merged already.

    Raises:
        UnsupportedError: scaled rotary embedding, or spellings that contradict each other.
    """
    one_rope_spelling(text, given)
    rope = ConfigFields("text_config.rope_parameters", dict(defaults.rope_parameters), None)
    rope.expect("rope_type", "default", why="only unscaled rotary embedding is handled")
    rope.expect("type", "default", None, why="only unscaled rotary embedding is handled")
    theta = rope.number("rope_theta")
    rope.finish({})
    return RopeSpec("rope", theta, (), head_dim)


_DISK = (
    (re.compile(r"\.mlp\.router\.weight$"), ".mlp.gate.weight"),
    (re.compile(r"\.mlp\.router\.selection_bias$"), ".mlp.gate.e_score_correction_bias"),
    (re.compile(r"\.self_attn\.kv_a_proj\."), ".self_attn.kv_a_proj_with_mqa."),
    (re.compile(r"\.self_attn\.(q|kv)_a_norm\."), r".self_attn.\1_a_layernorm."),
)


def layer_disk_name(name: str) -> str:
    """Canonical name inside the decoder to the decoder's own name, without the model's prefix."""
    for pattern, replacement in _DISK:
        name = pattern.sub(replacement, name)
    return name


def expert_parts(mlp: MoESpec, disk_name: str, *, stacked: bool) -> tuple[ExpertPart, ...]:
    """Where the stacked experts of one layer lie on disk.

    Args:
        disk_name: of the stacked tensor, ``...mlp.experts.gate_up_proj`` or ``...mlp.experts.down_proj``.
        stacked: whether routed experts are one tensor on disk (what transformers 5 keeps in memory) or one each.
    """
    base, kind = disk_name.rsplit(".", 1)
    shared = f"{base.removesuffix('experts')}shared_experts"
    hidden, inner = mlp.hidden_size, mlp.intermediate_size
    all_shared, total = mlp.num_shared_experts * inner, 2 * inner if kind == "gate_up_proj" else hidden
    parts: list[ExpertPart] = []
    if stacked:
        columns = hidden if kind == "gate_up_proj" else inner
        parts.append(ExpertPart(disk_name, (mlp.num_experts, total, columns), 0, slice(0, total)))
    for expert in range(0 if stacked else mlp.num_experts):
        if kind == "down_proj":
            parts.append(ExpertPart(f"{base}.{expert}.down_proj.weight", (hidden, inner), expert, slice(0, hidden)))
        else:
            parts += [ExpertPart(f"{base}.{expert}.{name}_proj.weight", (inner, hidden), expert, slice(i * inner, (i + 1) * inner))
                      for i, name in enumerate(("gate", "up"))]
    for s in range(mlp.num_shared_experts):
        expert, own = mlp.num_experts + s, slice(s * inner, (s + 1) * inner)
        if kind == "down_proj":
            region = (slice(None), own)
            parts.append(ExpertPart(f"{shared}.down_proj.weight", (hidden, all_shared), expert, slice(0, hidden), region))
        else:
            parts += [ExpertPart(f"{shared}.{name}_proj.weight", (all_shared, hidden), expert, slice(i * inner, (i + 1) * inner), (own,))
                      for i, name in enumerate(("gate", "up"))]
    return tuple(parts)
