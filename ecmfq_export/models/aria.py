"""Aria: a Llama decoder whose layers are all routed, behind an Idefics3 vision tower with a projector of learned queries.

Facts are those of transformers 5.23, ``models/aria``, ``models/idefics3`` and ``conversion_mapping.py``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ecmfq_export.errors import CheckpointError, UnsupportedError
from ecmfq_export.models import aria_vision, deepseek_v3
from ecmfq_export.models.config_fields import (
    BOOKKEEPING,
    MAX_LAYERS,
    WRITTEN_BY_TRANSFORMERS_4,
    ConfigFields,
    built,
    check_token,
    finish_all,
    read_heads,
    refuse_unused,
    subsection,
)
from ecmfq_export.models.float_source import ExpertPart
from ecmfq_export.models.spec import DecoderLayerSpec, GqaSpec, ModelSpec, MoESpec, RouterSpec, VisionSpec

if TYPE_CHECKING:
    import torch

UNUSED = {"vision_tower.post_layernorm.": "norm behind the vision tower, whose features are taken in front of it"}
_TEXT_HARMLESS = BOOKKEEPING | WRITTEN_BY_TRANSFORMERS_4 | {
    "attention_dropout": "training only",
    "pretraining_tp": "how a model was trained",
    "tie_word_embeddings": "transformers ties by the top level's field",
}  # fmt: skip
_TOP_HARMLESS = BOOKKEEPING | WRITTEN_BY_TRANSFORMERS_4 | {"ignore_index": "training only"}
_VISION_HARMLESS = BOOKKEEPING | WRITTEN_BY_TRANSFORMERS_4 | {"attention_dropout": "training only"}


def read_spec(config: dict[str, Any]) -> ModelSpec:
    """The spec of a ``config.json``; absent fields take the defaults of transformers' config classes.

    Raises:
        CheckpointError: transformers' own validation fails, or sizes contradict each other.
        UnsupportedError: a field, or a value of one, that changes the model and is not handled.
    """
    defaults = _transformers_config(config)
    top = ConfigFields("", config, defaults, {"image_token_index": ("image_token_id",)})
    top.take("quantization_config")  # models/quantized_reader.py reads it
    top.expect("architectures", ["AriaForConditionalGeneration"], None, why="only the generating model is handled")
    top.expect("model_type", "aria", why="another family")
    top.expect("vision_feature_layer", -1, why="the projector reads the last layer")
    text_given, vision_given = (subsection(top.take(name), name) for name in ("text_config", "vision_config"))
    text = ConfigFields("text_config", text_given, defaults.text_config)
    text.expect("model_type", "aria_text", why="another decoder than this family's")
    hidden_size = text.whole("hidden_size")
    layers = _read_layers(text, hidden_size)
    attention = layers[0].attention
    assert isinstance(attention, GqaSpec)
    spec = ModelSpec(
        family="aria",
        hidden_size=hidden_size,
        vocab_size=text.whole("vocab_size"),
        rms_norm_eps=text.number("rms_norm_eps"),
        tie_word_embeddings=top.flag("tie_word_embeddings"),
        max_position_embeddings=text.whole("max_position_embeddings"),
        rope=deepseek_v3.read_rope(text, text_given, defaults.text_config, attention.head_dim),
        layers=layers,
        vision=_read_vision(top, vision_given, defaults, hidden_size),
        image_token_id=top.whole("image_token_index", 0),
        video_token_id=None,
        vision_start_token_id=None,
        vision_end_token_id=None,
    )
    check_token("image_token_index", spec.image_token_id, spec.vocab_size)
    finish_all((text, _TEXT_HARMLESS), (top, _TOP_HARMLESS))
    return spec


def _transformers_config(config: dict[str, Any]) -> Any:
    from transformers import AriaConfig

    # It is derived from projector_patch_to_query_dict, and written beside it.
    made = built(AriaConfig, config, without=("max_value_projector_patch_to_query_dict",))
    if type(made.vision_config).__name__ != "Idefics3VisionConfig":
        kind = getattr(made.vision_config, "model_type", None)
        raise UnsupportedError(f"config.json: vision_config.model_type = {kind!r}", "supported: 'idefics3_vision'")
    return made


def _read_layers(text: ConfigFields, hidden_size: int) -> tuple[DecoderLayerSpec, ...]:
    text.expect("hidden_act", "silu", why="experts and kernels are gated by SiLU")
    text.expect("mlp_bias", False, None, why="biases of shared experts have no place in the kernels")
    num_heads, num_kv_heads, head_dim = read_heads(text, hidden_size, one_count=True)
    bias = text.flag("attention_bias")
    attention = GqaSpec(num_heads, num_kv_heads, head_dim, qk_norm=False, bias=bias, output_bias=bias)
    experts, picks = text.whole("moe_num_experts"), text.whole("moe_topk")
    if picks > experts:
        raise CheckpointError(f"config.json: moe_topk = {picks} of moe_num_experts = {experts}", "no more experts a token than there are")
    # A softmax over the selected logits is the one over all of them, renormalized.
    moe = MoESpec(hidden_size, text.whole("intermediate_size"), experts, picks, RouterSpec("softmax", renormalize=True),
                  num_shared_experts=text.whole("moe_num_shared_experts", 0))
    return tuple(DecoderLayerSpec(i, attention, moe) for i in range(text.whole("num_hidden_layers", maximum=MAX_LAYERS)))


def _read_vision(top: ConfigFields, given: dict[str, Any], defaults: Any, hidden_size: int) -> VisionSpec:
    vision = ConfigFields("vision_config", given, defaults.vision_config)
    vision.expect("model_type", "idefics3_vision", why="another vision tower than this family's")
    vision.expect("hidden_act", "gelu_pytorch_tanh", why="no such tower was checked")
    vision.whole("intermediate_size")  # the tower's shapes show it
    vision.number("layer_norm_eps")  # transformers' own modules read it
    image, patch = vision.whole("image_size"), vision.whole("patch_size")
    spec = VisionSpec(
        hidden_size=vision.whole("hidden_size"),
        num_layers=vision.whole("num_hidden_layers", maximum=MAX_LAYERS),
        num_heads=vision.whole("num_attention_heads"),
        in_channels=vision.whole("num_channels"),
        patch_size=patch,
        temporal_patch_size=1,
        spatial_merge_size=1,
        out_hidden_size=hidden_size,
        num_position_embeddings=(image // patch) ** 2,
        deepstack_layers=(),
        position_interpolation="bucket",
        queries=_read_queries(top, defaults),
    )
    refuse_unused(vision)
    vision.finish(_VISION_HARMLESS)
    if spec.hidden_size % spec.num_heads or image < patch:
        raise CheckpointError(
            f"config.json: vision hidden_size {spec.hidden_size} over {spec.num_heads} heads, image_size {image} in patches of {patch}",
            "heads must divide hidden_size, and an image must be at least one patch",
        )
    return spec


def _read_queries(top: ConfigFields, defaults: Any) -> tuple[tuple[int, int], ...]:
    """Patches of a square canvas and the queries that read it, by size of canvas."""
    given = top.take("projector_patch_to_query_dict")
    queries = tuple(sorted((int(patches), int(count)) for patches, count in defaults.projector_patch_to_query_dict.items()))
    largest = top.take("max_value_projector_patch_to_query_dict")
    if any(math.isqrt(max(patches, 0)) ** 2 != patches or patches < 1 or count < 1 for patches, count in queries) or not queries:
        raise CheckpointError(f"config.json: projector_patch_to_query_dict = {str(given)[:100]}",
                              "expected numbers of queries by numbers of patches in a square")
    if largest is not None and largest != max(count for _, count in queries):
        raise CheckpointError(f"config.json: max_value_projector_patch_to_query_dict = {largest!r}, "
                              f"projector_patch_to_query_dict = {str(given)[:100]}", "it is the largest of them")
    return queries


def disk_name(name: str) -> str:
    """Canonical name (spec.py) to the name on disk, the same in published checkpoints and in what transformers saves."""
    if name.startswith("vision."):
        return name.removeprefix("vision.")
    return f"language_model.{name}" if name.startswith("lm_head.") else f"language_model.model.{name}"


def expert_parts(spec: ModelSpec, name: str) -> tuple[ExpertPart, ...]:
    """Routed experts stacked and transposed, the shared ones in one MLP."""
    mlp = spec.layers[int(name.split(".")[1])].mlp
    assert isinstance(mlp, MoESpec)
    base, kind = disk_name(name).rsplit(".", 1)
    rows, columns = (2 * mlp.intermediate_size, mlp.hidden_size) if kind == "gate_up_proj" else (mlp.hidden_size, mlp.intermediate_size)
    file = f"{base}.{'fc1' if kind == 'gate_up_proj' else 'fc2'}.weight"
    routed = ExpertPart(file, (mlp.num_experts, columns, rows), 0, slice(0, rows), transposed=True)
    shared = [part for part in deepseek_v3.expert_parts(mlp, disk_name(name), stacked=True) if part.expert >= mlp.num_experts]
    return (routed, *shared)


def build_vision(config: dict[str, Any]) -> torch.nn.Module:
    """transformers' vision tower and projector on the meta device."""
    return aria_vision.build(_transformers_config(config))


def vision_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Canonical names and shapes of the vision tower's tensors."""
    return {f"vision.{name}": tuple(tensor.shape) for name, tensor in build_vision(config).state_dict().items()}


def residual_writers(spec: ModelSpec) -> tuple[str, ...]:
    """The projector's last projection."""
    return ("vision.multi_modal_projector.feed_forward.linear_out.weight",)
