"""Tiny random Kimi-VL checkpoints in both forms on disk, made by transformers' own Kimi-K2.5 classes; see tests/tiny_models.py."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import Kimi_K25Config, Kimi_K25ForConditionalGeneration

from ecmfq_export.runtime.sample import ProcessedSample
from tests.tiny_models import fill_randomly, random_sample, write_tokenizer

SPECIAL_TOKENS = (
    "[PAD]", "[EOS]", "<|im_end|>", "<|im_user|>", "<|im_assistant|>", "<|im_middle|>", "<|media_start|>", "<|media_content|>",
    "<|media_end|>", "<|media_pad|>",
)  # fmt: skip
MEDIA_PAD = 256 + SPECIAL_TOKENS.index("<|media_pad|>")
MEDIA_START = 256 + SPECIAL_TOKENS.index("<|media_start|>")
MEDIA_END = 256 + SPECIAL_TOKENS.index("<|media_end|>")
VIDEO = 287

_CHAT_TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_' + message.role + '|>' + message.role + '<|im_middle|>' }}"
    "{%- if message.content is string %}{{- message.content }}{%- else %}{%- for part in message.content %}"
    "{%- if part.type == 'image' %}{{- '<|media_start|>image<|media_content|><|media_pad|><|media_end|>' }}"
    "{%- else %}{{- part.text }}{%- endif %}{%- endfor %}{%- endif %}{{- '<|im_end|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_assistant|>assistant<|im_middle|>' }}{%- endif %}"
)


def kimi_config(*, vision: dict[str, Any] | None = None, tie_word_embeddings: bool = False, **text: Any) -> Kimi_K25Config:
    """The configuration of the tiny model; `text` and `vision` override single fields of the sub-configurations.

    Dimensions: hidden 128, expert intermediate 96, dense intermediate 160, 8 experts top-2 in 2 groups of which 1 is taken, 2 shared
    experts, 3 layers of which the first is dense, 4 heads of 16 + 8 query channels and 16 value channels, latent rank 64, vocabulary
    288, vision hidden 48, depth 2, patch 4, merge 2.
    """
    text_config = {
        "model_type": "deepseek_v3", "vocab_size": 288, "hidden_size": 128, "intermediate_size": 160, "moe_intermediate_size": 96,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4, "n_shared_experts": 2, "n_routed_experts": 8,
        "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "routed_scaling_factor": 2.446, "first_k_dense_replace": 1,
        "kv_lora_rank": 64, "q_lora_rank": None, "qk_rope_head_dim": 8, "v_head_dim": 16, "qk_nope_head_dim": 16,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "num_nextn_predict_layers": 0, "eos_token_id": 258, "pad_token_id": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }  # fmt: skip
    vision_config = {
        "patch_size": 4, "pos_emb_height": 6, "pos_emb_width": 6, "num_attention_heads": 3, "num_hidden_layers": 2, "hidden_size": 48,
        "intermediate_size": 80, "merge_kernel_size": [2, 2],
    }  # fmt: skip
    text_config.update(text)
    vision_config.update(vision or {})
    return Kimi_K25Config(
        architectures=["Kimi_K25ForConditionalGeneration"], text_config=text_config, vision_config=vision_config,
        projection_hidden_size=vision_config["hidden_size"], image_token_id=MEDIA_PAD, video_token_id=VIDEO,
        vision_start_token_id=MEDIA_START, vision_end_token_id=MEDIA_END, tie_word_embeddings=tie_word_embeddings,
    )  # fmt: skip


@torch.no_grad()
def build_kimi(config: Kimi_K25Config, seed: int = 0) -> Kimi_K25ForConditionalGeneration:
    """transformers' model with the random weights that `seed` gives, fp32, eager attention and experts, in eval mode."""
    config._attn_implementation = config.text_config._attn_implementation = config.vision_config._attn_implementation = "eager"
    config.text_config._experts_implementation = "eager"
    model = Kimi_K25ForConditionalGeneration(config).float().eval()
    biases = {name: b for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")}
    fill_randomly([*model.named_parameters(), *biases.items()], seed)
    return model


def make_kimi_k25(
    directory: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, vision: dict[str, Any] | None = None, **text: Any
) -> Path:
    """Save a random model as transformers keeps it, with tokenizer and processor files, into `directory` and return it."""
    model = build_kimi(kimi_config(vision=vision, **text), seed).to(dtype)
    model.config.dtype = dtype
    # Its own original form cannot be written by transformers 5.23 where queries have no latent.
    model.save_pretrained(directory, save_original_format=False)
    write_processor_files(Path(directory), model.config)
    return Path(directory)


def make_kimi_vl(
    directory: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, vision: dict[str, Any] | None = None, logit_gain: float = 1.0,
    **text: Any,
) -> Path:
    """Save the same model in the published form of Kimi-VL; `logit_gain` multiplies the output matrix."""
    model = build_kimi(kimi_config(vision=vision, **text), seed)
    with torch.no_grad():
        model.lm_head.weight *= logit_gain
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in published_tensors(model).items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(published_config(model.config), indent=2) + "\n")
    write_processor_files(directory, model.config)
    return directory


def published_config(config: Kimi_K25Config) -> dict[str, Any]:
    """config.json in the form of moonshotai/Kimi-VL-A3B-Instruct."""
    text = json.loads(config.text_config.to_json_string())
    for name in ("rope_parameters", "head_dim", "qk_head_dim", "num_nextn_predict_layers", "output_router_logits"):
        text.pop(name, None)
    if text["rope_interleave"]:
        del text["rope_interleave"]
    text |= {
        "rope_theta": config.text_config.rope_parameters["rope_theta"], "rope_scaling": None, "scoring_func": "sigmoid",
        "topk_method": "noaux_tc", "moe_layer_freq": 1, "aux_loss_alpha": 0.001, "seq_aux": True, "ep_size": 1,
        "torch_dtype": "bfloat16", "tie_word_embeddings": config.tie_word_embeddings,
    }  # fmt: skip
    vision = config.vision_config
    return {
        "architectures": ["KimiVLForConditionalGeneration"],
        "auto_map": {"AutoConfig": "configuration_kimi_vl.KimiVLConfig", "AutoModel": "modeling_kimi_vl.KimiVLForConditionalGeneration"},
        "ignore_index": -100, "media_placeholder_token_id": config.image_token_id, "model_type": "kimi_vl", "torch_dtype": "bfloat16",
        "transformers_version": "4.50.3", "tie_word_embeddings": config.tie_word_embeddings, "use_cache": True,
        "vocab_size": config.text_config.vocab_size, "text_config": text,
        "vision_config": {
            "model_type": "moonvit", "patch_size": vision.patch_size, "num_attention_heads": vision.num_attention_heads,
            "num_hidden_layers": vision.num_hidden_layers, "hidden_size": vision.hidden_size,
            "intermediate_size": vision.intermediate_size, "init_pos_emb_height": vision.pos_emb_height,
            "init_pos_emb_width": vision.pos_emb_width, "merge_kernel_size": vision.merge_kernel_size, "torch_dtype": "bfloat16",
        },
    }  # fmt: skip


def published_tensors(model: Kimi_K25ForConditionalGeneration) -> dict[str, torch.Tensor]:
    """The model's tensors under the names of published checkpoints, written here independently of the package."""
    found: dict[str, torch.Tensor] = {}
    state = model.state_dict()
    heads = model.config.vision_config.num_attention_heads
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight")
    for name, tensor in state.items():
        if name.startswith("lm_head."):
            found[f"language_model.{name}"] = tensor
        elif name.startswith("model.language_model."):
            inner = "language_model.model." + name.removeprefix("model.language_model.")
            base, kind = inner.rsplit(".", 1)
            if kind == "gate_up_proj":
                for e, matrix in enumerate(tensor):
                    found[f"{base}.{e}.gate_proj.weight"], found[f"{base}.{e}.up_proj.weight"] = matrix.chunk(2)
            elif kind == "down_proj":
                found |= {f"{base}.{e}.down_proj.weight": matrix for e, matrix in enumerate(tensor)}
            else:
                found[inner] = tensor
        elif name.startswith("model.mm_projector."):
            part = name.removeprefix("model.mm_projector.").replace("in_proj", "linear_1").replace("out_proj", "linear_2")
            found[f"multi_modal_projector.{part}"] = tensor
        elif ".attn.q_proj." in name:
            qkv = [state[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            block = name.removeprefix("model.vision_tower.layers.").split(".")[0]
            joined = torch.cat([in_pairs(qkv[0], heads), in_pairs(qkv[1], heads), qkv[2]])
            found[f"vision_tower.encoder.blocks.{block}.wqkv.{name.rsplit('.', 1)[1]}"] = joined
        elif ".attn.k_proj." not in name and ".attn.v_proj." not in name:
            part = name.removeprefix("model.")
            for old, new in ((".norm1.", ".norm0."), (".norm2.", ".norm1."), (".fc1.", ".fc0."), (".fc2.", ".fc1.")):
                if old in part:
                    part = part.replace(old, new)
                    break
            part = part.replace(".attn.proj.", ".wo.").replace("vision_tower.layers.", "vision_tower.encoder.blocks.")
            part = part.replace("vision_tower.final_layernorm", "vision_tower.encoder.final_layernorm")
            found[part.replace("pos_emb.position_embeddings", "pos_emb.weight")] = tensor
    return found


def in_pairs(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head from halves x0 x2 ... x1 x3 ... to pairs x0 x1 x2 x3 ..."""
    size = len(tensor) // heads
    order = torch.arange(size).view(2, -1).T.flatten()
    rows = (torch.arange(heads).unsqueeze(1) * size + order).flatten()
    return tensor[rows]


def write_processor_files(directory: Path, config: Kimi_K25Config) -> None:
    """The tiny tokenizer, Kimi's chat format, and the published image processor's settings."""
    write_tokenizer(directory, SPECIAL_TOKENS, _CHAT_TEMPLATE, eos_token="<|im_end|>", pad_token="[PAD]")
    preprocessor = {
        "auto_map": {"AutoImageProcessor": "image_processing_kimi_vl.KimiVLImageProcessor"}, "in_token_limit": 64, "pad_input": True,
        "patch_size": config.vision_config.patch_size, "merge_kernel_size": list(config.vision_config.merge_kernel_size),
        "num_pooled_tokens": 16, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
    }  # fmt: skip
    (directory / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")


def kimi_sample(seed: int, grids: Sequence[tuple[int, int, int]] = (), text: int = 5) -> ProcessedSample:
    """A random prompt of the tiny Kimi model; patches are in raster order."""
    return random_sample(seed, grids, text, patch_features=48, frame=(MEDIA_START, MEDIA_PAD, MEDIA_END))
