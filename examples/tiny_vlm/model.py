"""The example model's configuration, and faster forms of three of its parts for training on a CPU."""

from __future__ import annotations

import torch
from tokenizer import MERGE_SIZE, PATCH_SIZE, TEMPORAL_PATCH_SIZE
from torch import nn
from torch.nn import functional as F
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.qwen3_vl_moe import modeling_qwen3_vl_moe as family


def build_config(tokenizer) -> Qwen3VLMoeConfig:
    """The configuration, with the token ids of `tokenizer`.

    Expert layouts stay unambiguous by shape: 2·I = 192 and I = 96 both differ from hidden_size = 128.
    """
    ids = tokenizer.convert_tokens_to_ids
    return Qwen3VLMoeConfig(
        architectures=["Qwen3VLMoeForConditionalGeneration"],
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=False,
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 384,
            "moe_intermediate_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "num_experts": 16,
            "num_experts_per_tok": 4,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "max_position_embeddings": 2048,
            "initializer_range": 0.06,
            "router_aux_loss_coef": 0.001,
            "bos_token_id": ids("<|endoftext|>"),
            "eos_token_id": ids("<|im_end|>"),
            "pad_token_id": ids("<|endoftext|>"),
            "tie_word_embeddings": False,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_interleaved": True,
                "mrope_section": [6, 5, 5],
            },
        },
        vision_config={
            "depth": 4,
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_heads": 3,
            "out_hidden_size": 128,
            "patch_size": PATCH_SIZE,
            "spatial_merge_size": MERGE_SIZE,
            "temporal_patch_size": TEMPORAL_PATCH_SIZE,
            "num_position_embeddings": 144,
            "deepstack_visual_indexes": [1, 2],
            "initializer_range": 0.06,
        },
    )


class _RoutedExperts(torch.autograd.Function):
    """Routed SwiGLU experts with a hand-written backward: one matrix product an expert, tokens sorted by expert."""

    @staticmethod
    def forward(ctx, x, top_k_index, top_k_weights, gate_up, down):
        top_k = top_k_index.shape[1]
        flat = top_k_index.reshape(-1)
        order = torch.argsort(flat)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.numel())
        bounds = [0, *torch.bincount(flat, minlength=gate_up.shape[0]).cumsum(0).tolist()]
        spans = list(zip(range(gate_up.shape[0]), bounds[:-1], bounds[1:], strict=True))
        source = order.div(top_k, rounding_mode="floor")
        xs = x.index_select(0, source)
        projected = xs.new_empty(xs.shape[0], gate_up.shape[1])
        for e, lo, hi in spans:
            torch.mm(xs[lo:hi], gate_up[e].t(), out=projected[lo:hi])
        gate, up = projected.chunk(2, dim=-1)
        inner = F.silu(gate) * up
        out = xs.new_empty(xs.shape)
        for e, lo, hi in spans:
            torch.mm(inner[lo:hi], down[e].t(), out=out[lo:hi])
        per_slot = out.index_select(0, inverse).view(x.shape[0], top_k, -1)
        ctx.save_for_backward(xs, projected, inner, per_slot, top_k_weights, gate_up, down, order, inverse, source)
        ctx.spans = spans
        return torch.bmm(top_k_weights.unsqueeze(1), per_slot).squeeze(1)

    @staticmethod
    def backward(ctx, grad):
        xs, projected, inner, per_slot, weights, gate_up, down, order, inverse, source = ctx.saved_tensors
        grad_weights = torch.bmm(per_slot, grad.unsqueeze(2)).squeeze(2)
        grad_out = grad.index_select(0, source) * weights.reshape(-1).index_select(0, order).unsqueeze(1)
        grad_inner = torch.empty_like(inner)
        grad_down, grad_gate_up = torch.empty_like(down), torch.empty_like(gate_up)
        for e, lo, hi in ctx.spans:
            torch.mm(grad_out[lo:hi], down[e], out=grad_inner[lo:hi])
            torch.mm(grad_out[lo:hi].t(), inner[lo:hi], out=grad_down[e])
        gate, up = projected.chunk(2, dim=-1)
        sigmoid = torch.sigmoid(gate)
        silu = gate * sigmoid
        grad_projected = torch.empty_like(projected)
        half = gate.shape[1]
        torch.mul(grad_inner, silu, out=grad_projected[:, half:])
        # d silu(g) = sigmoid(g)·(1 + g·(1 - sigmoid(g))) = sigmoid(g) + silu(g) - silu(g)·sigmoid(g)
        slope = torch.addcmul(sigmoid + silu, silu, sigmoid, value=-1)
        torch.mul(grad_inner * up, slope, out=grad_projected[:, :half])
        grad_xs = torch.empty_like(xs)
        for e, lo, hi in ctx.spans:
            torch.mm(grad_projected[lo:hi], gate_up[e], out=grad_xs[lo:hi])
            torch.mm(grad_projected[lo:hi].t(), xs[lo:hi], out=grad_gate_up[e])
        grad_x = grad_xs.index_select(0, inverse).view(*weights.shape, -1).sum(1)
        return grad_x, None, grad_weights, grad_gate_up, grad_down


def routed_experts_forward(self, hidden_states, top_k_index, top_k_weights):
    """An `experts_implementation` for transformers: same result as "eager", faster in training on a CPU."""
    return _RoutedExperts.apply(hidden_states, top_k_index, top_k_weights, self.gate_up_proj, self.down_proj)


ALL_EXPERTS_FUNCTIONS.register("tiny_vlm_training", routed_experts_forward)


class BatchedVisionAttention(family.Qwen3VLMoeVisionAttention):
    """Vision attention over images of one size in one batched call (the stock one loops over images)."""

    def forward(self, hidden_states, cu_seqlens, position_embeddings=None, **kwargs):
        images = cu_seqlens.numel() - 1
        q, k, v = self.qkv(hidden_states).view(hidden_states.shape[0], 3, self.num_heads, -1).unbind(1)
        q, k = family.apply_rotary_pos_emb_vision(q, k, *position_embeddings)
        q, k, v = (t.reshape(images, -1, self.num_heads, self.head_dim).transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, scale=self.scaling)
        return self.proj(out.transpose(1, 2).reshape(hidden_states.shape[0], -1))


class RMSNorm(family.Qwen3VLMoeTextRMSNorm):
    """The same norm through PyTorch's fused kernel."""

    def forward(self, hidden_states):
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


def build_model(config: Qwen3VLMoeConfig, seed: int, for_training: bool = True) -> Qwen3VLMoeForConditionalGeneration:
    """The model, initialized by `seed`; `for_training` puts the faster forms in (no parameter changes)."""
    torch.manual_seed(seed)
    model = Qwen3VLMoeForConditionalGeneration(config)
    # Patch embedding sees 384 inputs, the residual stream wants about unit variance at its entry.
    nn.init.normal_(model.model.language_model.embed_tokens.weight, std=0.5)
    if for_training:
        use_training_forms(model)
    return model


def use_training_forms(model: nn.Module) -> None:
    """Swap in the faster forms, in place."""
    model.set_experts_implementation("tiny_vlm_training")
    for module in model.modules():
        if type(module) is family.Qwen3VLMoeVisionAttention:
            module.__class__ = BatchedVisionAttention
        elif type(module) is family.Qwen3VLMoeTextRMSNorm:
            module.__class__ = RMSNorm
