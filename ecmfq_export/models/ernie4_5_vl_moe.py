"""ERNIE-4.5-VL-MoE: text tokens and image tokens have routers and experts of their own in each layer, and share experts.

A text expert is wider than an image expert. One stack of experts holds both: it is cut to the common divisor of their widths, so that
an expert is one or several neighbouring pieces (a gated MLP is a sum over its intermediate channels), and each token's slots name the
pieces of its own experts. Facts are those of transformers 5.23, ``models/ernie4_5_vl_moe`` and ``conversion_mapping.py``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ecmfq_export.errors import CheckpointError, UnsupportedError
from ecmfq_export.models import ernie_vision
from ecmfq_export.models.config_fields import (
    BOOKKEEPING,
    MAX_LAYERS,
    WRITTEN_BY_TRANSFORMERS_4,
    ConfigFields,
    built,
    check_token,
    expect_axial_rope,
    finish_all,
    one_rope_spelling,
    read_heads,
    refuse_unused,
    subsection,
)
from ecmfq_export.models.float_source import ExpertPart, JoinedPart, JoinedSource
from ecmfq_export.models.spec import (
    DecoderLayerSpec,
    DenseMlpSpec,
    GqaSpec,
    ModelSpec,
    MoESpec,
    RopeSpec,
    RouterSpec,
    VisionSpec,
)

if TYPE_CHECKING:
    import torch

_TEXT_HARMLESS = BOOKKEEPING | WRITTEN_BY_TRANSFORMERS_4 | {
    "output_router_logits": "asks for the training loss of the router",
    "router_aux_loss_coef": "training loss of the router",
    "tie_word_embeddings": "transformers ties by the top level's field",
}  # fmt: skip
_TOP_HARMLESS = BOOKKEEPING | WRITTEN_BY_TRANSFORMERS_4
_VISION_HARMLESS = BOOKKEEPING | WRITTEN_BY_TRANSFORMERS_4


def read_spec(config: dict[str, Any]) -> ModelSpec:
    """The spec of a ``config.json``; absent fields take the defaults of transformers' config classes.

    Raises:
        CheckpointError: transformers' own validation fails, or sizes contradict each other.
        UnsupportedError: a field, or a value of one, that changes the model and is not handled.
    """
    defaults = _transformers_config(config)
    top = ConfigFields("", config, defaults)
    top.take("quantization_config")  # models/quantized_reader.py reads it
    top.expect("architectures", ["Ernie4_5_VLMoeForConditionalGeneration"], ["Ernie4_5_VL_MoeForConditionalGeneration"], None,
               why="only the generating model is handled")
    top.expect("model_type", "ernie4_5_vl_moe", why="another family")
    text_given, vision_given = (subsection(top.take(name), name) for name in ("text_config", "vision_config"))
    text = ConfigFields("text_config", text_given, defaults.text_config,
                        {"moe_num_experts": ("num_experts",), "moe_k": ("num_experts_per_tok",)})
    text.expect("model_type", "ernie4_5_vl_moe_text", why="another decoder than this family's")
    hidden_size = text.whole("hidden_size")
    layers = _read_layers(text, hidden_size)
    attention = layers[0].attention
    assert isinstance(attention, GqaSpec)
    image, start, end = (top.whole(name, 0) for name in ("image_token_id", "image_start_token_id", "image_end_token_id"))
    spec = ModelSpec(
        family="ernie4_5_vl_moe",
        hidden_size=hidden_size,
        vocab_size=text.whole("vocab_size"),
        rms_norm_eps=text.number("rms_norm_eps"),
        tie_word_embeddings=top.flag("tie_word_embeddings"),
        max_position_embeddings=text.whole("max_position_embeddings"),
        rope=_read_rope(text, text_given, defaults.text_config, attention.head_dim),
        layers=layers,
        vision=_read_vision(vision_given, defaults.vision_config, hidden_size),
        image_token_id=image,
        video_token_id=top.whole("video_token_id", 0),
        vision_start_token_id=start,
        vision_end_token_id=end,
        # Tokens around a video go there too, were a text to hold one without a video.
        image_expert_ids=(image, start, end, *(top.whole(f"video_{name}_token_id", 0) for name in ("start", "end"))),
    )
    check_token("image_token_id", spec.image_token_id, spec.vocab_size)
    finish_all((text, _TEXT_HARMLESS), (top, _TOP_HARMLESS))
    return spec


def _transformers_config(config: dict[str, Any]) -> Any:
    from transformers import Ernie4_5_VLMoeConfig

    return built(Ernie4_5_VLMoeConfig, config)


def _read_layers(text: ConfigFields, hidden_size: int) -> tuple[DecoderLayerSpec, ...]:
    text.expect("hidden_act", "silu", why="experts and kernels are gated by SiLU")
    text.expect("use_bias", False, None, why="biases of experts have no place in the kernels")
    num_heads, num_kv_heads, head_dim = read_heads(text, hidden_size)
    attention = GqaSpec(num_heads, num_kv_heads, head_dim, qk_norm=False, rope_interleaved=True)
    moe, dense = _read_moe(text, hidden_size), DenseMlpSpec(hidden_size, text.whole("intermediate_size"))
    num_layers = text.whole("num_hidden_layers", maximum=MAX_LAYERS)
    kinds = text.take("mlp_layer_types")
    if not isinstance(kinds, list) or len(kinds) != num_layers or not set(kinds) <= {"dense", "sparse"}:
        raise CheckpointError(f"config.json: {text.label('mlp_layer_types')} = {kinds!r}, num_hidden_layers = {num_layers}",
                              "expected dense or sparse for each layer")
    return tuple(DecoderLayerSpec(i, attention, moe if kind == "sparse" else dense) for i, kind in enumerate(kinds))


def _read_moe(text: ConfigFields, hidden_size: int) -> MoESpec:
    experts, picks = text.whole("moe_num_experts"), text.whole("moe_k")
    widths, shared = text.wholes("moe_intermediate_size"), text.whole("moe_num_shared_experts", 0)
    if picks > experts or len(widths) != 2 or min(widths, default=0) < 1:
        raise CheckpointError(
            f"config.json: moe_k = {picks} of moe_num_experts = {experts}, moe_intermediate_size = {list(widths)}",
            "expected two widths, of a text expert and of an image expert, and no more experts a token than there are",
        )
    piece = math.gcd(*widths)
    parts = tuple(width // piece for width in widths)
    router = RouterSpec("softmax", renormalize=True, selection_bias=True, renormalize_floor=text.number("moe_norm_min"))
    # The shared MLP is as wide as so many text experts.
    return MoESpec(hidden_size, piece, experts * sum(parts), picks * max(parts), router,
                   num_shared_experts=shared * parts[0], type_parts=parts)


def _read_rope(text: ConfigFields, given: dict[str, Any], defaults: Any, head_dim: int) -> RopeSpec:
    one_rope_spelling(text, given)
    rope = ConfigFields(text.label("rope_parameters"), dict(defaults.rope_parameters), None)
    rope.expect("rope_type", "default", why="transformers' class knows no other")
    rope.expect("type", "default", None, why="transformers' class knows no other")
    theta = rope.number("rope_theta")
    # The class's own default where the file names no sections: rows, columns, time.
    sections = (22, 22, 20) if rope.take("mrope_section") is None else rope.wholes("mrope_section")
    rope.finish({})
    if len(sections) != 3 or sections[0] != sections[1] or sum(sections) != head_dim // 2 or not sections[2]:
        raise UnsupportedError(
            f"config.json: {rope.label('mrope_section')} = {list(sections)} of head_dim / 2 = {head_dim // 2} frequencies",
            "expected as many for rows as for columns, some for time, and head_dim / 2 in all",
        )
    rows, columns, time = sections
    return RopeSpec("mrope_alternating", theta, (time, rows, columns), head_dim)


def _read_vision(given: dict[str, Any], defaults: Any, hidden_size: int) -> VisionSpec:
    vision = ConfigFields(
        "vision_config", given, defaults, {"num_heads": ("num_attention_heads",), "depth": ("num_hidden_layers",)}
    )
    vision.expect("model_type", "ernie4_5_vl_moe_vision", "DFNRope_vision_transformer", why="another vision tower than this family's")
    vision.expect("hidden_act", "quick_gelu", why="no such tower was checked")
    vision.expect("temporal_merge_size", 2, why="the resampler of transformers knows no other")
    expect_axial_rope(vision, defaults)
    vision.whole("intermediate_size")  # the tower's shapes show it
    vision.number("rms_norm_eps")  # transformers' own modules read it
    spec = VisionSpec(
        hidden_size=vision.whole("hidden_size"),
        num_layers=vision.whole("depth", maximum=MAX_LAYERS),
        num_heads=vision.whole("num_heads"),
        in_channels=vision.whole("in_channels"),
        patch_size=vision.whole("patch_size"),
        temporal_patch_size=1,
        spatial_merge_size=vision.whole("spatial_merge_size"),
        out_hidden_size=hidden_size,
        num_position_embeddings=0,
        deepstack_layers=(),
        position_interpolation="none",
    )
    refuse_unused(vision)
    vision.finish(_VISION_HARMLESS)
    if spec.hidden_size % (4 * spec.num_heads):
        raise CheckpointError(
            f"config.json: vision hidden_size {spec.hidden_size} over {spec.num_heads} heads",
            "a head's size must be a multiple of 4",
        )
    return spec


def disk_name(name: str) -> str:
    """Canonical name (spec.py) to the name on disk as transformers saves it."""
    if name.startswith("vision."):
        return "model." + ernie_vision.disk_name(name.removeprefix("vision."))
    return name if name.startswith("lm_head.") else "model." + name.replace(".mlp.router.", ".mlp.gate.")


def published_name(name: str) -> str:
    """A name on disk to the one in published checkpoints, whose tower stands beside the model."""
    return name.removeprefix("model.") if name.startswith("model.vision_model.") else name


def joined(spec: ModelSpec, name: str) -> JoinedSource | None:
    """The two routers of a layer, each transposed on disk, and their two biases in one tensor; None for any other tensor."""
    if ".mlp.router." not in name:
        return None
    mlp = _moe(spec, name)
    experts, hidden = mlp.experts_per_type, mlp.hidden_size
    base = f"model.layers.{name.split('.')[1]}.mlp"
    if name.endswith("selection_bias"):
        bias = JoinedPart(f"{base}.moe_statics.e_score_correction_bias", (2, experts))
        return JoinedSource((bias,), (2 * experts,))
    parts = (JoinedPart(f"{base}.gate.weight", (hidden, experts), True), JoinedPart(f"{base}.gate.weight_1", (hidden, experts), True))
    return JoinedSource(parts, (2 * experts, hidden))


def expert_parts(spec: ModelSpec, name: str) -> tuple[ExpertPart, ...]:
    """Pieces of text experts, image experts and the shared MLP, in this order."""
    mlp, kind = _moe(spec, name), name.rsplit(".", 1)[1]
    base = f"model.layers.{name.split('.')[1]}.mlp"
    parts: list[ExpertPart] = []
    number = piece = 0
    for count in mlp.type_parts:
        for _ in range(mlp.experts_per_type):
            parts += _pieces(f"{base}.experts.{number}", kind, mlp, piece, count)
            number, piece = number + 1, piece + count
    if mlp.num_shared_experts:
        parts += _pieces(f"{base}.shared_experts", kind, mlp, piece, mlp.num_shared_experts)
    return tuple(parts)


def _pieces(owner: str, kind: str, mlp: MoESpec, first: int, count: int) -> list[ExpertPart]:
    """One MLP on disk as `count` pieces from `first` on."""
    hidden, inner = mlp.hidden_size, mlp.intermediate_size
    found = []
    for j in range(count):
        own = slice(j * inner, (j + 1) * inner)
        if kind == "down_proj":
            found.append(ExpertPart(f"{owner}.down_proj.weight", (hidden, count * inner), first + j, slice(0, hidden), (slice(None), own)))
        else:
            shape = (count * inner, hidden)
            found += [ExpertPart(f"{owner}.{part}_proj.weight", shape, first + j, slice(i * inner, (i + 1) * inner), (own,))
                      for i, part in enumerate(("gate", "up"))]
    return found


def _moe(spec: ModelSpec, name: str) -> MoESpec:
    mlp = spec.layers[int(name.split(".")[1])].mlp
    assert isinstance(mlp, MoESpec)
    return mlp


def build_vision(config: dict[str, Any]) -> torch.nn.Module:
    """transformers' vision tower and resampler on the meta device."""
    return ernie_vision.build(_transformers_config(config))


def vision_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Canonical names and shapes of the vision tower's tensors."""
    return {f"vision.{name}": tuple(tensor.shape) for name, tensor in build_vision(config).state_dict().items()}


def residual_writers(spec: ModelSpec) -> tuple[str, ...]:
    """Refused: the resampler ends in a norm, whose output has no other basis.

    Raises:
        UnsupportedError: always.
    """
    raise UnsupportedError(f"{spec.family} cannot be rotated: its image features come from a norm", "set rotate = 'none'")
