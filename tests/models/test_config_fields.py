"""Every field of a Qwen3-VL-MoE config.json changes what is read, is refused by name, or is known not to matter."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from ecmfq_export.errors import CheckpointError, UnsupportedError, UserError
from ecmfq_export.models.registry import SUPPORTED, family_of, read_config
from ecmfq_export.models.spec import DenseMlpSpec, ModelSpec, MoESpec, RopeSpec
from tests.tiny_models import qwen3_vl_moe_config

HARMLESS = {
    "architectures", "dtype", "transformers_version", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range",
    "use_cache", "attention_dropout", "output_router_logits", "router_aux_loss_coef", "text_config.tie_word_embeddings",
}  # fmt: skip
"""Fields whose value may change without changing inference, decided here independently of the code."""

TINY = json.loads(qwen3_vl_moe_config(mlp_only_layers=[0], num_hidden_layers=3).to_json_string()) | {
    "architectures": ["Qwen3VLMoeForConditionalGeneration"]
}

# config.json of Qwen/Qwen3-VL-30B-A3B-Instruct.
PUBLISHED = {
    "architectures": ["Qwen3VLMoeForConditionalGeneration"],
    "image_token_id": 151655,
    "model_type": "qwen3_vl_moe",
    "text_config": {
        "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643, "decoder_sparse_step": 1,
        "dtype": "bfloat16", "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
        "initializer_range": 0.02, "intermediate_size": 6144, "max_position_embeddings": 262144, "mlp_only_layers": [],
        "model_type": "qwen3_vl_moe_text", "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32,
        "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06, "rope_theta": 5000000, "use_cache": True, "vocab_size": 151936,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
    },
    "tie_word_embeddings": False,
    "transformers_version": "4.57.0.dev0",
    "video_token_id": 151656,
    "vision_config": {
        "deepstack_visual_indexes": [8, 16, 24], "depth": 27, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 1152,
        "in_channels": 3, "initializer_range": 0.02, "intermediate_size": 4304, "model_type": "qwen3_vl_moe",
        "num_heads": 16, "num_position_embeddings": 2304, "out_hidden_size": 2048, "patch_size": 16,
        "spatial_merge_size": 2, "temporal_patch_size": 2,
    },
    "vision_end_token_id": 151653,
    "vision_start_token_id": 151652,
}  # fmt: skip


def spec_of(config: dict[str, Any]) -> ModelSpec:
    return family_of(config).read_spec(config)


def changed(path: str, value: Any, base: dict[str, Any] = TINY) -> dict[str, Any]:
    """A copy of `base` with the dotted `path` set, or deleted where `value` is ``...``."""
    config = copy.deepcopy(base)
    *parents, last = path.split(".")
    node = config
    for parent in parents:
        node = node[parent]
    if value is ...:
        del node[last]
    else:
        node[last] = value
    return config


def fields(config: dict[str, Any], prefix: str = "") -> list[str]:
    names = []
    for name, value in config.items():
        if isinstance(value, dict) and name in ("thinker_config", "text_config", "vision_config", "rope_parameters"):
            names += fields(value, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names


def flipped(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value * 2 + 0.125
    if isinstance(value, str):
        return value + "_other"
    if isinstance(value, list):
        return [*value, 1]
    return 7


def value_at(config: dict[str, Any], path: str) -> Any:
    for part in path.split("."):
        config = config[part]
    return config


def test_published_config() -> None:
    spec = spec_of(PUBLISHED)
    assert (spec.num_layers, spec.hidden_size, spec.vocab_size, spec.tie_word_embeddings) == (48, 2048, 151936, False)
    assert spec.rope == RopeSpec("mrope_interleaved", 5e6, (24, 20, 20), 128)
    assert spec.moe_layers == tuple(range(48)) and spec.num_deepstack == 3 and spec.vision.patch_features == 1536
    layer = spec.layers[47]
    assert isinstance(layer.mlp, MoESpec)
    assert (layer.mlp.num_experts, layer.mlp.top_k, layer.mlp.intermediate_size) == (128, 8, 768)
    assert layer.mlp.router.renormalize and layer.mlp.router.scoring == "softmax"
    assert (layer.attention.num_heads, layer.attention.num_kv_heads, layer.attention.head_dim) == (32, 4, 128)
    assert layer.attention.qk_norm and not layer.attention.bias


@pytest.mark.parametrize("path", fields(TINY))
def test_no_field_goes_unnoticed(path: str) -> None:
    family = SUPPORTED["qwen3_vl_moe"]
    config = changed(path, flipped(value_at(TINY, path)))
    if path.split(".")[-1] in HARMLESS - {"architectures"} or path in HARMLESS - {"architectures"}:
        assert spec_of(config) == spec_of(TINY)
        return
    try:
        different = spec_of(config) != spec_of(TINY) or family.vision_shapes(config) != family.vision_shapes(TINY)
    except UserError as error:
        assert path.split(".")[-1] in str(error) or "transformers" in str(error)
        return
    assert different, f"{path} was read and changed nothing"


@pytest.mark.parametrize("where", ["", "text_config.", "vision_config.", "text_config.rope_parameters."])
def test_unknown_fields_are_refused(where: str) -> None:
    with pytest.raises(UserError, match="expert_score_power"):
        spec_of(changed(where + "expert_score_power", 2))


@pytest.mark.parametrize("path", fields(TINY))
def test_absent_fields_take_transformers_defaults(path: str) -> None:
    """Whatever remains readable without the field equals what transformers' own config class fills in."""
    if path == "model_type":
        return
    config = changed(path, ...)
    try:
        spec = spec_of(config)
    except UserError:
        return
    from transformers import Qwen3VLMoeConfig

    filled = json.loads(Qwen3VLMoeConfig(**copy.deepcopy(config)).to_json_string())
    assert spec == spec_of(filled)


REFUSED = [
    ("text_config.norm_topk_prob", False, "always renormalizes"),
    ("text_config.hidden_act", "gelu", "SiLU"),
    ("text_config.sliding_window", 128, "sliding_window = 128"),
    ("text_config.use_sliding_window", True, "use_sliding_window"),
    ("text_config.layer_types", ["full_attention", "sliding_attention"], "layer_types"),
    ("text_config.num_experts", 9, "num_experts = 9 but num_local_experts = 8"),
    ("text_config.num_experts_per_tok", 9, "num_experts_per_tok = 9 of num_experts = 8"),
    ("text_config.num_experts_per_tok", 0, "integer from 1"),
    ("text_config.num_key_value_heads", 4, "num_attention_heads = 6"),
    ("text_config.head_dim", 31, "head_dim"),
    ("text_config.rms_norm_eps", 0.0, "positive number"),
    ("text_config.attention_bias", "yes", "attention_bias"),
    ("text_config.mlp_only_layers", [-1], "list of integers"),
    ("text_config.rope_parameters.rope_type", "yarn", "rope"),
    ("text_config.rope_parameters.rope_type", "linear", "rope"),
    ("text_config.rope_parameters.mrope_interleaved", False, "always interleaves"),
    ("text_config.rope_parameters.mrope_section", [8, 4, 4], None),
    ("text_config.rope_parameters.mrope_section", [4, 6, 6], "does not interleave"),
    ("text_config.rope_parameters.mrope_section", [6, 5], "does not interleave"),
    ("text_config.rope_parameters.mrope_section", [24, 20, 20], "does not interleave"),
    ("text_config.rope_parameters.partial_rotary_factor", 0.5, "partial_rotary_factor"),
    ("text_config.rope_theta", 5e6, "contradict"),
    ("text_config.rope_theta", [1], "contradict"),
    ("text_config.rope_parameters.rope_theta", [], "rope_theta"),
    ("text_config.num_hidden_layers", 10**30, "num_hidden_layers"),
    ("text_config.head_dim", 10**30, "head_dim"),
    ("text_config.num_hidden_layers", 2**31 - 1, "num_hidden_layers"),
    ("vision_config.depth", 2**31 - 1, "vision_config.depth"),
    ("text_config.rms_norm_eps", float("nan"), "rms_norm_eps"),
    ("text_config.rope_scaling", {"rope_type": "default", "mrope_section": [8, 4, 4]}, "contradict"),
    ("text_config", [], "text_config"),
    ("vision_config.model_type", "siglip", "siglip"),
    ("vision_config.hidden_act", "relu", "relu"),
    ("vision_config.patch_size", [4, 4], "patch_size"),
    ("vision_config.deepstack_visual_indexes", [1, 0], "ascending"),
    ("vision_config.deepstack_visual_indexes", [2], "of 2 vision layers"),
    ("vision_config.num_position_embeddings", 35, "no square"),
    ("vision_config.out_hidden_size", 96, "out_hidden_size 96"),
    ("vision_config.num_heads", 5, "5 heads"),
    ("image_token_id", 288, "outside vocab_size"),
    ("architectures", ["Qwen3VLMoeModel"], "architectures"),
    ("auto_map", {"AutoModel": "modeling.Model"}, "auto_map"),
    ("tie_word_embeddings", None, "tie_word_embeddings"),
]


@pytest.mark.parametrize(("path", "value", "message"), REFUSED, ids=[f"{path}={value}" for path, value, _ in REFUSED])
def test_values(path: str, value: Any, message: str | None) -> None:
    if message is None:
        assert spec_of(changed(path, value)) != spec_of(TINY)
        return
    with pytest.raises((CheckpointError, UnsupportedError), match=message):
        spec_of(changed(path, value))


def test_more_deepstack_features_than_layers() -> None:
    config = changed("text_config.num_hidden_layers", 1)
    config["vision_config"]["deepstack_visual_indexes"] = [0, 1]
    with pytest.raises(UnsupportedError, match="2 DeepStack features for 1 decoder layers"):
        spec_of(config)


def test_dense_layers() -> None:
    config = changed("text_config.num_hidden_layers", 6)
    config["text_config"] |= {"decoder_sparse_step": 2, "mlp_only_layers": [3]}
    spec = spec_of(config)
    assert spec.moe_layers == (1, 5) and spec.layers[3].mlp == DenseMlpSpec(128, 160)


def test_both_spellings_of_rope_and_experts() -> None:
    old = changed("text_config.rope_parameters", ...)
    old["text_config"] |= {"rope_scaling": {"mrope_section": [6, 5, 5], "mrope_interleaved": True}, "rope_theta": 10000.0}
    old["text_config"]["num_experts"] = old["text_config"].pop("num_local_experts")
    assert spec_of(old) == spec_of(TINY)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "has no config.json"),
        ("{", "cannot be read"),
        ("[]", "holds a list"),
        ("[" * 100000, "cannot be read"),
        ('{"a": NaN}', "NaN is no JSON number"),
    ],
)
def test_unreadable_config(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_config(tmp_path)


@pytest.mark.parametrize("model_type", ["llava", None, 3, ["qwen3_vl_moe"]])
def test_unsupported_family(model_type: Any) -> None:
    with pytest.raises(UnsupportedError, match="supported: .*qwen3_vl_moe"):
        family_of({"model_type": model_type})
