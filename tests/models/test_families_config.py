"""Every field of a further family's config.json changes what is read, is refused, or does not matter."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import pytest
from transformers import AriaConfig, Ernie4_5_VLMoeConfig, Glm4vMoeConfig, InternVLConfig

from ecmfq_export.errors import UserError
from ecmfq_export.models.registry import SUPPORTED
from tests.models.test_config_fields import changed, fields, flipped, spec_of, value_at
from tests.tiny_aria import aria_config
from tests.tiny_ernie import ernie_config
from tests.tiny_glm import glm_config
from tests.tiny_internvl import internvl_config
from tests.tiny_omni import omni_config

HARMLESS = {
    "dtype", "transformers_version", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "use_cache",
    "attention_dropout", "output_router_logits", "router_aux_loss_coef", "_name_or_path", "output_attentions",
    "output_hidden_states", "return_dict", "problem_type",
    "talker_config", "code2wav_config", "audio_config", "enable_audio_output", "im_start_token_id", "im_end_token_id", "tts_bos_token_id",
    "tts_eos_token_id", "tts_pad_token_id", "system_token_id", "user_token_id", "assistant_token_id", "audio_start_token_id",
    "audio_end_token_id", "position_id_per_seconds", "video_start_token_id", "video_end_token_id", "pretraining_tp",
    "hidden_dropout_prob", "projection_dropout", "layer_scale_init_value",
}  # fmt: skip
"""Fields whose value may change without changing inference on text and images, decided here independently of the code."""

VIDEO = {"video_start_token_id", "video_end_token_id"}
"""ERNIE's experts of images take these tokens."""


def saved(config: Any, name: str) -> dict[str, Any]:
    """What transformers writes into config.json, without classification labels, which no changed value of another kind can replace."""
    return _without_labels(json.loads(config.to_json_string())) | {"architectures": [name], "model_type": config.model_type}


def _without_labels(section: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in section.items() if key not in ("id2label", "label2id", "architectures")}
    return {key: _without_labels(value) if isinstance(value, dict) else value for key, value in kept.items()}


_OMNI = omni_config(mlp_only_layers=[0], num_hidden_layers=3)
OMNI = saved(_OMNI, "Qwen3OmniMoeForConditionalGeneration")
THINKER = saved(_OMNI.thinker_config, "Qwen3OmniMoeThinkerForConditionalGeneration")
# One pixel more is one patch more.
GLM = saved(glm_config(vision={"image_size": 27}), "Glm4vMoeForConditionalGeneration")
ERNIE = saved(ernie_config(), "Ernie4_5_VLMoeForConditionalGeneration")
ARIA = saved(aria_config(vision={"image_size": 559}), "AriaForConditionalGeneration")
INTERNVL = saved(internvl_config(mlp_only_layers=[0], num_hidden_layers=3), "InternVLForConditionalGeneration")
BASES = {base["model_type"]: base for base in (OMNI, THINKER, GLM, ERNIE, ARIA, INTERNVL)}
CASES = [pytest.param(base, path, id=f"{name}: {path}") for name, base in BASES.items() for path in fields(base)]


@pytest.mark.parametrize(("base", "path"), CASES)
def test_no_field_goes_unnoticed(base: dict[str, Any], path: str) -> None:
    family, last = SUPPORTED[base["model_type"]], path.split(".")[-1]
    config = changed(path, flipped(value_at(base, path)), base)
    tied_above = base in (ERNIE, ARIA, INTERNVL) and path == "text_config.tie_word_embeddings"
    if last in HARMLESS - (VIDEO if base is ERNIE else set()) or tied_above:
        assert spec_of(config) == spec_of(base)
        return
    try:
        different = spec_of(config) != spec_of(base) or family.vision_shapes(config) != family.vision_shapes(base)
        different |= repr(family.build_vision(config)) != repr(family.build_vision(base))
    except UserError as error:
        assert last in str(error) or "transformers" in str(error) or last == "model_type"
        return
    assert different, f"{path} was read and changed nothing"


WHERE = [(base, where) for base in BASES.values() for where in ("", "text_config.", "vision_config.", "text_config.rope_parameters.")]


@pytest.mark.parametrize(("base", "where"), WHERE, ids=[f"{base['model_type']}: {where}" for base, where in WHERE])
def test_unknown_fields_are_refused(base: dict[str, Any], where: str) -> None:
    path = f"thinker_config.{where}" if base is OMNI and where else where
    with pytest.raises(UserError, match="expert_score_power"):
        spec_of(changed(path + "expert_score_power", 2, base))


CLASSES = {"glm4v_moe": Glm4vMoeConfig, "ernie4_5_vl_moe": Ernie4_5_VLMoeConfig, "aria": AriaConfig, "internvl": InternVLConfig}
ABSENT = [(BASES[name], path) for name in CLASSES for path in fields(BASES[name]) if path != "model_type"]


@pytest.mark.parametrize(("base", "path"), ABSENT, ids=[f"{base['model_type']}: {path}" for base, path in ABSENT])
def test_absent_fields_take_transformers_defaults(base: dict[str, Any], path: str) -> None:
    config = changed(path, ..., base)
    try:
        spec = spec_of(config)
    except UserError:
        return
    given = {key: value for key, value in copy.deepcopy(config).items() if key != "model_type"}
    assert spec == spec_of(saved(CLASSES[base["model_type"]](**given), base["architectures"][0]))


REFUSED = [
    (OMNI, "architectures", ["Qwen3OmniMoeTalkerForConditionalGeneration"], "architectures"),
    (OMNI, "thinker_config.text_config.shared_expert_intermediate_size", 64, "no shared expert"),
    (OMNI, "thinker_config.text_config.use_qk_norm", False, "always norms"),
    (OMNI, "thinker_config.vision_config.apply_vit_abs_pos_embed", False, "position table"),
    (OMNI, "thinker_config.vision_config.in_chans", 1, "in_chans"),
    (OMNI, "thinker_config.vision_config.spatial_patch_size", 8, "spatial_patch_size"),
    (OMNI, "thinker_config.text_config.rope_parameters.interleaved", False, "always interleaves"),
    (OMNI, "thinker_config.text_config.rope_parameters.mrope_section", [4, 6, 6], "mrope_section"),
    (OMNI, "thinker_config.audio_token_id", 300, "audio_token_id = 300 is outside"),
    (OMNI, "thinker_config", [], "thinker_config"),
    (GLM, "text_config.use_qk_norm", True, "neither queries nor keys"),
    (GLM, "text_config.rope_parameters.mrope_section", [8, 12, 12], "16 rotated channels"),
    (GLM, "text_config.rope_parameters.mrope_section", [4, 4], "16 rotated channels"),
    (GLM, "text_config.partial_rotary_factor", 0.25, "keep one"),
    (GLM, "text_config.rope_parameters.rope_type", "yarn", "rope"),
    (GLM, "text_config.n_group", 3, "n_group = 3"),
    (GLM, "text_config.num_experts_per_tok", 5, "num_experts_per_tok = 5"),
    (GLM, "text_config.num_local_experts", 9, "num_local_experts"),
    (GLM, "text_config.hidden_act", "gelu", "SiLU"),
    (GLM, "vision_config.hidden_act", "gelu", "no such tower"),
    (GLM, "vision_config.out_hidden_size", 96, "out_hidden_size 96"),
    (GLM, "vision_config.num_heads", 5, "5 heads"),
    (GLM, "image_token_id", 288, "outside vocab_size"),
    (ERNIE, "text_config.use_bias", True, "no place in the kernels"),
    (ERNIE, "text_config.moe_intermediate_size", [96], "expected two widths"),
    (ERNIE, "text_config.moe_intermediate_size", [96, 0], "expected two widths"),
    (ERNIE, "text_config.moe_k", 7, "moe_k = 7 of moe_num_experts = 6"),
    (ERNIE, "text_config.mlp_layer_types", ["dense", "linear"], "expected dense or sparse"),
    (ERNIE, "text_config.rope_parameters.mrope_section", [8, 4, 4], "as many for rows"),
    (ERNIE, "text_config.rope_parameters.mrope_section", [8, 8], "as many for rows"),
    (ERNIE, "text_config.num_experts", 7, "num_experts = 7"),
    (ERNIE, "vision_config.temporal_merge_size", 3, "resampler"),
    (ERNIE, "vision_config.hidden_act", "gelu", "no such tower"),
    (ERNIE, "image_token_id", 288, "outside vocab_size"),
    (ARIA, "text_config.mlp_bias", True, "no place in the kernels"),
    (ARIA, "text_config.hidden_act", "gelu", "SiLU"),
    (ARIA, "text_config.moe_topk", 9, "moe_topk = 9 of moe_num_experts = 8"),
    (ARIA, "text_config.rope_parameters.rope_type", "yarn", "rope"),
    (ARIA, "text_config.head_dim", 31, "head_dim"),
    (ARIA, "vision_feature_layer", -2, "the projector reads the last layer"),
    (ARIA, "vision_config.model_type", "siglip_vision_model", "supported: 'idefics3_vision'"),
    (ARIA, "vision_config.hidden_act", "gelu", "no such tower"),
    (ARIA, "vision_config.num_attention_heads", 5, "5 heads"),
    (ARIA, "projector_patch_to_query_dict", {"48": 8}, "numbers of patches in a square"),
    (ARIA, "projector_patch_to_query_dict", {"49": 0}, "numbers of patches in a square"),
    (ARIA, "projector_patch_to_query_dict", {"49": 7}, "it is the largest"),
    (ARIA, "image_token_id", 3, "image_token_index = 263 but image_token_id = 3"),
    (ARIA, "image_token_index", 288, "outside vocab_size"),
    (INTERNVL, "text_config.model_type", "qwen3", "supported: 'qwen3_moe'"),
    (INTERNVL, "vision_config.model_type", "siglip_vision_model", "supported: 'internvl_vision'"),
    (INTERNVL, "text_config.sliding_window", 128, "whole context"),
    (INTERNVL, "text_config.rope_parameters.rope_type", "yarn", "rope"),
    (INTERNVL, "text_config.num_experts_per_tok", 9, "num_experts_per_tok = 9"),
    (INTERNVL, "vision_feature_layer", -2, "the projector reads the last layer"),
    (INTERNVL, "vision_feature_select_strategy", "full", "patches alone"),
    (INTERNVL, "projector_hidden_act", "relu", "no such projector"),
    (INTERNVL, "downsample_ratio", 0.25, "no other pixel shuffle"),
    (INTERNVL, "image_seq_length", 256, "a tile makes 4 tokens"),
    (INTERNVL, "vision_config.image_size", [16, 24], "expected a square"),
    (INTERNVL, "vision_config.image_size", 20, "whole merged patches"),
    (INTERNVL, "vision_config.num_attention_heads", 5, "5 heads"),
    (INTERNVL, "vision_config.norm_type", "batch_norm", "knows no other"),
    (INTERNVL, "vision_config.use_mask_token", True, "masks are for training"),
    (INTERNVL, "image_token_id", 288, "outside vocab_size"),
]


@pytest.mark.parametrize(("base", "path", "value", "message"), REFUSED,
                         ids=[f"{base['model_type']}: {path}={value}" for base, path, value, _ in REFUSED])
def test_values(base: dict[str, Any], path: str, value: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        spec_of(changed(path, value, base))
    assert re.search(message, f"{error.value.what}: {error.value.fix}")
