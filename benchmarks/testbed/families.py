"""The four models' configurations, and their faster forms for training on a CPU.

The experts' hand-written backward, the batched vision attention and the fused norm come from the example
(examples/tiny_vlm/model.py); Kimi's vision attention is added here.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Kimi_K25Config, Kimi_K25ForConditionalGeneration, Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek
from transformers.models.kimi_k25 import modeling_kimi_k25 as kimi
from vocabulary import MAX_TOKENS, MERGE_SIZE, PATCH_SIZE, TEMPORAL_PATCH_SIZE

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples" / "tiny_vlm"))
from model import routed_experts_forward
from model import use_training_forms as use_qwen_training_forms

SEEDS = {"qwen_a": 0, "qwen_b": 1, "kimi_a": 2, "kimi_b": 3}
"""The models and their seeds (of initialization and of the order of the data)."""

# 2·I and I always differ from the hidden size, so that no layout of the experts is ambiguous by shape.
_TEXT = {
    "qwen_a": {
        "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
        "num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 80,
    },
    "qwen_b": {
        "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 24,
        "num_experts": 24, "num_experts_per_tok": 3, "moe_intermediate_size": 56,
    },
    "kimi_a": {
        "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 16,
        "num_experts_per_tok": 4, "moe_intermediate_size": 80, "intermediate_size": 320, "kv_lora_rank": 64,
        "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32,
    },
    "kimi_b": {
        "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 6, "n_routed_experts": 24,
        "num_experts_per_tok": 3, "moe_intermediate_size": 56, "intermediate_size": 288, "kv_lora_rank": 48,
        "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 24,
    },
}  # fmt: skip


def family_of(name: str) -> str:
    """ "qwen" or "kimi" of a model's name."""
    return name.split("_")[0]


def build_config(name: str, tokenizer) -> Qwen3VLMoeConfig | Kimi_K25Config:
    """The configuration of a model, with the token ids of `tokenizer`."""
    ids = tokenizer.convert_tokens_to_ids
    shared = {
        "vocab_size": len(tokenizer), "norm_topk_prob": True, "max_position_embeddings": MAX_TOKENS, "initializer_range": 0.06,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": False, **_TEXT[name],
    }  # fmt: skip
    if family_of(name) == "qwen":
        head = shared["head_dim"] // 2
        third = head // 3
        return Qwen3VLMoeConfig(
            architectures=["Qwen3VLMoeForConditionalGeneration"],
            image_token_id=ids("<|image_pad|>"),
            video_token_id=ids("<|video_pad|>"),
            vision_start_token_id=ids("<|vision_start|>"),
            vision_end_token_id=ids("<|vision_end|>"),
            tie_word_embeddings=False,
            text_config={
                **shared,
                "intermediate_size": 320,
                "decoder_sparse_step": 1,
                "mlp_only_layers": [],
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "mrope_interleaved": True,
                    "mrope_section": [head - 2 * third, third, third],
                },
            },
            vision_config={
                "depth": 2,
                "hidden_size": 64,
                "intermediate_size": 160,
                "num_heads": 2,
                "out_hidden_size": 128,
                "patch_size": PATCH_SIZE,
                "spatial_merge_size": MERGE_SIZE,
                "temporal_patch_size": TEMPORAL_PATCH_SIZE,
                "num_position_embeddings": 36,
                "deepstack_visual_indexes": [0],
                "initializer_range": 0.06,
            },
        )
    return Kimi_K25Config(
        architectures=["Kimi_K25ForConditionalGeneration"],
        image_token_id=ids("<|media_pad|>"),
        video_token_id=ids("[EOS]"),  # there is no video; the id must be one that no prompt holds
        vision_start_token_id=ids("<|media_start|>"),
        vision_end_token_id=ids("<|media_end|>"),
        tie_word_embeddings=False,
        projection_hidden_size=64,
        text_config={
            "model_type": "deepseek_v3",
            **shared,
            "q_lora_rank": None,
            "n_shared_experts": 2,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 2.446,
            "num_nextn_predict_layers": 0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        vision_config={
            "num_hidden_layers": 2,
            "hidden_size": 64,
            "intermediate_size": 160,
            "num_attention_heads": 2,
            "patch_size": PATCH_SIZE,
            "pos_emb_height": 6,
            "pos_emb_width": 6,
            "merge_kernel_size": [MERGE_SIZE, MERGE_SIZE],
            "initializer_range": 0.06,
        },
    )


class _InBfloat16:
    """The experts' parameters in bfloat16; autograd brings the gradients back."""

    def __init__(self, experts: nn.Module):
        self.gate_up_proj, self.down_proj = experts.gate_up_proj.bfloat16(), experts.down_proj.bfloat16()


def _experts_forward(self, hidden_states, top_k_index, top_k_weights):
    """The example's routed experts, all operands in one type under autocast too (a custom function is not cast by it)."""
    if not torch.is_autocast_enabled("cpu"):
        return routed_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    return routed_experts_forward(_InBfloat16(self), hidden_states.bfloat16(), top_k_index, top_k_weights.bfloat16())


ALL_EXPERTS_FUNCTIONS.register("testbed_training", _experts_forward)


class KimiBatchedVisionAttention(kimi.Kimi_K25VisionAttention):
    """Vision attention over images of one size in one batched call (the stock one loops over images)."""

    def forward(self, hidden_states, cu_seqlens, position_embeddings=None, max_seqlen=None, **kwargs):
        images = cu_seqlens.numel() - 1
        q, k, v = (f(hidden_states).view(-1, self.num_heads, self.head_dim) for f in (self.q_proj, self.k_proj, self.v_proj))
        q, k = kimi.apply_rotary_pos_emb_vision(q, k, *position_embeddings)
        q, k, v = (t.reshape(images, -1, self.num_heads, self.head_dim).transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, scale=self.scaling)
        return self.proj(out.transpose(1, 2).reshape(hidden_states.shape[0], -1))


class KimiRMSNorm(deepseek.DeepseekV3RMSNorm):
    """The same norm through PyTorch's fused kernel."""

    def forward(self, hidden_states):
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


def build_model(name: str, config, seed: int, for_training: bool = True) -> nn.Module:
    """The model, initialized by `seed`; `for_training` puts the faster forms in (no parameter changes)."""
    torch.manual_seed(seed)
    kind = Qwen3VLMoeForConditionalGeneration if family_of(name) == "qwen" else Kimi_K25ForConditionalGeneration
    model = kind(config)
    # The residual stream wants about unit variance at its entry.
    nn.init.normal_(model.model.language_model.embed_tokens.weight, std=0.5)
    plant_vision_channels(model)
    if for_training:
        use_training_forms(model)
    return model


VISION_CHANNELS = 6


@torch.no_grad()
def plant_vision_channels(model: nn.Module) -> None:
    """Begin with a few channels in which image tokens are large and text tokens small, as large VLMs come to have them.

    Sets the bias of the last projection of the vision tower's output and scales the text embeddings down in VISION_CHANNELS
    channels; training is free to change both.
    """
    inner = model.model
    out = inner.visual.merger.linear_fc2 if hasattr(inner, "visual") else inner.mm_projector.out_proj
    channels = torch.randperm(out.bias.shape[0])[:VISION_CHANNELS]
    size = 3.0 + 3.0 * torch.rand(VISION_CHANNELS)
    out.bias[channels] = torch.where(torch.rand(VISION_CHANNELS) < 0.5, -size, size)
    inner.language_model.embed_tokens.weight[:, channels] *= 0.1


def use_training_forms(model: nn.Module) -> None:
    """Swap in the faster forms, in place."""
    use_qwen_training_forms(model)
    model.set_experts_implementation("testbed_training")
    for module in model.modules():
        if type(module) is kimi.Kimi_K25VisionAttention:
            module.__class__ = KimiBatchedVisionAttention
        elif type(module) is deepseek.DeepseekV3RMSNorm:
            module.__class__ = KimiRMSNorm


def routers(model: nn.Module) -> list[nn.Module]:
    """The MoE layers' routers, in layer order."""
    return [layer.mlp.gate for layer in model.model.language_model.layers if hasattr(layer.mlp, "gate")]
