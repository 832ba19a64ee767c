"""Tiny random InternVL3.5 mixture-of-experts checkpoints, made by transformers' own classes; see tests/tiny_models.py."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import InternVLConfig, InternVLForConditionalGeneration

from ecmfq_export.runtime.sample import ProcessedSample
from tests.tiny_models import fill_randomly, random_sample, write_tokenizer

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>")
TOKENS = {name: 256 + i for i, name in enumerate(SPECIAL_TOKENS)}

_CHAT_TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.content is string %}{{- message.content }}{%- else %}{%- for part in message.content %}"
    "{%- if part.type == 'image' %}{{- '<IMG_CONTEXT>\\n' }}"
    "{%- else %}{{- part.text }}{%- endif %}{%- endfor %}{%- endif %}{{- '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def internvl_config(*, vision: dict[str, Any] | None = None, tie_word_embeddings: bool = False, **text: Any) -> InternVLConfig:
    """The configuration of the tiny model; `text` and `vision` override single fields of the sub-configurations.

    Dimensions: those of the tiny Qwen3-VL-MoE's decoder (tests/tiny_models.py); vision hidden 48, depth 2, patch 4, merge 2, tiles of
    4 x 4 patches.
    """
    text_config = {
        "model_type": "qwen3_moe", "vocab_size": 288, "hidden_size": 128, "intermediate_size": 160, "moe_intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32, "num_experts": 8,
        "num_experts_per_tok": 2, "norm_topk_prob": True, "max_position_embeddings": 512, "eos_token_id": TOKENS["<|im_end|>"],
        "pad_token_id": 256, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    } | text  # fmt: skip
    vision_config = {
        "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": [16, 16],
        "patch_size": [4, 4], "attention_bias": True,
    } | (vision or {})  # fmt: skip
    return InternVLConfig(
        architectures=["InternVLForConditionalGeneration"], text_config=text_config, vision_config=vision_config,
        image_token_id=TOKENS["<IMG_CONTEXT>"], image_seq_length=4, tie_word_embeddings=tie_word_embeddings,
    )  # fmt: skip


@torch.no_grad()
def build_internvl(config: InternVLConfig, seed: int = 0) -> InternVLForConditionalGeneration:
    """transformers' model with the random weights that `seed` gives, fp32, eager attention and experts, in eval mode."""
    for part in (config, config.text_config, config.vision_config):
        part._attn_implementation = part._experts_implementation = "eager"
    model = InternVLForConditionalGeneration(config).float().eval()
    fill_randomly(model.named_parameters(), seed)
    return model


def make_internvl(
    directory: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, vision: dict[str, Any] | None = None, **text: Any
) -> Path:
    """Save a random model with tokenizer and processor files into `directory` and return it."""
    model = build_internvl(internvl_config(vision=vision, **text), seed).to(dtype)
    model.config.dtype = dtype
    model.save_pretrained(directory)
    write_tokenizer(Path(directory), SPECIAL_TOKENS, _CHAT_TEMPLATE, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    preprocessor = {
        "image_processor_type": "GotOcr2ImageProcessor", "processor_class": "InternVLProcessor", "crop_to_patches": False,
        "size": {"height": 16, "width": 16}, "min_patches": 1, "max_patches": 4, "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }  # fmt: skip
    (Path(directory) / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")
    return Path(directory)


def internvl_sample(seed: int, grids: Sequence[tuple[int, int, int]] = (), text: int = 5) -> ProcessedSample:
    """A random prompt of the tiny model; an image of a grid is as many tiles of 4 x 4 patches as fit into it, one at least."""
    tiles = [(max(1, rows * columns // 16), 4, 4) for _, rows, columns in grids]
    return random_sample(seed, tiles, text, patch_features=48, frame=(TOKENS["<img>"], TOKENS["<IMG_CONTEXT>"], TOKENS["</img>"]))


def internvl_feeds(feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The images as transformers' model takes them: tiles."""
    if "pixel_values" not in feeds:
        return {}
    count = int(feeds.pop("image_grid_thw")[:, 0].sum())
    tiles = feeds.pop("pixel_values").view(count, 4, 4, 3, 4, 4).permute(0, 3, 1, 4, 2, 5)
    return {"pixel_values": tiles.reshape(count, 3, 16, 16)}
