"""A transformers model as a source of canonical tensors, and ONNX Runtime sessions over graphs in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from transformers import Qwen3VLMoeForConditionalGeneration
from transformers.cache_utils import DynamicCache

from ecmfq_export.graph.attention import cache_head_dim
from ecmfq_export.graph.ops import attach_reference_functions
from ecmfq_export.models.spec import (
    DecoderLayerSpec,
    DenseMlpSpec,
    GqaSpec,
    ModelSpec,
    MoESpec,
    RopeSpec,
    RouterSpec,
    VisionSpec,
)
from ecmfq_export.quant.qtensor import QTensor
from ecmfq_export.runtime import host_inputs as host


class HfSource:
    """What the emitter and the passes need of MoEVLM, over a model in memory; `quantized` holds QTensors by name."""

    def __init__(self, model: Qwen3VLMoeForConditionalGeneration, quantized: dict[str, QTensor] | None = None) -> None:
        self.model = model
        self.spec = spec_of(model)
        self.quantized = quantized or {}
        self.reads: list[str] = []

    def tensor(self, name: str) -> torch.Tensor:
        self.reads.append(name)
        if name in self.quantized:
            return self.quantized[name].dequantize()
        return self._state()[name].detach()

    def qtensor(self, name: str) -> QTensor:
        self.reads.append(name)
        return self.quantized[name]

    def recipe(self, name: str) -> str:
        return {4: "w4a8", 8: "w8a8"}[self.quantized[name].num_bits] if name in self.quantized else "float"

    def has(self, name: str) -> bool:
        return name in self._state()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._state()[name].shape)

    def _state(self) -> dict[str, torch.Tensor]:
        out = {}
        for name, value in self.model.state_dict().items():
            name = name.removeprefix("model.").removeprefix("language_model.").replace("mlp.gate.weight", "mlp.router.weight")
            out[name] = value
        if self.spec.tie_word_embeddings:
            out.pop("lm_head.weight", None)
        return out


def spec_of(model: Qwen3VLMoeForConditionalGeneration) -> ModelSpec:
    config = model.config
    text, vision = config.text_config, config.vision_config
    attention = GqaSpec(text.num_attention_heads, text.num_key_value_heads, text.head_dim, True, text.attention_bias, text.attention_bias)
    moe = MoESpec(
        text.hidden_size,
        text.moe_intermediate_size,
        text.num_experts,
        text.num_experts_per_tok,
        RouterSpec("softmax", renormalize=True),
    )
    layers = tuple(
        DecoderLayerSpec(i, attention, DenseMlpSpec(text.hidden_size, text.intermediate_size) if i in text.mlp_only_layers else moe)
        for i in range(text.num_hidden_layers)
    )
    rope = text.rope_parameters
    return ModelSpec(
        "qwen3_vl_moe", text.hidden_size, text.vocab_size, text.rms_norm_eps, config.tie_word_embeddings,
        text.max_position_embeddings, RopeSpec("mrope_interleaved", rope["rope_theta"], tuple(rope["mrope_section"]), text.head_dim),
        layers,
        VisionSpec(vision.hidden_size, vision.depth, vision.num_heads, vision.in_channels, vision.patch_size,
                   vision.temporal_patch_size, vision.spatial_merge_size, vision.out_hidden_size,
                   vision.num_position_embeddings, tuple(vision.deepstack_visual_indexes)),
        config.image_token_id, config.vision_start_token_id, config.vision_end_token_id, config.video_token_id,
    )  # fmt: skip


def session(model: ir.Model | Path, *, reference: bool = True) -> ort.InferenceSession:
    """An ONNX Runtime session; an in-memory model gets its reference functions first."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if isinstance(model, Path):
        return ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    if reference:
        attach_reference_functions(model)
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])


class Decoder:
    """Feeds a decoder graph as a generator does: positions from the host, the caches round and round."""

    def __init__(self, runner: ort.InferenceSession, spec: ModelSpec, max_seq_len: int, batch: int, dtype=np.float32) -> None:
        self.runner, self.spec, self.max_seq_len, self.dtype = runner, spec, max_seq_len, dtype
        attention = spec.layers[0].attention
        cache = (batch, attention.num_kv_heads, max_seq_len, cache_head_dim(attention))
        # Garbage, not zeros: nothing that was never written may be read.
        self.cache = {f"past_{k}_{i}": np.full(cache, 7.0, dtype) for i in range(spec.num_layers) for k in ("key", "value")}
        self.names = [o.name for o in runner.get_outputs()]

    def step(self, embeds, positions, cached, deepstack=None, last_index=None, types=None) -> dict[str, np.ndarray]:
        """One call; `embeds` [batch, seq, hidden], `positions` [3, batch, seq], `cached` [batch]."""
        batch, seq, _ = embeds.shape
        cos, sin = host.rope_tables(self.spec.rope, positions, self.dtype)
        feeds = {
            "inputs_embeds": embeds.astype(self.dtype), "rope_cos": cos, "rope_sin": sin,
            "attention_mask": host.attention_mask(cached, seq, self.max_seq_len, self.dtype),
            "write_indices": np.asarray(cached, np.int64), **self.cache,
        }  # fmt: skip
        for i in range(self.spec.num_deepstack):
            feeds[f"deepstack_{i}"] = (np.zeros_like(embeds) if deepstack is None else deepstack[i]).astype(self.dtype)
        if self.spec.image_expert_ids:
            feeds["router_types"] = np.zeros((batch, seq), np.int64) if types is None else types
        if last_index is not None:
            feeds["last_index"] = np.asarray(last_index, np.int64)
        out = dict(zip(self.names, self.runner.run(None, feeds), strict=True))
        self.cache = {name.replace("present", "past"): v for name, v in out.items() if name.startswith("present")}
        return out


@torch.no_grad()
def hf_logits(model, embeds, positions, deepstack=None, visual=None, cache: DynamicCache | None = None) -> np.ndarray:
    """transformers' own decoder on one unpadded sequence; `visual` [1, seq] marks DeepStack positions."""
    language = model.model.language_model
    out = language(
        inputs_embeds=torch.from_numpy(np.ascontiguousarray(embeds)),
        position_ids=torch.from_numpy(np.ascontiguousarray(positions)), past_key_values=cache, use_cache=cache is not None,
        visual_pos_masks=None if visual is None else torch.from_numpy(visual),
        deepstack_visual_embeds=None if deepstack is None else [torch.from_numpy(d) for d in deepstack],
    )  # fmt: skip
    return model.lm_head(out.last_hidden_state).numpy()
