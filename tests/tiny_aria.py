"""Tiny random Aria checkpoints, made by transformers' own classes; see tests/tiny_models.py."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AriaConfig, AriaForConditionalGeneration

from ecmfq_export.runtime.host_inputs import image_tokens
from ecmfq_export.runtime.sample import ProcessedSample
from tests.tiny_models import fill_randomly, write_tokenizer

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<fim_prefix>", "<fim_suffix>", "<|img|>")
TOKENS = {name: 256 + i for i, name in enumerate(SPECIAL_TOKENS)}
QUERIES = ((4, 2), (16, 3), (36, 6), (49, 8), (64, 5))
"""Patches of a canvas, and the queries that read it; 49 are those of a published processor's canvas of 490 pixels in patches of 70."""

_CHAT_TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.content is string %}{{- message.content }}{%- else %}{%- for part in message.content %}"
    "{%- if part.type == 'image' %}{{- '<fim_prefix><|img|><fim_suffix>' }}"
    "{%- else %}{{- part.text }}{%- endif %}{%- endfor %}{%- endif %}{{- '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def aria_config(*, vision: dict[str, Any] | None = None, tie_word_embeddings: bool = False, **text: Any) -> AriaConfig:
    """The configuration of the tiny model; `text` and `vision` override single fields of the sub-configurations.

    Dimensions: hidden 128, expert intermediate 96, 8 experts top-2, 2 shared experts, 2 layers, 4 heads of 32 over 2 key/value heads,
    vocabulary 288; vision hidden 48, depth 2, a position table of 7 x 7, patches of 70 pixels.
    """
    text_config = {
        "vocab_size": 288, "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "moe_num_experts": 8, "moe_topk": 2, "moe_num_shared_experts": 2,
        "max_position_embeddings": 512, "bos_token_id": TOKENS["<s>"], "eos_token_id": TOKENS["<|im_end|>"], "pad_token_id": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    } | text  # fmt: skip
    vision_config = {
        "model_type": "idefics3_vision", "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 3,
        "image_size": 490, "patch_size": 70,
    } | (vision or {})  # fmt: skip
    return AriaConfig(
        architectures=["AriaForConditionalGeneration"], text_config=text_config, vision_config=vision_config,
        image_token_index=TOKENS["<|img|>"], projector_patch_to_query_dict=dict(QUERIES), tie_word_embeddings=tie_word_embeddings,
    )  # fmt: skip


@torch.no_grad()
def build_aria(config: AriaConfig, seed: int = 0) -> AriaForConditionalGeneration:
    """transformers' model with the random weights that `seed` gives, fp32, eager attention and experts, in eval mode."""
    for part in (config, config.text_config, config.vision_config):
        part._attn_implementation = part._experts_implementation = "eager"
    model = AriaForConditionalGeneration(config).float().eval()
    fill_randomly(model.named_parameters(), seed)
    # Queries that differ, and attention that is not level.
    model.model.multi_modal_projector.query.mul_(4)
    return model


def make_aria(
    directory: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, vision: dict[str, Any] | None = None, **text: Any
) -> Path:
    """Save a random model with tokenizer and processor files into `directory` and return it."""
    model = build_aria(aria_config(vision=vision, **text), seed).to(dtype)
    model.config.dtype = dtype
    model.save_pretrained(directory)
    write_tokenizer(Path(directory), SPECIAL_TOKENS, _CHAT_TEMPLATE, eos_token="<|im_end|>", pad_token="<unk>")
    preprocessor = {
        "image_processor_type": "AriaImageProcessor", "processor_class": "AriaProcessor", "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
        "max_image_size": 490, "min_image_size": 140, "split_image": False,
    }  # fmt: skip
    (Path(directory) / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")
    return Path(directory)


def aria_sample(seed: int, grids: Sequence[tuple[int, int, int]] = (), text: int = 5) -> ProcessedSample:
    """A random prompt of the tiny model; the longer side of every grid becomes 7, since transformers wants one canvas in a batch."""
    rng = np.random.default_rng(seed)
    ids = list(rng.integers(0, 256, text))
    grids = [(1, 7, min(columns, 7)) if rows >= columns else (1, rows, 7) for _, rows, columns in grids]
    for grid in grids:
        ids += [TOKENS["<fim_prefix>"], *[TOKENS["<|img|>"]] * image_tokens(grid, 1, QUERIES), TOKENS["<fim_suffix>"]]
        ids += list(rng.integers(0, 256, text))
    answer = np.zeros(len(ids), bool)
    answer[len(ids) - (text + 1) // 2 :] = True
    patches = rng.standard_normal((sum(int(np.prod(grid)) for grid in grids), 3 * 70 * 70)).astype(np.float32)
    return ProcessedSample(np.array(ids, np.int64), patches if grids else None, np.array(grids, np.int64) if grids else None, answer)


def aria_feeds(feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The images as transformers' model takes them: on canvases, with a mask."""
    if "pixel_values" not in feeds:
        return {}
    grids, patches = feeds.pop("image_grid_thw").tolist(), feeds.pop("pixel_values")
    pixels, masks = torch.zeros(len(grids), 3, 490, 490), torch.zeros(len(grids), 490, 490, dtype=torch.bool)
    start = 0
    for canvas, mask, (_, rows, columns) in zip(pixels, masks, grids, strict=True):
        blocks = patches[start : start + rows * columns].view(rows, columns, 3, 70, 70)
        canvas[:, : rows * 70, : columns * 70] = blocks.permute(2, 0, 3, 1, 4).reshape(3, rows * 70, columns * 70)
        mask[: rows * 70, : columns * 70] = True
        start += rows * columns
    return {"pixel_values": pixels, "pixel_mask": masks}
