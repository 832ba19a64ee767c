"""``runtime.json``: everything that running the exported graphs needs, so that no other file of the model is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ecmfq_export.errors import CheckpointError
from ecmfq_export.graph import ops
from ecmfq_export.graph.attention import cache_head_dim
from ecmfq_export.json_file import read_json
from ecmfq_export.models.spec import ModelSpec, MoESpec

FILE = "runtime.json"
SCHEMA_VERSION = 1

PROCESSOR_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja", "chat_template.json", "preprocessor_config.json", "video_preprocessor_config.json",
    "processor_config.json", "generation_config.json",
)  # fmt: skip
"""Files of a Hugging Face directory that are copied beside the graphs, where they are there."""


def runtime_facts(
    spec: ModelSpec,
    *,
    dtype: str,
    max_seq_len: int,
    max_batch: int,
    max_image_patches: int,
    logits: str,
    weight_layout: str,
    group_size: int | None,
    eos_token_ids: list[int],
    weight_only: bool = False,
) -> dict[str, Any]:
    """The content of ``runtime.json``; docs/graph.md says what each key means.

    Args:
        weight_layout: of the plugin nodes in ``decoder/model.onnx``.
        group_size: of quantized experts; None where experts are floating point or weight-only.
        weight_only: the graphs are for ONNX Runtime alone: QMoE nodes, no reference copy.
    """
    attention = spec.layers[0].attention
    vision = spec.vision
    moe = next((layer.mlp for layer in spec.layers if isinstance(layer.mlp, MoESpec)), None)
    facts: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "family": spec.family,
        "dtype": dtype,
        "logits": logits,
        "max_seq_len": max_seq_len,
        "max_batch": max_batch,
        "max_image_patches": max_image_patches,
        "num_layers": spec.num_layers,
        "num_kv_heads": attention.num_kv_heads,
        "head_dim": cache_head_dim(attention),
        "hidden_size": spec.hidden_size,
        "vocab_size": spec.vocab_size,
        "num_deepstack": spec.num_deepstack,
        "rope": {
            "kind": spec.rope.kind, "theta": spec.rope.theta, "sections": list(spec.rope.sections),
            "head_dim": spec.rope.head_dim,
        },
        "vision": {
            "patch_features": vision.patch_features, "patch_size": vision.patch_size,
            "temporal_patch_size": vision.temporal_patch_size, "in_channels": vision.in_channels,
            "spatial_merge_size": vision.spatial_merge_size, "num_position_embeddings": vision.num_position_embeddings,
            "out_hidden_size": vision.out_hidden_size, "position_interpolation": vision.position_interpolation,
            "patch_order": vision.patch_order, "queries": [list(pair) for pair in vision.queries],
            "class_token": vision.class_token,
        },
        "image_token_id": spec.image_token_id,
        "video_token_id": spec.video_token_id,
        "vision_start_token_id": spec.vision_start_token_id,
        "vision_end_token_id": spec.vision_end_token_id,
        "image_expert_ids": list(spec.image_expert_ids),
        "eos_token_ids": eos_token_ids,
        "files": {
            "decoder": "decoder/model.onnx", "decoder_reference": "decoder/model.ref.onnx", "vision": "vision/model.onnx",
            "embeddings": "embed_tokens.safetensors",
        },
        "moe": None,
    }  # fmt: skip
    if weight_only:
        del facts["files"]["decoder_reference"]
    if moe is not None:
        quantized = ops.WEIGHT_ONLY_MOE if weight_only else ops.ROUTED_MOE
        facts["moe"] = {
            "op": ops.FLOAT_MOE if group_size is None and not weight_only else quantized, "layers": list(spec.moe_layers),
            "num_experts": moe.num_experts, "top_k": moe.top_k, "num_shared_experts": moe.num_shared_experts,
            "hidden_size": moe.hidden_size, "intermediate_size": moe.intermediate_size, "activation": moe.activation,
            "group_size": group_size, "weight_layout": None if group_size is None else weight_layout,
        }  # fmt: skip
    return facts


def eos_token_ids(model_dir: Path, config: dict[str, Any]) -> list[int]:
    """End-of-sequence ids of ``generation_config.json``, else of the config, else the tokenizer's; in their order, without repeats.

    Raises:
        CheckpointError: a file is no JSON object.
    """
    value = _json_object(model_dir / "generation_config.json").get("eos_token_id")
    for source in (config.get("text_config") or {}, config):
        value = source.get("eos_token_id") if value is None else value
    value = _tokenizer_eos(model_dir) if value is None else value
    ids = value if isinstance(value, list) else [value]
    if any(type(index) is not int for index in ids):
        raise CheckpointError(f"eos_token_id of {model_dir} is {value!r}", "expected a token id, or a list of them")
    return list(dict.fromkeys(ids))


def _tokenizer_eos(model_dir: Path) -> list[int]:
    """The id of the tokenizer's own end-of-sequence token; empty where its files name none."""
    token = _json_object(model_dir / "tokenizer_config.json").get("eos_token")
    content = token.get("content") if isinstance(token, dict) else token
    added = _json_object(model_dir / "tokenizer.json").get("added_tokens")
    entries = [entry for entry in added if isinstance(entry, dict)] if isinstance(added, list) else []
    return [entry.get("id") for entry in entries if content is not None and entry.get("content") == content]


def _json_object(path: Path) -> dict[str, Any]:
    """What `path` holds; empty where there is no such file.

    Raises:
        CheckpointError: it is no JSON object.
    """
    if not path.is_file():
        return {}
    try:
        data = read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a {type(data).__name__}, no object", "copy it from the model")
    return data
