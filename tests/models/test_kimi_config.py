"""Every field of a Kimi config.json, published or of transformers' classes, changes what is read, is refused, or does not matter."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from ecmfq_export.errors import UserError
from ecmfq_export.models.registry import SUPPORTED
from tests.models.test_config_fields import changed, fields, flipped, spec_of, value_at
from tests.tiny_kimi import kimi_config, published_config

HARMLESS = {
    "dtype", "torch_dtype", "transformers_version", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "use_cache",
    "attention_dropout", "output_router_logits", "aux_loss_alpha", "seq_aux", "ep_size", "pretraining_tp", "num_nextn_predict_layers",
    "ignore_index", "auto_map", "pos_emb_time",
}  # fmt: skip
"""Fields whose value may change without changing inference, decided here independently of the code."""

K25 = json.loads(kimi_config(q_lora_rank=40).to_json_string()) | {"architectures": ["Kimi_K25ForConditionalGeneration"]}
PUBLISHED = published_config(kimi_config())
CASES = [pytest.param(base, path, id=f"{base['model_type']}: {path}") for base in (K25, PUBLISHED) for path in fields(base)]


@pytest.mark.parametrize(("base", "path"), CASES)
def test_no_field_goes_unnoticed(base: dict[str, Any], path: str) -> None:
    family = SUPPORTED[base["model_type"]]
    config, last = changed(path, flipped(value_at(base, path)), base), path.split(".")[-1]
    if last in HARMLESS or (base is K25 and path == "text_config.tie_word_embeddings"):
        assert spec_of(config) == spec_of(base)
        return
    try:
        different = spec_of(config) != spec_of(base) or family.vision_shapes(config) != family.vision_shapes(base)
    except UserError as error:
        assert last in str(error) or "transformers" in str(error) or last == "model_type"
        return
    assert different, f"{path} was read and changed nothing"


@pytest.mark.parametrize("base", [K25, PUBLISHED], ids=["kimi_k25", "kimi_vl"])
@pytest.mark.parametrize("where", ["", "text_config.", "vision_config."])
def test_unknown_fields_are_refused(base: dict[str, Any], where: str) -> None:
    with pytest.raises(UserError, match="expert_score_power"):
        spec_of(changed(where + "expert_score_power", 2, base))


@pytest.mark.parametrize("path", [path for path in fields(K25) if path != "model_type"])
def test_absent_fields_take_transformers_defaults(path: str) -> None:
    config = changed(path, ..., K25)
    try:
        spec = spec_of(config)
    except UserError:
        return
    from transformers import Kimi_K25Config

    given = {key: value for key, value in copy.deepcopy(config).items() if key != "model_type"}
    assert spec == spec_of(json.loads(Kimi_K25Config(**given).to_json_string()) | {"architectures": config.get("architectures")})


def test_sections_that_transformers_4_filled_with_its_defaults() -> None:
    config = copy.deepcopy(PUBLISHED)
    for section in ("text_config", "vision_config"):
        config[section] |= {
            "temperature": 1.0, "top_k": 50, "top_p": 1.0, "is_decoder": False, "pruned_heads": {}, "torchscript": False, "prefix": None,
            "chunk_size_feed_forward": 0, "tie_encoder_decoder": False, "_attn_implementation_autoset": True,
        }  # fmt: skip
    assert spec_of(config) == spec_of(PUBLISHED)


REFUSED = [
    ("text_config.scoring_func", "softmax", "scores with a sigmoid"),
    ("text_config.topk_method", "greedy", "selection bias"),
    ("text_config.moe_layer_freq", 2, "moe_layer_freq"),
    ("text_config.rope_scaling", {"type": "yarn", "factor": 4.0}, "rope"),
    ("text_config.attention_bias", True, "attention_bias"),
    ("text_config.num_key_value_heads", 2, "num_key_value_heads"),
    ("text_config.n_group", 3, "n_group = 3"),
    ("text_config.topk_group", 3, "topk_group = 3"),
    ("text_config.num_experts_per_tok", 5, "num_experts_per_tok = 5"),
    ("text_config.n_group", 8, "topk_group = 1"),
    ("text_config.qk_rope_head_dim", 7, "even"),
    ("text_config.tie_word_embeddings", True, "tie_word_embeddings"),
    ("text_config.pruned_heads", {"0": [1]}, "pruned_heads"),
    ("text_config.routed_scaling_factor", 0.0, "positive"),
    ("vision_config.merge_kernel_size", [2, 1], "square kernel"),
    ("vision_config.init_pos_emb_width", 7, "square table"),
    ("vision_config.num_attention_heads", 5, "5 heads"),
    ("vision_config.model_type", "siglip", "siglip"),
    ("media_placeholder_token_id", 288, "outside vocab_size"),
    ("vocab_size", 300, "text_config says otherwise"),
    ("architectures", ["KimiVLModel"], "architectures"),
]


@pytest.mark.parametrize(("path", "value", "message"), REFUSED, ids=[f"{path}={value}" for path, value, _ in REFUSED])
def test_values(path: str, value: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        spec_of(changed(path, value, PUBLISHED))


def test_one_expert_a_group_is_refused() -> None:
    config = changed("text_config.n_group", 8, PUBLISHED)
    config["text_config"]["topk_group"] = 4
    with pytest.raises(UserError, match="two experts"):
        spec_of(config)
