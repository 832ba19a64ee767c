"""GLM-4.5V: a GLM-4.5 decoder with DeepSeek-V3's router behind GLM-4.1V's vision tower.

Facts are those of transformers 5.23, ``models/glm4v_moe`` and ``conversion_mapping.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ecmfq_export.errors import CheckpointError, UnsupportedError
from ecmfq_export.models import deepseek_v3
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
from ecmfq_export.models.float_source import ExpertPart
from ecmfq_export.models.spec import (
    DecoderLayerSpec,
    DenseMlpSpec,
    GqaSpec,
    ModelSpec,
    MoESpec,
    RopeSpec,
    VisionSpec,
)

if TYPE_CHECKING:
    import torch

_COPIES = ("image_token_id", "image_start_token_id", "image_end_token_id", "video_token_id", "video_start_token_id", "video_end_token_id")
_TEXT_HARMLESS = deepseek_v3.HARMLESS | dict.fromkeys(_COPIES, "transformers reads the top level's") | {
    "router_aux_loss_coef": "training loss of the router",
}  # fmt: skip
_TOP_HARMLESS = BOOKKEEPING | WRITTEN_BY_TRANSFORMERS_4 | {
    "video_start_token_id": "marks the beginning of a video, which is refused",
    "video_end_token_id": "marks the end of a video, which is refused",
}  # fmt: skip
_VISION_HARMLESS = BOOKKEEPING | WRITTEN_BY_TRANSFORMERS_4 | {"attention_dropout": "training only"}


def read_spec(config: dict[str, Any]) -> ModelSpec:
    """The spec of a ``config.json``; absent fields take the defaults of transformers' config classes.

    Raises:
        CheckpointError: transformers' own validation fails, or sizes contradict each other.
        UnsupportedError: a field, or a value of one, that changes the model and is not handled.
    """
    defaults = _transformers_config(config)
    top = ConfigFields("", config, defaults)
    top.take("quantization_config")  # models/quantized_reader.py reads it
    top.expect("architectures", ["Glm4vMoeForConditionalGeneration"], None, why="only the generating model is handled")
    top.expect("model_type", "glm4v_moe", why="another family")
    text_given, vision_given = (subsection(top.take(name), name) for name in ("text_config", "vision_config"))
    text = ConfigFields("text_config", text_given, defaults.text_config, {"n_routed_experts": ("num_local_experts",)})
    text.expect("model_type", "glm4v_moe_text", why="another decoder than this family's")
    hidden_size = text.whole("hidden_size")
    layers = _read_layers(text, hidden_size)
    attention = layers[0].attention
    assert isinstance(attention, GqaSpec)
    # transformers ties where either level says so.
    tied = top.flag("tie_word_embeddings") | bool(text.take("tie_word_embeddings"))
    spec = ModelSpec(
        family="glm4v_moe",
        hidden_size=hidden_size,
        vocab_size=text.whole("vocab_size"),
        rms_norm_eps=text.number("rms_norm_eps"),
        tie_word_embeddings=tied,
        max_position_embeddings=text.whole("max_position_embeddings"),
        rope=_read_rope(text, text_given, defaults.text_config, attention.head_dim),
        layers=layers,
        vision=_read_vision(vision_given, defaults.vision_config, hidden_size),
        image_token_id=top.whole("image_token_id", 0),
        video_token_id=top.whole("video_token_id", 0),
        vision_start_token_id=top.whole("image_start_token_id", 0),
        vision_end_token_id=top.whole("image_end_token_id", 0),
    )
    check_token("image_token_id", spec.image_token_id, spec.vocab_size)
    finish_all((text, _TEXT_HARMLESS), (top, _TOP_HARMLESS))
    return spec


def _transformers_config(config: dict[str, Any]) -> Any:
    from transformers import Glm4vMoeConfig

    return built(Glm4vMoeConfig, config)


def _read_layers(text: ConfigFields, hidden_size: int) -> tuple[DecoderLayerSpec, ...]:
    text.expect("hidden_act", "silu", why="experts and kernels are gated by SiLU")
    text.expect("use_qk_norm", False, None, why="transformers' class norms neither queries nor keys")
    num_heads, num_kv_heads, head_dim = read_heads(text, hidden_size)
    attention = GqaSpec(num_heads, num_kv_heads, head_dim, qk_norm=False, bias=text.flag("attention_bias"), output_bias=False)
    moe = deepseek_v3.read_moe(text, hidden_size)
    dense = DenseMlpSpec(hidden_size, text.whole("intermediate_size"))
    num_layers, num_dense = text.whole("num_hidden_layers", maximum=MAX_LAYERS), text.whole("first_k_dense_replace", 0)
    return tuple(DecoderLayerSpec(i, attention, dense if i < num_dense else moe) for i in range(num_layers))


def _read_rope(text: ConfigFields, given: dict[str, Any], defaults: Any, head_dim: int) -> RopeSpec:
    """`defaults` has the historical spellings merged already, the share of rotated channels among them."""
    one_rope_spelling(text, given)
    share = text.take("partial_rotary_factor")
    rope = ConfigFields(text.label("rope_parameters"), dict(defaults.rope_parameters), None)
    rope.expect("rope_type", "default", why="only unscaled rotary embedding is handled")
    rope.expect("type", "default", None, why="only unscaled rotary embedding is handled")
    theta = rope.number("rope_theta")
    merged = rope.number("partial_rotary_factor") if rope.take("partial_rotary_factor") is not None else 1.0
    # The class's own default where the file names no sections.
    sections = (8, 12, 12) if rope.take("mrope_section") is None else rope.wholes("mrope_section")
    rope.finish({})
    if "partial_rotary_factor" in given and share != merged:
        raise UnsupportedError(f"config.json: {text.label('partial_rotary_factor')} = {share!r}, but rope_parameters say {merged!r}",
                               "keep one of the two")
    rotated = int(head_dim * merged)
    if rotated % 2 or not 0 < rotated <= head_dim or len(sections) != 3 or sum(sections) != rotated // 2:
        raise UnsupportedError(
            f"config.json: {rope.label('mrope_section')} = {list(sections)} and partial_rotary_factor = {merged} of head_dim = {head_dim}",
            f"expected three sections that sum to half of the {rotated} rotated channels",
        )
    return RopeSpec("mrope", theta, sections, rotated)


def _read_vision(given: dict[str, Any], defaults: Any, hidden_size: int) -> VisionSpec:
    vision = ConfigFields(
        "vision_config", given, defaults, {"num_heads": ("num_attention_heads",), "depth": ("num_hidden_layers",)}
    )
    vision.expect("model_type", "glm4v_moe_vision", "glm4v_moe", why="another vision tower than this family's")
    vision.expect("hidden_act", "silu", why="no such tower was checked")
    expect_axial_rope(vision, defaults)
    vision.whole("intermediate_size")  # the tower's shapes show it, and attention_bias
    vision.flag("attention_bias")
    vision.number("rms_norm_eps")  # transformers' own modules read it
    image, patch = vision.whole("image_size"), vision.whole("patch_size")
    spec = VisionSpec(
        hidden_size=vision.whole("hidden_size"),
        num_layers=vision.whole("depth", maximum=MAX_LAYERS),
        num_heads=vision.whole("num_heads"),
        in_channels=vision.whole("in_channels"),
        patch_size=patch,
        temporal_patch_size=vision.whole("temporal_patch_size"),
        spatial_merge_size=vision.whole("spatial_merge_size"),
        out_hidden_size=vision.whole("out_hidden_size"),
        num_position_embeddings=(image // patch) ** 2,
        deepstack_layers=(),
        position_interpolation="bicubic",
    )
    refuse_unused(vision)
    vision.finish(_VISION_HARMLESS)
    if spec.out_hidden_size != hidden_size:
        raise CheckpointError(f"config.json: vision out_hidden_size {spec.out_hidden_size}, text hidden_size {hidden_size}")
    if spec.hidden_size % (4 * spec.num_heads) or image < patch:
        raise CheckpointError(
            f"config.json: vision hidden_size {spec.hidden_size} over {spec.num_heads} heads, image_size {image} in patches of {patch}",
            "a head's size must be a multiple of 4, and an image at least one patch",
        )
    return spec


def disk_name(name: str) -> str:
    """Canonical name (spec.py) to the name on disk, the same in published checkpoints and in what transformers saves."""
    if name.startswith("vision."):
        return "model.visual." + name.removeprefix("vision.")
    return name if name.startswith("lm_head.") else "model.language_model." + deepseek_v3.layer_disk_name(name)


def expert_parts(spec: ModelSpec, name: str) -> tuple[ExpertPart, ...]:
    """One matrix a projection and expert, the shared ones in one MLP."""
    mlp = spec.layers[int(name.split(".")[1])].mlp
    assert isinstance(mlp, MoESpec)
    return deepseek_v3.expert_parts(mlp, disk_name(name), stacked=False)


def build_vision(config: dict[str, Any]) -> torch.nn.Module:
    """transformers' vision tower on the meta device, eager attention."""
    import torch
    from transformers.models.glm4v_moe.modeling_glm4v_moe import Glm4vMoeVisionModel

    vision_config = _transformers_config(config).vision_config
    vision_config._attn_implementation = "eager"
    with torch.device("meta"):
        return Glm4vMoeVisionModel(vision_config)


def vision_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Canonical names and shapes of the vision tower's tensors."""
    return {f"vision.{name}": tuple(tensor.shape) for name, tensor in build_vision(config).state_dict().items()}


def residual_writers(spec: ModelSpec) -> tuple[str, ...]:
    """The merger's last projection."""
    return ("vision.merger.down_proj.weight",)
