"""Tiny random Qwen3-Omni-MoE checkpoints, made by transformers' own classes: the full model, or its thinker; see tests/tiny_models.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3OmniMoeConfig, Qwen3OmniMoeForConditionalGeneration, Qwen3OmniMoeThinkerForConditionalGeneration

from tests.tiny_models import CHAT_TEMPLATE, SPECIAL_TOKENS, fill_randomly, write_tokenizer

OMNI_TOKENS = (*SPECIAL_TOKENS, "<|audio_start|>", "<|audio_end|>", "<|audio_pad|>")
TOKENS = {name: 256 + i for i, name in enumerate(OMNI_TOKENS)}


def omni_config(*, vision: dict[str, Any] | None = None, speech: bool = False, **text: Any) -> Qwen3OmniMoeConfig:
    """The configuration of the tiny model; `text` and `vision` override single fields of the thinker's sub-configurations.

    Dimensions are those of the tiny Qwen3-VL-MoE (tests/tiny_models.py); `speech` adds a talker and a waveform decoder.
    """
    tied = bool(text.pop("tie_word_embeddings", False))
    text_config = {
        "vocab_size": 288, "hidden_size": 128, "intermediate_size": 160, "moe_intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32, "num_experts": 8, "num_experts_per_tok": 2,
        "max_position_embeddings": 512, "eos_token_id": 258, "pad_token_id": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_interleaved": True, "mrope_section": [6, 5, 5]},
    } | text  # fmt: skip
    vision_config = {
        "depth": 2, "hidden_size": 48, "intermediate_size": 80, "num_heads": 3, "out_hidden_size": text_config["hidden_size"],
        "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 36, "deepstack_visual_indexes": [0],
    } | (vision or {})  # fmt: skip
    audio_config = {
        "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "d_model": 16, "output_dim": 128,
        "downsample_hidden_size": 8, "num_mel_bins": 16, "n_window": 5, "n_window_infer": 10,
    }  # fmt: skip
    small = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 16, "vocab_size": 40,
    }  # fmt: skip
    talker = small | {
        "moe_intermediate_size": 16, "num_experts_per_tok": 2, "num_local_experts": 4, "shared_expert_intermediate_size": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
    }  # fmt: skip
    return Qwen3OmniMoeConfig(
        architectures=["Qwen3OmniMoeForConditionalGeneration"], enable_audio_output=speech,
        thinker_config={
            "text_config": text_config, "vision_config": vision_config, "audio_config": audio_config, "tie_word_embeddings": tied,
            "image_token_id": TOKENS["<|image_pad|>"], "video_token_id": TOKENS["<|video_pad|>"], "audio_token_id": TOKENS["<|audio_pad|>"],
            "vision_start_token_id": TOKENS["<|vision_start|>"], "vision_end_token_id": TOKENS["<|vision_end|>"],
            "audio_start_token_id": TOKENS["<|audio_start|>"], "audio_end_token_id": TOKENS["<|audio_end|>"],
        },
        talker_config={"text_config": talker, "code_predictor_config": small, "thinker_hidden_size": 128, "num_code_groups": 2,
                       "spatial_merge_size": 2},
        code2wav_config={
            "codebook_size": 8, "hidden_size": 16, "num_attention_heads": 1, "num_key_value_heads": 1, "intermediate_size": 16,
            "num_hidden_layers": 1, "num_quantizers": 2, "decoder_dim": 16, "upsample_rates": [2], "upsampling_ratios": [2],
        },
    )  # fmt: skip


@torch.no_grad()
def build_omni(config: Qwen3OmniMoeConfig, seed: int = 0) -> Qwen3OmniMoeForConditionalGeneration:
    """transformers' model with the random weights that `seed` gives, fp32, eager attention and experts, in eval mode.

    The thinker's weights depend on nothing else of the model.
    """
    thinker = config.thinker_config
    for part in (config, thinker, thinker.text_config, thinker.vision_config):
        part._attn_implementation = part._experts_implementation = "eager"
    model = Qwen3OmniMoeForConditionalGeneration(config).float().eval()
    named = list(model.named_parameters())
    fill_randomly(((name, p) for name, p in named if name.startswith("thinker.") and ".audio_tower." not in name), seed)
    fill_randomly(((name, p) for name, p in named if not name.startswith("thinker.") or ".audio_tower." in name), seed)
    return model


def make_qwen3_omni(
    directory: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, vision: dict[str, Any] | None = None, speech: bool = False,
    **text: Any,
) -> Path:  # fmt: skip
    """Save a random full model with tokenizer and processor files into `directory` and return it."""
    model = build_omni(omni_config(vision=vision, speech=speech, **text), seed).to(dtype)
    model.config.dtype = dtype
    model.save_pretrained(directory)
    write_processor_files(Path(directory), model.config)
    return Path(directory)


def make_qwen3_omni_thinker(directory: Path, *, seed: int = 0, vision: dict[str, Any] | None = None, **text: Any) -> Path:
    """Save the same model's thinker by itself."""
    full = build_omni(omni_config(vision=vision, **text), seed)
    thinker: Qwen3OmniMoeThinkerForConditionalGeneration = full.thinker
    thinker.config.architectures = ["Qwen3OmniMoeThinkerForConditionalGeneration"]
    thinker.save_pretrained(directory)
    write_processor_files(Path(directory), full.config)
    return Path(directory)


def write_processor_files(directory: Path, config: Qwen3OmniMoeConfig) -> None:
    """The tiny tokenizer, and the published processor's settings, an audio processor's among them."""
    write_tokenizer(directory, OMNI_TOKENS, CHAT_TEMPLATE, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    vision = config.thinker_config.vision_config
    unit = vision.patch_size * vision.spatial_merge_size
    preprocessor = {
        "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen3OmniMoeProcessor", "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3, "merge_size": vision.spatial_merge_size, "min_pixels": 4 * unit * unit, "max_pixels": 16 * unit * unit,
        "patch_size": vision.patch_size, "temporal_patch_size": vision.temporal_patch_size,
        "feature_extractor_type": "WhisperFeatureExtractor", "chunk_length": 30, "dither": 0.0, "feature_size": 128, "hop_length": 160,
        "n_fft": 400, "n_samples": 4800000, "nb_max_frames": 30000, "padding_side": "left", "padding_value": 0.0,
        "return_attention_mask": True, "sampling_rate": 16000,
    }  # fmt: skip
    (directory / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")
