"""Tiny random ERNIE-4.5-VL-MoE checkpoints, made by transformers' own classes; see tests/tiny_models.py."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Ernie4_5_VLMoeConfig, Ernie4_5_VLMoeForConditionalGeneration

from ecmfq_export.runtime.sample import ProcessedSample
from tests.tiny_models import fill_randomly, random_sample, write_tokenizer

SPECIAL_TOKENS = (
    "<unk>", "</s>", "<|begin_of_sentence|>", "<|IMAGE_START|>", "<|IMAGE_PLACEHOLDER|>", "<|IMAGE_END|>", "<|VIDEO_START|>",
    "<|VIDEO_PLACEHOLDER|>", "<|VIDEO_END|>",
)  # fmt: skip
TOKENS = {name: 256 + i for i, name in enumerate(SPECIAL_TOKENS)}

_CHAT_TEMPLATE = (
    "{{- '<|begin_of_sentence|>' }}{%- for message in messages %}{{- 'User: ' if message.role == 'user' else 'Assistant: ' }}"
    "{%- if message.content is string %}{{- message.content }}{%- else %}{%- for part in message.content %}"
    "{%- if part.type == 'image' %}{{- 'Picture:<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>' }}"
    "{%- else %}{{- part.text }}{%- endif %}{%- endfor %}{%- endif %}{{- '\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- 'Assistant: ' }}{%- endif %}"
)


def ernie_config(*, vision: dict[str, Any] | None = None, tie_word_embeddings: bool = True, **text: Any) -> Ernie4_5_VLMoeConfig:
    """The configuration of the tiny model; `text` and `vision` override single fields of the sub-configurations.

    Dimensions: hidden 128, text experts 192 and image experts 96 wide, 6 of each, top-2, 1 shared expert, dense intermediate 160, 2
    layers of which the first is dense, 6 heads of 32 over 2 key/value heads, vocabulary 288; vision hidden 48, depth 2, patch 4, merge 2.
    """
    text_config = {
        "vocab_size": 288, "hidden_size": 128, "intermediate_size": 160, "moe_intermediate_size": [192, 96], "num_hidden_layers": 2,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32, "moe_num_experts": 6, "moe_k": 2, "moe_num_shared_experts": 1,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "eos_token_id": TOKENS["</s>"], "pad_token_id": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 6, 4]},
    } | text  # fmt: skip
    vision_config = {
        "depth": 2, "hidden_size": 48, "intermediate_size": 80, "num_heads": 3, "patch_size": 4, "spatial_merge_size": 2,
    } | (vision or {})  # fmt: skip
    names = {"image_token_id": "IMAGE_PLACEHOLDER", "image_start_token_id": "IMAGE_START", "image_end_token_id": "IMAGE_END",
             "video_token_id": "VIDEO_PLACEHOLDER", "video_start_token_id": "VIDEO_START", "video_end_token_id": "VIDEO_END"}  # fmt: skip
    return Ernie4_5_VLMoeConfig(
        architectures=["Ernie4_5_VLMoeForConditionalGeneration"], text_config=text_config, vision_config=vision_config,
        tie_word_embeddings=tie_word_embeddings, **{field: TOKENS[f"<|{name}|>"] for field, name in names.items()},
    )  # fmt: skip


@torch.no_grad()
def build_ernie(config: Ernie4_5_VLMoeConfig, seed: int = 0) -> Ernie4_5_VLMoeForConditionalGeneration:
    """transformers' model with the random weights that `seed` gives, fp32, eager attention and experts, in eval mode."""
    for part in (config, config.text_config, config.vision_config):
        part._attn_implementation = part._experts_implementation = "eager"
    model = Ernie4_5_VLMoeForConditionalGeneration(config).float().eval()
    fill_randomly(model.named_parameters(), seed)
    for name, weight in model.named_parameters():
        if name.endswith("_moe.gate.weight"):
            weight.mul_(2)
    return model


def make_ernie(
    directory: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, vision: dict[str, Any] | None = None, **text: Any
) -> Path:
    """Save a random model with tokenizer and processor files into `directory` and return it."""
    model = build_ernie(ernie_config(vision=vision, **text), seed).to(dtype)
    model.config.dtype = dtype
    model.save_pretrained(directory)
    write_tokenizer(Path(directory), SPECIAL_TOKENS, _CHAT_TEMPLATE, eos_token="</s>", pad_token="<unk>")
    vision_config = model.config.vision_config
    unit = vision_config.patch_size * vision_config.spatial_merge_size
    preprocessor = {
        "image_processor_type": "Ernie4_5_VLMoeImageProcessor", "patch_size": vision_config.patch_size,
        "size": {"shortest_edge": 4 * unit * unit, "longest_edge": 16 * unit * unit},
        "merge_size": vision_config.spatial_merge_size, "temporal_patch_size": 1,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
    }  # fmt: skip
    (Path(directory) / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")
    return Path(directory)


def ernie_sample(seed: int, grids: Sequence[tuple[int, int, int]] = (), text: int = 5) -> ProcessedSample:
    """A random prompt of the tiny model, which begins with a token that stands around videos."""
    frame = TOKENS["<|IMAGE_START|>"], TOKENS["<|IMAGE_PLACEHOLDER|>"], TOKENS["<|IMAGE_END|>"]
    sample = random_sample(seed, grids, text, patch_features=48, frame=frame)
    sample.input_ids[0] = TOKENS["<|VIDEO_END|>"]
    return sample


def ernie_types(feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The two kinds of token types that transformers' model takes."""
    ids = feeds["input_ids"]
    placeholder = (ids == TOKENS["<|IMAGE_PLACEHOLDER|>"]).int()
    kinds = placeholder.clone()
    for value, kind in ((1, "IMAGE"), (2, "VIDEO")):
        for name in ("START", "END"):
            kinds[ids == TOKENS[f"<|{kind}_{name}|>"]] = value
    return {"mm_token_type_ids": placeholder, "moe_mm_token_type_ids": kinds}
