"""Kimi-VL: a MoonViT tower before a DeepSeek-V3 decoder, in two forms on disk.

``kimi_vl`` is the published form (moonshotai/Kimi-VL-A3B-*), for which transformers has no class of its own: tensor names and
config fields are those that vLLM and SGLang read. ``kimi_k25`` is what transformers 5.23 keeps for a model of its Kimi-K2.5
classes (``save_pretrained(..., save_original_format=False)``), which compute the same.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ecmfq_export.errors import CheckpointError, UnsupportedError
from ecmfq_export.models import deepseek_v3, kimi_vision
from ecmfq_export.models.config_fields import (
    BOOKKEEPING,
    MAX_LAYERS,
    ConfigFields,
    built,
    expect_axial_rope,
    finish_all,
    refuse_unused,
    subsection,
)
from ecmfq_export.models.float_source import ExpertPart
from ecmfq_export.models.spec import MlaSpec, ModelSpec, MoESpec, VisionSpec

if TYPE_CHECKING:
    import torch
    from transformers import Kimi_K25Config

_TOP_HARMLESS = BOOKKEEPING | {
    "auto_map": "names remote code, which is never run",
    "ignore_index": "training only",
}
_MOONVIT_DEFAULTS = SimpleNamespace(
    patch_size=14, init_pos_emb_height=64, init_pos_emb_width=64, num_attention_heads=16, num_hidden_layers=27, hidden_size=1152,
    intermediate_size=4304, merge_kernel_size=[2, 2], model_type="moonvit", hidden_act="gelu_pytorch_tanh",
)  # fmt: skip
"""Of the published config class."""


def read_spec(config: dict[str, Any]) -> ModelSpec:
    """The spec of a published ``config.json``.

    Raises:
        CheckpointError: sizes contradict each other, or transformers refuses the text section.
        UnsupportedError: a field, or a value of one, that changes the model and is not handled.
    """
    top = ConfigFields("", config, SimpleNamespace(media_placeholder_token_id=163605))
    top.expect("architectures", ["KimiVLForConditionalGeneration"], None, why="only the generating model is handled")
    text_given, vision_given = (subsection(top.take(name), name) for name in ("text_config", "vision_config"))
    defaults = _text_defaults(text_given)
    text = ConfigFields("text_config", text_given, defaults)
    tied = text.flag("tie_word_embeddings")
    top.expect("tie_word_embeddings", tied, None, why="text_config says otherwise")
    spec = _spec("kimi_vl", text, text_given, defaults, _published_vision(vision_given, text.whole("hidden_size")), tied,
                 image_token_id=top.whole("media_placeholder_token_id", 0))
    top.expect("vocab_size", spec.vocab_size, None, why="text_config says otherwise")
    _finish(top)
    return spec


def read_k25_spec(config: dict[str, Any]) -> ModelSpec:
    """The spec of a ``config.json`` of transformers' Kimi-K2.5 classes; errors as :func:`read_spec`."""
    defaults = _k25_config(config)
    top = ConfigFields("", config, defaults)
    top.expect("architectures", ["Kimi_K25ForConditionalGeneration"], None, why="only transformers' generating class is handled")
    text_given, vision_given = (subsection(top.take(name), name) for name in ("text_config", "vision_config"))
    text = ConfigFields("text_config", text_given, defaults.text_config)
    text.take("tie_word_embeddings")  # transformers ties by the top level's field
    vision = _k25_vision(top, vision_given, defaults.vision_config, text.whole("hidden_size"))
    spec = _spec("kimi_k25", text, text_given, defaults.text_config, vision, top.flag("tie_word_embeddings"),
                 **{name: top.whole(name, 0) for name in
                    ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")})
    _finish(top)
    return spec


def _spec(
    family: str, text: ConfigFields, given: dict[str, Any], defaults: Any, vision: VisionSpec, tied: bool, *, image_token_id: int,
    video_token_id: int | None = None, vision_start_token_id: int | None = None, vision_end_token_id: int | None = None,
) -> ModelSpec:  # fmt: skip
    hidden_size = text.whole("hidden_size")
    layers = deepseek_v3.read_layers(text, hidden_size)
    attention = layers[0].attention
    assert isinstance(attention, MlaSpec)
    spec = ModelSpec(
        family=family,
        hidden_size=hidden_size,
        vocab_size=text.whole("vocab_size"),
        rms_norm_eps=text.number("rms_norm_eps"),
        tie_word_embeddings=tied,
        max_position_embeddings=text.whole("max_position_embeddings"),
        rope=deepseek_v3.read_rope(text, given, defaults, attention.qk_rope_head_dim),
        layers=layers,
        vision=vision,
        image_token_id=image_token_id,
        video_token_id=video_token_id,
        vision_start_token_id=vision_start_token_id,
        vision_end_token_id=vision_end_token_id,
    )
    if image_token_id >= spec.vocab_size:
        raise CheckpointError(f"config.json: image token {image_token_id} is outside vocab_size = {spec.vocab_size}")
    finish_all((text, deepseek_v3.HARMLESS))
    return spec


def _finish(top: ConfigFields) -> None:
    for name in ("model_type", "quantization_config"):  # the registry and models/quantized_reader.py read them
        top.take(name)
    finish_all((top, _TOP_HARMLESS))


def _text_defaults(given: dict[str, Any]) -> Any:
    from transformers import DeepseekV3Config

    return built(DeepseekV3Config, given, without=deepseek_v3.HARMLESS)


def _k25_config(config: dict[str, Any]) -> Kimi_K25Config:
    from transformers import Kimi_K25Config

    return built(Kimi_K25Config, config)


def _published_vision(given: dict[str, Any], text_hidden_size: int) -> VisionSpec:
    vision = ConfigFields("vision_config", given, _MOONVIT_DEFAULTS)
    vision.expect("model_type", "moonvit", why="another vision tower than this family's")
    spec = _vision(vision, "init_pos_emb", text_hidden_size)
    vision.finish(deepseek_v3.HARMLESS)
    return spec


def _k25_vision(top: ConfigFields, given: dict[str, Any], defaults: Any, text_hidden_size: int) -> VisionSpec:
    vision = ConfigFields("vision_config", given, defaults)
    vision.expect("model_type", "kimi_k25_vision", why="another vision tower than this family's")
    expect_axial_rope(vision, defaults)
    spec = _vision(vision, "pos_emb", text_hidden_size)
    top.expect("projection_hidden_size", spec.hidden_size, why="the projector's norm reads the tower's channels")
    top.expect("projection_layer_norm_eps", 1e-5, why="published towers know no other")
    vision.finish(deepseek_v3.HARMLESS | {"pos_emb_time": "an image has one frame, to which nothing is added"})
    return spec


def _vision(vision: ConfigFields, table: str, text_hidden_size: int) -> VisionSpec:
    vision.expect("hidden_act", "gelu_pytorch_tanh", why="no such tower was checked")
    vision.whole("intermediate_size")  # the tower's shapes show it
    refuse_unused(vision)
    merge, side = vision.wholes("merge_kernel_size"), vision.whole(f"{table}_height")
    if len(merge) != 2 or merge[0] != merge[1] or merge[0] < 1 or vision.whole(f"{table}_width") != side:
        raise UnsupportedError(
            f"config.json: vision_config.merge_kernel_size = {list(merge)}, {table}_height = {side}, "
            f"{table}_width = {vision.take(f'{table}_width')}",
            "expected a square kernel and a square table",
        )
    spec = VisionSpec(
        hidden_size=vision.whole("hidden_size"),
        num_layers=vision.whole("num_hidden_layers", maximum=MAX_LAYERS),
        num_heads=vision.whole("num_attention_heads"),
        in_channels=3,
        patch_size=vision.whole("patch_size"),
        temporal_patch_size=1,
        spatial_merge_size=merge[0],
        out_hidden_size=text_hidden_size,
        num_position_embeddings=side * side,
        deepstack_layers=(),
        position_interpolation="bicubic",
        patch_order="raster",
    )
    if spec.hidden_size % (4 * spec.num_heads):
        raise CheckpointError(
            f"config.json: vision hidden_size {spec.hidden_size} over {spec.num_heads} heads",
            "a head's size must be a multiple of 4",
        )
    return spec


def disk_name(name: str) -> str:
    """Canonical name (spec.py) to the published one."""
    if name.startswith("vision."):
        return name.removeprefix("vision.")
    prefix = "language_model." if name.startswith("lm_head.") else "language_model.model."
    return prefix + deepseek_v3.layer_disk_name(name)


def k25_disk_name(name: str) -> str:
    """Canonical name (spec.py) to the one that transformers' classes have."""
    if name.startswith("vision."):
        return "model." + name.removeprefix("vision.")
    return name if name.startswith("lm_head.") else "model.language_model." + deepseek_v3.layer_disk_name(name)


def expert_parts(spec: ModelSpec, name: str) -> tuple[ExpertPart, ...]:
    """Published experts: one matrix a projection and expert, the shared ones in one MLP."""
    return deepseek_v3.expert_parts(_moe(spec, name), disk_name(name), stacked=False)


def k25_expert_parts(spec: ModelSpec, name: str) -> tuple[ExpertPart, ...]:
    """transformers' experts: the routed ones stacked, the shared ones in one MLP."""
    return deepseek_v3.expert_parts(_moe(spec, name), k25_disk_name(name), stacked=True)


def _moe(spec: ModelSpec, name: str) -> MoESpec:
    mlp = spec.layers[int(name.split(".")[1])].mlp
    assert isinstance(mlp, MoESpec)
    return mlp


def build_vision(config: dict[str, Any]) -> torch.nn.Module:
    """transformers' vision tower and projector on the meta device, for either form of config."""
    if config["model_type"] == "kimi_k25":
        return kimi_vision.build(_k25_config(config))
    from transformers import Kimi_K25Config

    vision = read_spec(config).vision
    side = round(vision.num_position_embeddings**0.5)
    given = {
        "patch_size": vision.patch_size, "pos_emb_height": side, "pos_emb_width": side, "hidden_size": vision.hidden_size,
        "num_attention_heads": vision.num_heads, "num_hidden_layers": vision.num_layers,
        "intermediate_size": (config.get("vision_config") or {}).get("intermediate_size", _MOONVIT_DEFAULTS.intermediate_size),
        "merge_kernel_size": [vision.spatial_merge_size] * 2,
    }  # fmt: skip
    return kimi_vision.build(Kimi_K25Config(
        text_config={"model_type": "deepseek_v3", "hidden_size": vision.out_hidden_size}, vision_config=given,
        projection_hidden_size=vision.hidden_size,
    ))  # fmt: skip


def vision_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Canonical names and shapes of the published vision tensors."""
    shapes = kimi_vision.published_shapes(build_vision(config))
    return {f"vision.{name}": shape for name, shape in shapes.items()}


def vision_state(module: torch.nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Published vision tensors in the form of transformers' classes."""
    return kimi_vision.from_published(state, module.state_dict().keys(), module.vision_tower.config.num_attention_heads)


def k25_vision_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Canonical names and shapes of the vision tensors of transformers' classes."""
    return {f"vision.{name}": tuple(tensor.shape) for name, tensor in build_vision(config).state_dict().items()}


def residual_writers(spec: ModelSpec) -> tuple[str, ...]:
    """The published projector's last layer."""
    return tuple(f"vision.multi_modal_projector.linear_2.{part}" for part in ("weight", "bias"))


def k25_residual_writers(spec: ModelSpec) -> tuple[str, ...]:
    """The same layer under transformers' name."""
    return tuple(f"vision.mm_projector.out_proj.{part}" for part in ("weight", "bias"))
