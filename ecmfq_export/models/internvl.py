"""InternVL3.5's mixture-of-experts models: a Qwen3-MoE decoder behind InternViT and a projector of merged patches.

Facts are those of transformers 5.23, ``models/internvl``, ``models/qwen3_moe`` and ``conversion_mapping.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ecmfq_export.errors import CheckpointError, UnsupportedError
from ecmfq_export.models import deepseek_v3, intern_vision, qwen3_vl_moe
from ecmfq_export.models.config_fields import (
    BOOKKEEPING,
    MAX_LAYERS,
    WRITTEN_BY_TRANSFORMERS_4,
    ConfigFields,
    built,
    check_token,
    finish_all,
    refuse_unused,
    subsection,
)
from ecmfq_export.models.float_source import ExpertPart
from ecmfq_export.models.spec import ModelSpec, MoESpec, VisionSpec

if TYPE_CHECKING:
    import torch

_TEXT_HARMLESS = qwen3_vl_moe.TEXT_HARMLESS | WRITTEN_BY_TRANSFORMERS_4
_TOP_HARMLESS = BOOKKEEPING | WRITTEN_BY_TRANSFORMERS_4
_VISION_HARMLESS = BOOKKEEPING | WRITTEN_BY_TRANSFORMERS_4 | {
    "attention_dropout": "training only",
    "hidden_dropout_prob": "training only",
    "projection_dropout": "training only",
    "layer_scale_init_value": "initialization of training",
}  # fmt: skip


def read_spec(config: dict[str, Any]) -> ModelSpec:
    """The spec of a ``config.json``; absent fields take the defaults of transformers' config classes.

    Raises:
        CheckpointError: transformers' own validation fails, or sizes contradict each other.
        UnsupportedError: a field, or a value of one, that changes the model and is not handled.
    """
    defaults = _transformers_config(config)
    top = ConfigFields("", config, defaults)
    top.take("quantization_config")  # models/quantized_reader.py reads it
    top.expect("architectures", ["InternVLForConditionalGeneration"], None, why="only the generating model is handled")
    top.expect("model_type", "internvl", why="another family")
    top.expect("vision_feature_layer", -1, why="the projector reads the last layer")
    top.expect("vision_feature_select_strategy", "default", why="the projector reads patches alone")
    top.expect("projector_hidden_act", "gelu", why="no such projector was checked")
    text_given, vision_given = (subsection(top.take(name), name) for name in ("text_config", "vision_config"))
    text = ConfigFields("text_config", text_given, defaults.text_config, {"num_experts": ("num_local_experts",)})
    text.expect("model_type", "qwen3_moe", why="another decoder than this family's, or one without routed experts")
    hidden_size = text.whole("hidden_size")
    layers = qwen3_vl_moe.read_layers(text, hidden_size, text.flag("norm_topk_prob"))
    spec = ModelSpec(
        family="internvl",
        hidden_size=hidden_size,
        vocab_size=text.whole("vocab_size"),
        rms_norm_eps=text.number("rms_norm_eps"),
        tie_word_embeddings=top.flag("tie_word_embeddings"),
        max_position_embeddings=text.whole("max_position_embeddings"),
        rope=deepseek_v3.read_rope(text, text_given, defaults.text_config, layers[0].attention.key_head_dim),
        layers=layers,
        vision=_read_vision(top, vision_given, defaults.vision_config, hidden_size),
        image_token_id=top.whole("image_token_id", 0),
        video_token_id=None,
        vision_start_token_id=None,
        vision_end_token_id=None,
    )
    check_token("image_token_id", spec.image_token_id, spec.vocab_size)
    finish_all((text, _TEXT_HARMLESS), (top, _TOP_HARMLESS))
    return spec


def _transformers_config(config: dict[str, Any]) -> Any:
    from transformers import InternVLConfig

    made = built(InternVLConfig, config)
    kinds = {"text_config": "qwen3_moe", "vision_config": "internvl_vision"}
    for section, kind in kinds.items():
        found = getattr(getattr(made, section), "model_type", None)
        if found != kind:
            raise UnsupportedError(f"config.json: {section}.model_type = {found!r}", f"supported: {kind!r}")
    return made


def _read_vision(top: ConfigFields, given: dict[str, Any], defaults: Any, hidden_size: int) -> VisionSpec:
    vision = ConfigFields("vision_config", given, defaults)
    vision.expect("model_type", "internvl_vision", why="another vision tower than this family's")
    vision.expect("hidden_act", "gelu", why="no such tower was checked")
    vision.expect("use_mask_token", False, None, why="masks are for training")
    vision.expect("use_absolute_position_embeddings", True, why="no tower without a table was checked")
    vision.whole("intermediate_size")  # the tower's shapes show it, and the flags
    for name in ("attention_bias", "use_qk_norm", "use_mean_pooling"):
        vision.flag(name)
    vision.expect("norm_type", "layer_norm", "rms_norm", why="transformers' tower knows no other")
    vision.number("layer_norm_eps")  # transformers' own modules read it
    image, patch = (_side(vision, name) for name in ("image_size", "patch_size"))
    top.expect("downsample_ratio", 0.5, why="no other pixel shuffle was checked")
    spec = VisionSpec(
        hidden_size=vision.whole("hidden_size"),
        num_layers=vision.whole("num_hidden_layers", maximum=MAX_LAYERS),
        num_heads=vision.whole("num_attention_heads"),
        in_channels=vision.whole("num_channels"),
        patch_size=patch,
        temporal_patch_size=1,
        spatial_merge_size=2,
        out_hidden_size=hidden_size,
        num_position_embeddings=(image // patch) ** 2,
        deepstack_layers=(),
        position_interpolation="own",
        patch_order="raster",
        class_token=True,
    )
    refuse_unused(vision)
    vision.finish(_VISION_HARMLESS)
    if spec.hidden_size % spec.num_heads or image % (2 * patch):
        raise CheckpointError(
            f"config.json: vision hidden_size {spec.hidden_size} over {spec.num_heads} heads, image_size {image} in patches of {patch}",
            "heads must divide hidden_size, and an image must be whole merged patches",
        )
    tokens = spec.num_position_embeddings // 4
    if top.take("image_seq_length") != tokens:
        raise CheckpointError(f"config.json: image_seq_length = {top.take('image_seq_length')!r}, a tile makes {tokens} tokens")
    return spec


def _side(vision: ConfigFields, name: str) -> int:
    """One side of a square that is a number or two equal ones."""
    value = vision.take(name)
    sides = set(value) if isinstance(value, list | tuple) else {value}
    side = sides.pop() if len(sides) == 1 else None
    if type(side) is not int or side < 1:
        raise CheckpointError(f"config.json: {vision.label(name)} = {value!r}", "expected a square")
    return side


def disk_name(name: str) -> str:
    """Canonical name (spec.py) to the name on disk, the same in published checkpoints and in what transformers saves."""
    if name.startswith("vision."):
        return name.removeprefix("vision.")
    return f"language_model.{name}" if name.startswith("lm_head.") else f"language_model.model.{deepseek_v3.layer_disk_name(name)}"


def expert_parts(spec: ModelSpec, name: str) -> tuple[ExpertPart, ...]:
    """One matrix a projection and expert."""
    mlp = spec.layers[int(name.split(".")[1])].mlp
    assert isinstance(mlp, MoESpec)
    return deepseek_v3.expert_parts(mlp, disk_name(name), stacked=False)


def build_vision(config: dict[str, Any]) -> torch.nn.Module:
    """transformers' vision tower and projector on the meta device."""
    return intern_vision.build(_transformers_config(config))


def vision_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Canonical names and shapes of the vision tower's tensors."""
    return {f"vision.{name}": tuple(tensor.shape) for name, tensor in build_vision(config).state_dict().items()}


def residual_writers(spec: ModelSpec) -> tuple[str, ...]:
    """The projector's last projection."""
    return tuple(f"vision.multi_modal_projector.linear_2.{part}" for part in ("weight", "bias"))
