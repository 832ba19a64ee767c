"""Qwen3-VL-MoE: its config, its tensor names, its vision tower.

Facts are those of transformers 5.23, ``models/qwen3_vl_moe`` and ``conversion_mapping.py``.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from ecmfq_export.errors import CheckpointError, UnsupportedError
from ecmfq_export.models.config_fields import (
    BOOKKEEPING,
    MAX_LAYERS,
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

TEXT_HARMLESS = BOOKKEEPING | {
    "attention_dropout": "training only",
    "output_router_logits": "asks for the training loss of the router",
    "router_aux_loss_coef": "training loss of the router",
    "max_window_layers": "read together with use_sliding_window, which is refused where true",
    "tie_word_embeddings": "transformers ties by the field of the level above",
}
"""Fields of the text section that do not change inference, with the reason."""

_TOP_HARMLESS = BOOKKEEPING | {"rope_parameters": "transformers 5.24 writes one here too; its model reads text_config's"}


def read_spec(config: dict[str, Any]) -> ModelSpec:
    """The spec of a ``config.json``; absent fields take the defaults of transformers' config classes.

    Raises:
        CheckpointError: transformers' own validation fails, or sizes contradict each other.
        UnsupportedError: a field, or a value of one, that changes the model and is not handled.
    """
    defaults = _transformers_config(config)
    top = ConfigFields("", config, defaults)
    top.take("quantization_config")  # models/quantized_reader.py reads it
    top.expect("architectures", ["Qwen3VLMoeForConditionalGeneration"], None, why="only the generating model is handled")
    top.expect("model_type", "qwen3_vl_moe", why="another family")
    text_given, vision_given = (subsection(top.take(name), name) for name in ("text_config", "vision_config"))
    text = ConfigFields("text_config", text_given, defaults.text_config, {"num_experts": ("num_local_experts",)})
    text.expect("model_type", "qwen3_vl_moe_text", why="another decoder than this family's")
    text.expect("norm_topk_prob", True, None, why="transformers' class always renormalizes the selected scores")
    vision = vision_fields("vision_config", vision_given, defaults.vision_config)
    vision.expect("model_type", "qwen3_vl_moe_vision", "qwen3_vl_moe", why="another vision tower than this family's")
    spec = read_model(
        "qwen3_vl_moe", text, text_given, vision, defaults.text_config, tied=top.flag("tie_word_embeddings"), renormalize=True,
        tokens={name: top.whole(name, 0) for name in
                ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")},
    )  # fmt: skip
    vision.finish(BOOKKEEPING)
    text.finish(TEXT_HARMLESS)
    finish_all((top, _TOP_HARMLESS))
    return spec


def read_model(
    family: str, text: ConfigFields, given: dict[str, Any], vision_section: ConfigFields, text_defaults: Any, *, tied: bool,
    renormalize: bool, tokens: dict[str, int | None],
) -> ModelSpec:  # fmt: skip
    """The spec of a model with this decoder and this tower; the caller finishes the sections.

    Args:
        given: what the file says in the text section.
        text_defaults: transformers' text config.
        renormalize: whether the selected scores are divided by their sum.
        tokens: token ids, by the names of ModelSpec's fields.

    Raises:
        CheckpointError: sizes contradict each other.
        UnsupportedError: a value that changes the model and is not handled.
    """
    hidden_size = text.whole("hidden_size")
    vision = _read_vision(vision_section, hidden_size)
    layers = read_layers(text, hidden_size, renormalize)
    spec = ModelSpec(
        family=family,
        hidden_size=hidden_size,
        vocab_size=text.whole("vocab_size"),
        rms_norm_eps=text.number("rms_norm_eps"),
        tie_word_embeddings=tied,
        max_position_embeddings=text.whole("max_position_embeddings"),
        rope=_read_rope(text, given, text_defaults, layers[0].attention.head_dim),
        layers=layers,
        vision=vision,
        **tokens,
    )
    for name, token in tokens.items():
        if token is not None:
            check_token(name, token, spec.vocab_size)
    if len(vision.deepstack_layers) > len(layers):
        raise UnsupportedError(
            f"config.json: {len(vision.deepstack_layers)} DeepStack features for {len(layers)} decoder layers",
            "each feature is added after one decoder layer",
        )
    refuse_unused(text)
    return spec


def _transformers_config(config: dict[str, Any]) -> Any:
    from transformers import Qwen3VLMoeConfig

    return built(Qwen3VLMoeConfig, config)


def read_layers(text: ConfigFields, hidden_size: int, renormalize: bool) -> tuple[DecoderLayerSpec, ...]:
    """The layers of a Qwen3-MoE decoder; arguments and errors as :func:`read_model`."""
    text.expect("hidden_act", "silu", why="experts and kernels are gated by SiLU")
    text.expect("sliding_window", None, why="attention is over the whole context")
    text.expect("use_sliding_window", False, None, why="attention is over the whole context")
    num_layers = text.whole("num_hidden_layers", maximum=MAX_LAYERS)
    text.expect("layer_types", None, ["full_attention"] * num_layers, why="attention is over the whole context")
    num_heads, num_kv_heads, head_dim = read_heads(text, hidden_size)
    bias = text.flag("attention_bias")
    attention = GqaSpec(num_heads, num_kv_heads, head_dim, qk_norm=True, bias=bias, output_bias=bias)
    num_experts, top_k = text.whole("num_experts"), text.whole("num_experts_per_tok")
    if top_k > num_experts:
        raise CheckpointError(f"config.json: num_experts_per_tok = {top_k} of num_experts = {num_experts}")
    router = RouterSpec(scoring="softmax", renormalize=renormalize)
    moe = MoESpec(hidden_size, text.whole("moe_intermediate_size"), num_experts, top_k, router)
    dense = DenseMlpSpec(hidden_size, text.whole("intermediate_size"))
    step, dense_layers = text.whole("decoder_sparse_step"), text.take("mlp_only_layers")
    dense_layers = () if dense_layers is None else text.wholes("mlp_only_layers")
    return tuple(
        DecoderLayerSpec(i, attention, dense if i in dense_layers or (i + 1) % step else moe) for i in range(num_layers)
    )


def _read_rope(text: ConfigFields, given: dict[str, Any], defaults: Any, head_dim: int) -> RopeSpec:
    """`defaults` has the three historical spellings (rope_parameters, rope_scaling, rope_theta) merged already."""
    one_rope_spelling(text, given)
    rope = ConfigFields(text.label("rope_parameters"), dict(defaults.rope_parameters), None)
    rope.expect("rope_type", "default", why="only unscaled rotary embedding is handled")
    rope.expect("type", "default", None, why="only unscaled rotary embedding is handled")
    for name in ("mrope_interleaved", "interleaved"):
        rope.expect(name, True, None, why="transformers' class always interleaves")
    theta = rope.number("rope_theta")
    # The class's own default where the file names no sections.
    sections = (24, 20, 20) if rope.take("mrope_section") is None else rope.wholes("mrope_section")
    rope.finish({})
    half = head_dim // 2
    owners = [0] * half
    for axis in (1, 2):
        for frequency in range(axis, min(half, 3 * sections[axis]) if len(sections) == 3 else 0, 3):
            owners[frequency] = axis
    if len(sections) != 3 or tuple(owners.count(axis) for axis in range(3)) != sections:
        raise UnsupportedError(
            f"config.json: {rope.label('mrope_section')} = {list(sections)} does not interleave over head_dim / 2 = {half} frequencies",
            "expected three sections that sum to head_dim / 2, rows and columns at most a third each",
        )
    return RopeSpec("mrope_interleaved", theta, sections, head_dim)


def vision_fields(where: str, given: dict[str, Any], defaults: Any) -> ConfigFields:
    """A vision section, whose rotary fields are read."""
    vision = ConfigFields(where, given, defaults, {"num_heads": ("num_attention_heads",), "depth": ("num_hidden_layers",)})
    expect_axial_rope(vision, defaults)
    return vision


def _read_vision(vision: ConfigFields, hidden_size: int) -> VisionSpec:
    vision.expect("hidden_act", "gelu_pytorch_tanh", why="no such tower was checked")
    vision.whole("intermediate_size")  # the tower's shapes show it
    spec = VisionSpec(
        hidden_size=vision.whole("hidden_size"),
        num_layers=vision.whole("depth", maximum=MAX_LAYERS),
        num_heads=vision.whole("num_heads"),
        in_channels=vision.whole("in_channels"),
        patch_size=vision.whole("patch_size"),
        temporal_patch_size=vision.whole("temporal_patch_size"),
        spatial_merge_size=vision.whole("spatial_merge_size"),
        out_hidden_size=vision.whole("out_hidden_size"),
        num_position_embeddings=vision.whole("num_position_embeddings"),
        deepstack_layers=vision.wholes("deepstack_visual_indexes"),
    )
    refuse_unused(vision)
    if spec.out_hidden_size != hidden_size:
        raise CheckpointError(f"config.json: vision out_hidden_size {spec.out_hidden_size}, text hidden_size {hidden_size}")
    if spec.hidden_size % (4 * spec.num_heads):
        raise CheckpointError(
            f"config.json: vision hidden_size {spec.hidden_size} over {spec.num_heads} heads",
            "a head's size must be a multiple of 4",
        )
    if int(spec.num_position_embeddings**0.5) ** 2 != spec.num_position_embeddings:
        raise CheckpointError(f"config.json: num_position_embeddings {spec.num_position_embeddings} is no square")
    layers = spec.deepstack_layers
    if list(layers) != sorted(set(layers)) or any(layer >= spec.num_layers for layer in layers):
        raise UnsupportedError(
            f"config.json: deepstack_visual_indexes = {list(layers)} of {spec.num_layers} vision layers",
            "expected ascending layer numbers",
        )
    return spec


_TEXT_PREFIX = "model.language_model."
_VISION_PREFIX = "model.visual."
_ROUTER = re.compile(r"\.mlp\.router\.weight$")


def disk_name(name: str) -> str:
    """Canonical name (spec.py) to the name on disk, the same in published checkpoints and in what transformers saves."""
    if name.startswith("vision."):
        return _VISION_PREFIX + name.removeprefix("vision.")
    if name.startswith("lm_head."):
        return name
    return _TEXT_PREFIX + _ROUTER.sub(".mlp.gate.weight", name)


def build_vision(config: dict[str, Any]) -> torch.nn.Module:
    """transformers' vision tower on the meta device, eager attention."""
    import torch
    from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeVisionModel

    vision_config = _transformers_config(config).vision_config
    vision_config._attn_implementation = "eager"
    with torch.device("meta"):
        return Qwen3VLMoeVisionModel(vision_config)


def finish_vision(module: torch.nn.Module) -> None:
    """Compute the inverse frequencies, which the meta device left empty and no checkpoint holds."""
    module.rotary_pos_emb = type(module.rotary_pos_emb)(module.config)


def vision_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Canonical names and shapes of the vision tower's tensors."""
    return {f"vision.{name}": tuple(tensor.shape) for name, tensor in build_vision(config).state_dict().items()}


def residual_writers(spec: ModelSpec) -> tuple[str, ...]:
    """The last projections of the merger and of the DeepStack mergers."""
    mergers = ["merger", *(f"deepstack_merger_list.{i}" for i in range(spec.num_deepstack))]
    return tuple(f"vision.{merger}.linear_fc2.{part}" for merger in mergers for part in ("weight", "bias"))
