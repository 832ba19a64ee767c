"""Qwen3-Omni-MoE: the thinker's text and image side of a full checkpoint, or of a thinker saved by itself.

The thinker is a Qwen3-VL-MoE under other names, with an audio tower beside the vision tower. Audio and speech (the audio tower,
the talker, the waveform decoder) are not run: their tensors are known by name and left alone, their config sections are not read.
Facts are those of transformers 5.23, ``models/qwen3_omni_moe`` and ``conversion_mapping.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ecmfq_export.models import deepseek_v3
from ecmfq_export.models.config_fields import (
    BOOKKEEPING,
    WRITTEN_BY_TRANSFORMERS_4,
    ConfigFields,
    built,
    finish_all,
    subsection,
)
from ecmfq_export.models.float_source import ExpertPart
from ecmfq_export.models.qwen3_vl_moe import TEXT_HARMLESS, read_model, vision_fields
from ecmfq_export.models.spec import ModelSpec, MoESpec

if TYPE_CHECKING:
    import torch

_SPEECH = (
    "talker_config", "code2wav_config", "enable_audio_output", "im_start_token_id", "im_end_token_id", "tts_pad_token_id",
    "tts_bos_token_id", "tts_eos_token_id", "system_token_id", "user_token_id", "assistant_token_id",
)  # fmt: skip
_FULL_HARMLESS = BOOKKEEPING | dict.fromkeys(_SPEECH, "speech output, which is not run") | {
    "tie_word_embeddings": "transformers ties by the thinker's field",
}
_AUDIO = ("audio_config", "audio_start_token_id", "audio_end_token_id", "user_token_id")
_THINKER_HARMLESS = BOOKKEEPING | WRITTEN_BY_TRANSFORMERS_4 | dict.fromkeys(_AUDIO, "audio input and output, which are not run") | {
    "position_id_per_seconds": "time between frames; an image has one frame",
    "seconds_per_chunk": "how audio and video interleave",
}  # fmt: skip
_TEXT_HARMLESS = TEXT_HARMLESS | WRITTEN_BY_TRANSFORMERS_4
_VISION_HARMLESS = BOOKKEEPING | WRITTEN_BY_TRANSFORMERS_4 | {
    "image_size": "the position table's size is num_position_embeddings",
    "tokens_per_second": "time between a video's frames",
    "tie_word_embeddings": "the tower has no embeddings",
}

PREFIX = "thinker."
"""Of the thinker's tensors in a full checkpoint."""

UNUSED: Mapping[str, str] = {
    "thinker.audio_tower.": "audio input",
    "talker.": "speech output",
    "code2wav.": "speech output",
}
"""Tensors of a full checkpoint that text and images do not need, by prefix."""

THINKER_UNUSED: Mapping[str, str] = {"audio_tower.": "audio input"}
"""The same of a thinker by itself."""


def read_spec(config: dict[str, Any]) -> ModelSpec:
    """The thinker's spec from a full model's ``config.json``; absent fields take the defaults of transformers' config classes.

    Raises:
        CheckpointError: transformers' own validation fails, or sizes contradict each other.
        UnsupportedError: a field, or a value of one, that changes the model and is not handled.
    """
    top = ConfigFields("", config, None)
    top.expect("architectures", ["Qwen3OmniMoeForConditionalGeneration"], None, why="only the generating model is handled")
    for name in ("model_type", "quantization_config"):  # the registry and models/quantized_reader.py read them
        top.take(name)
    spec = _read_thinker("qwen3_omni_moe", "thinker_config", subsection(top.take("thinker_config"), "thinker_config"))
    finish_all((top, _FULL_HARMLESS))
    return spec


def read_thinker_spec(config: dict[str, Any]) -> ModelSpec:
    """The spec of a thinker's own ``config.json``; errors as :func:`read_spec`."""
    return _read_thinker("qwen3_omni_moe_thinker", "", config)


def _read_thinker(family: str, where: str, given: dict[str, Any]) -> ModelSpec:
    defaults = _thinker_config(given)
    thinker = ConfigFields(where, given, defaults)
    thinker.expect("model_type", "qwen3_omni_moe_thinker", None, why="another model than a thinker")
    thinker.expect("architectures", ["Qwen3OmniMoeThinkerForConditionalGeneration"], None, why="only the generating model is handled")
    thinker.take("quantization_config")
    text_given, vision_given = (subsection(thinker.take(name), thinker.label(name)) for name in ("text_config", "vision_config"))
    text = ConfigFields(thinker.label("text_config"), text_given, defaults.text_config)
    text.expect("model_type", "qwen3_omni_moe_text", why="another decoder than this family's")
    text.expect("shared_expert_intermediate_size", 0, None, why="transformers' thinker has no shared expert")
    text.expect("use_qk_norm", True, None, why="transformers' thinker always norms queries and keys")
    vision = vision_fields(thinker.label("vision_config"), vision_given, defaults.vision_config)
    vision.expect("model_type", "qwen3_omni_moe_vision_encoder", why="another vision tower than this family's")
    vision.expect("apply_vit_abs_pos_embed", True, None, why="transformers' tower always adds its position table")
    vision.expect("in_chans", vision.take("in_channels"), None, why="in_channels says otherwise")
    vision.expect("spatial_patch_size", vision.take("patch_size"), None, why="patch_size says otherwise")

    def token(name: str) -> int | None:
        return None if thinker.take(name) is None else thinker.whole(name, 0)

    spec = read_model(
        family, text, text_given, vision, defaults.text_config, tied=thinker.flag("tie_word_embeddings"),
        renormalize=text.flag("norm_topk_prob"),
        tokens={"image_token_id": thinker.whole("image_token_id", 0)} | {name: token(name) for name in (
            "video_token_id", "audio_token_id", "vision_start_token_id", "vision_end_token_id")},
    )  # fmt: skip
    vision.finish(_VISION_HARMLESS)
    text.finish(_TEXT_HARMLESS)
    finish_all((thinker, _THINKER_HARMLESS))
    return spec


def _thinker_config(given: dict[str, Any]) -> Any:
    from transformers import Qwen3OmniMoeThinkerConfig

    # The audio tower is not run, so its section is no reason to refuse a model.
    return built(Qwen3OmniMoeThinkerConfig, given, without=("audio_config",))


def disk_name(name: str) -> str:
    """Canonical name (spec.py) to the name in a full checkpoint, published or saved by transformers."""
    return PREFIX + thinker_disk_name(name)


def thinker_disk_name(name: str) -> str:
    """Canonical name (spec.py) to the name in a thinker's own checkpoint."""
    if name.startswith("vision."):
        return "visual." + name.removeprefix("vision.")
    return name if name.startswith("lm_head.") else "model." + deepseek_v3.layer_disk_name(name)


def expert_parts(spec: ModelSpec, name: str) -> tuple[ExpertPart, ...]:
    """Experts of a full checkpoint: one matrix a projection and expert."""
    return deepseek_v3.expert_parts(_moe(spec, name), disk_name(name), stacked=False)


def thinker_expert_parts(spec: ModelSpec, name: str) -> tuple[ExpertPart, ...]:
    """The same in a thinker's own checkpoint."""
    return deepseek_v3.expert_parts(_moe(spec, name), thinker_disk_name(name), stacked=False)


def _moe(spec: ModelSpec, name: str) -> MoESpec:
    mlp = spec.layers[int(name.split(".")[1])].mlp
    assert isinstance(mlp, MoESpec)
    return mlp


def build_vision(config: dict[str, Any]) -> torch.nn.Module:
    """transformers' vision tower on the meta device, eager attention, for either form of config."""
    import torch
    from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import Qwen3OmniMoeVisionEncoder

    thinker = config if config["model_type"] == "qwen3_omni_moe_thinker" else subsection(config.get("thinker_config"), "thinker_config")
    vision_config = _thinker_config(thinker).vision_config
    vision_config._attn_implementation = "eager"
    with torch.device("meta"):
        return Qwen3OmniMoeVisionEncoder(vision_config)


def vision_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Canonical names and shapes of the vision tower's tensors."""
    return {f"vision.{name}": tuple(tensor.shape) for name, tensor in build_vision(config).state_dict().items()}


def residual_writers(spec: ModelSpec) -> tuple[str, ...]:
    """The last projections of the merger and of the DeepStack mergers."""
    mergers = ["merger", *(f"merger_list.{i}" for i in range(spec.num_deepstack))]
    return tuple(f"vision.{merger}.mlp.2.{part}" for merger in mergers for part in ("weight", "bias"))
