"""Tiny random GLM-4.5V checkpoints, made by transformers' own classes; see tests/tiny_models.py."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Glm4vMoeConfig, Glm4vMoeForConditionalGeneration

from ecmfq_export.runtime.sample import ProcessedSample
from tests.tiny_models import fill_randomly, random_sample, write_tokenizer

SPECIAL_TOKENS = (
    "<|endoftext|>", "[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|begin_of_image|>", "<|image|>", "<|end_of_image|>",
    "<|begin_of_video|>", "<|video|>", "<|end_of_video|>",
)  # fmt: skip
TOKENS = {name: 256 + i for i, name in enumerate(SPECIAL_TOKENS)}

_CHAT_TEMPLATE = (
    "{{- '[gMASK]<sop>' }}{%- for message in messages %}{{- '<|' + message.role + '|>\\n' }}"
    "{%- if message.content is string %}{{- message.content }}{%- else %}{%- for part in message.content %}"
    "{%- if part.type == 'image' %}{{- '<|begin_of_image|><|image|><|end_of_image|>' }}"
    "{%- else %}{{- part.text }}{%- endif %}{%- endfor %}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)


def glm_config(*, vision: dict[str, Any] | None = None, tie_word_embeddings: bool = False, **text: Any) -> Glm4vMoeConfig:
    """The configuration of the tiny model; `text` and `vision` override single fields of the sub-configurations.

    Dimensions: hidden 128, expert intermediate 96, dense intermediate 160, 8 experts top-2 in 2 groups of which 1 is taken, 1 shared
    expert, 2 layers of which the first is dense, 6 heads of 32 over 2 key/value heads, half of a head rotated, vocabulary 288; vision
    hidden 48, depth 2, patch 4, merge 2, a position table of 6 x 6.
    """
    text_config = {
        "vocab_size": 288, "hidden_size": 128, "intermediate_size": 160, "moe_intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32, "n_routed_experts": 8, "n_shared_experts": 1,
        "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "routed_scaling_factor": 1.7, "first_k_dense_replace": 1,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "eos_token_id": TOKENS["<|user|>"], "pad_token_id": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3], "partial_rotary_factor": 0.5},
    } | text  # fmt: skip
    vision_config = {
        "depth": 2, "hidden_size": 48, "num_heads": 3, "out_hidden_size": text_config["hidden_size"], "intermediate_size": 72,
        "patch_size": 4, "image_size": 24, "spatial_merge_size": 2, "temporal_patch_size": 2,
    } | (vision or {})  # fmt: skip
    return Glm4vMoeConfig(
        architectures=["Glm4vMoeForConditionalGeneration"], text_config=text_config, vision_config=vision_config,
        image_token_id=TOKENS["<|image|>"], video_token_id=TOKENS["<|video|>"], image_start_token_id=TOKENS["<|begin_of_image|>"],
        image_end_token_id=TOKENS["<|end_of_image|>"], video_start_token_id=TOKENS["<|begin_of_video|>"],
        video_end_token_id=TOKENS["<|end_of_video|>"], tie_word_embeddings=tie_word_embeddings,
    )  # fmt: skip


@torch.no_grad()
def build_glm(config: Glm4vMoeConfig, seed: int = 0) -> Glm4vMoeForConditionalGeneration:
    """transformers' model with the random weights that `seed` gives, fp32, eager attention and experts, in eval mode."""
    for part in (config, config.text_config, config.vision_config):
        part._attn_implementation = part._experts_implementation = "eager"
    model = Glm4vMoeForConditionalGeneration(config).float().eval()
    biases = {name: b for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")}
    fill_randomly([*model.named_parameters(), *biases.items()], seed)
    return model


def make_glm(
    directory: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, vision: dict[str, Any] | None = None, **text: Any
) -> Path:
    """Save a random model with tokenizer and processor files into `directory` and return it."""
    model = build_glm(glm_config(vision=vision, **text), seed).to(dtype)
    model.config.dtype = dtype
    model.save_pretrained(directory)
    write_processor_files(Path(directory), model.config)
    return Path(directory)


def write_processor_files(directory: Path, config: Glm4vMoeConfig) -> None:
    """The tiny tokenizer, GLM's chat format, and the published image processor's settings."""
    write_tokenizer(directory, SPECIAL_TOKENS, _CHAT_TEMPLATE, eos_token="<|user|>", pad_token="<|endoftext|>")
    vision = config.vision_config
    unit = vision.patch_size * vision.spatial_merge_size
    preprocessor = {
        "size": {"shortest_edge": 8 * unit * unit, "longest_edge": 32 * unit * unit}, "do_rescale": True,
        "patch_size": vision.patch_size, "temporal_patch_size": vision.temporal_patch_size, "merge_size": vision.spatial_merge_size,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Glm4vImageProcessor", "processor_class": "Glm4vProcessor",
    }  # fmt: skip
    (directory / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")


def glm_sample(seed: int, grids: Sequence[tuple[int, int, int]] = (), text: int = 5) -> ProcessedSample:
    """A random prompt of the tiny model."""
    frame = TOKENS["<|begin_of_image|>"], TOKENS["<|image|>"], TOKENS["<|end_of_image|>"]
    return random_sample(seed, grids, text, frame=frame)
