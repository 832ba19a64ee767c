"""Tiny random checkpoints of every supported family, saved by transformers itself, for tests that need a model but no knowledge.

Weights are drawn so that nothing hides a mistake: norm weights differ from one, biases from zero, router logits spread over
several units (ids are stable under 1e-5 changes), a decoder weight is never square.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

from ecmfq_export.runtime.sample import ProcessedSample

SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
IMAGE_TOKEN_ID = 256 + SPECIAL_TOKENS.index("<|image_pad|>")
VIDEO_TOKEN_ID = 256 + SPECIAL_TOKENS.index("<|video_pad|>")
VISION_START_TOKEN_ID = 256 + SPECIAL_TOKENS.index("<|vision_start|>")
VISION_END_TOKEN_ID = 256 + SPECIAL_TOKENS.index("<|vision_end|>")

_SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CHAT_TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.content is string %}{{- message.content }}{%- else %}{%- for part in message.content %}"
    "{%- if part.type == 'image' %}{{- '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{%- else %}{{- part.text }}{%- endif %}{%- endfor %}{%- endif %}{{- '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def qwen3_vl_moe_config(*, vision: dict[str, Any] | None = None, **text: Any) -> Qwen3VLMoeConfig:
    """The configuration of the tiny model; `text` and `vision` override single fields of the sub-configurations.

    ``tie_word_embeddings`` is set where transformers reads it (both levels). Dimensions: hidden 128, expert intermediate 96,
    dense intermediate 160, 8 experts top-2, 2 layers, 6 heads of 32 over 2 key/value heads, vocabulary 288 (the tokenizer
    has 263 tokens), vision hidden 48, depth 2, patch 4, merge 2, DeepStack after the first vision block.
    """
    tied = bool(text.pop("tie_word_embeddings", False))
    text_config = {
        "vocab_size": 288, "hidden_size": 128, "intermediate_size": 160, "moe_intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32,
        "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "max_position_embeddings": 512, "tie_word_embeddings": tied, "eos_token_id": 258, "pad_token_id": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_interleaved": True,
                            "mrope_section": [6, 5, 5]},
    }  # fmt: skip
    vision_config = {
        "depth": 2, "hidden_size": 48, "intermediate_size": 80, "num_heads": 3, "out_hidden_size": 128, "patch_size": 4,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 36, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    text_config.update(text)
    vision_config.update({"out_hidden_size": text_config["hidden_size"], **(vision or {})})
    return Qwen3VLMoeConfig(
        architectures=["Qwen3VLMoeForConditionalGeneration"], text_config=text_config, vision_config=vision_config,
        image_token_id=IMAGE_TOKEN_ID, video_token_id=VIDEO_TOKEN_ID, vision_start_token_id=VISION_START_TOKEN_ID,
        vision_end_token_id=VISION_END_TOKEN_ID, tie_word_embeddings=tied,
    )  # fmt: skip


@torch.no_grad()
def build_qwen3_vl_moe(config: Qwen3VLMoeConfig, seed: int = 0) -> Qwen3VLMoeForConditionalGeneration:
    """transformers' model with the random weights that `seed` gives, fp32, eager attention, in eval mode."""
    config._attn_implementation = "eager"
    with torch.device("meta"):
        model = Qwen3VLMoeForConditionalGeneration(config)
    model = model.to_empty(device="cpu").float().eval()
    model.tie_weights()
    fill_randomly(model.named_parameters(), seed)
    # Non-persistent buffers (inverse frequencies) are empty after to_empty.
    language, visual = model.model.language_model, model.model.visual
    language.rotary_emb = type(language.rotary_emb)(config.text_config)
    visual.rotary_pos_emb = type(visual.rotary_pos_emb)(config.vision_config)
    return model


@torch.no_grad()
def fill_randomly(weights: Iterable[tuple[str, torch.Tensor]], seed: int) -> None:
    """Random values that keep activations at a usual size, in the order of the names: `seed` alone decides them."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in sorted(weights, key=lambda item: item[0]):
        noise = torch.randn(weight.shape, generator=generator)
        if name.endswith("bias"):
            weight.copy_(0.1 * noise)
        elif "norm" in name:
            weight.copy_(1 + 0.2 * noise)
        elif "embed" in name and "patch_embed.proj" not in name:
            weight.copy_(0.5 * noise)
        elif name.endswith("mlp.gate.weight"):
            weight.copy_(noise * 2 / weight.shape[-1] ** 0.5)
        else:
            fan_in = weight[0].numel() if weight.ndim != 3 else weight.shape[-1]
            weight.copy_(noise / fan_in**0.5)


def make_qwen3_vl_moe(
    directory: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, max_shard_size: str = "5GB",
    vision: dict[str, Any] | None = None, **text: Any,
) -> Path:  # fmt: skip
    """Save a random Qwen3-VL-MoE checkpoint with tokenizer and processor files into `directory` and return it.

    `text` and `vision` override config fields, see :func:`qwen3_vl_moe_config`; a small `max_shard_size` (``"200KB"``) gives
    several shards with an index.
    """
    model = build_qwen3_vl_moe(qwen3_vl_moe_config(vision=vision, **text), seed).to(dtype)
    model.config.dtype = dtype
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    write_processor_files(Path(directory), model.config)
    return Path(directory)


def write_processor_files(directory: Path, config: Qwen3VLMoeConfig) -> None:
    """The tiny tokenizer and image settings."""
    write_tokenizer(directory, SPECIAL_TOKENS, CHAT_TEMPLATE, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    vision = config.vision_config
    unit = vision.patch_size * vision.spatial_merge_size
    preprocessor = {
        "image_processor_type": "Qwen2VLImageProcessorFast", "processor_class": "Qwen3VLProcessor",
        "size": {"shortest_edge": 4 * unit * unit, "longest_edge": 16 * unit * unit}, "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size, "merge_size": vision.spatial_merge_size,
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
    }  # fmt: skip
    (directory / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")


def write_tokenizer(directory: Path, special_tokens: Sequence[str], chat_template: str, *, eos_token: str, pad_token: str) -> None:
    """A byte-level tokenizer without merges: id = byte order of the alphabet, then the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special_tokens))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=eos_token, pad_token=pad_token, padding_side="left",
        clean_up_tokenization_spaces=False, chat_template=chat_template,
    ).save_pretrained(directory)  # fmt: skip


def random_sample(
    seed: int, grids: Sequence[tuple[int, int, int]] = (), text: int = 5, patch_features: int = 96, merge: int = 2,
    frame: tuple[int, int, int] = (VISION_START_TOKEN_ID, IMAGE_TOKEN_ID, VISION_END_TOKEN_ID),
) -> ProcessedSample:
    """A random prompt: text tokens before, between and after images of `grids` patches, the last half of the text an answer.

    `text` tokens stand at each of the ``len(grids) + 1`` places; `patch_features`, `merge` and `frame` (ids that open, stand in
    and close an image) are the tiny Qwen3-VL-MoE's.
    """
    rng = np.random.default_rng(seed)
    ids = list(rng.integers(0, 256, text))
    for grid in grids:
        placeholders = int(np.prod(grid)) // merge**2
        ids += [frame[0], *[frame[1]] * placeholders, frame[2]]
        ids += list(rng.integers(0, 256, text))
    patches = sum(int(np.prod(grid)) for grid in grids)
    answer = np.zeros(len(ids), bool)
    answer[len(ids) - (text + 1) // 2 :] = True
    return ProcessedSample(
        np.array(ids, np.int64),
        rng.standard_normal((patches, patch_features)).astype(np.float32) if grids else None,
        np.array(grids, np.int64) if grids else None,
        answer,
    )
