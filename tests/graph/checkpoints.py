"""Tiny quantized checkpoints, rounded to nearest, and what PyTorch computes with them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from ecmfq_export.graph.decoder import emit_decoder
from ecmfq_export.graph.passes.quantize_experts import QuantizeExpertsPass
from ecmfq_export.graph.passes.quantize_linears import QuantizeLinearsPass
from ecmfq_export.models.inputs import DecoderInputs
from ecmfq_export.models.moe_vlm import MoEVLM, layer_shapes, open_model
from ecmfq_export.models.quantized_format import QuantizedWriter
from ecmfq_export.quant.rtn import quantize_rtn
from ecmfq_export.runtime import host_inputs as host
from tests.tiny_models import make_qwen3_vl_moe


def quantized_checkpoint(
    root: Path, *, attention: int = 8, dense: int = 8, lm_head: int = 0, group_size: int = -1, make=make_qwen3_vl_moe, **overrides
) -> tuple[MoEVLM, MoEVLM]:
    """The floating-point model that `make` writes and its quantized version; numbers are bits, 0 keeps floating point."""
    original = open_model(make(root / "float", **overrides))
    work = root / "quantized"
    work.mkdir()
    writer = QuantizedWriter(work, original)
    for layer in original.spec.layers:
        tensors = {}
        for suffix in layer_shapes(original.spec, layer):
            bits = attention if suffix.startswith("self_attn") and "proj.weight" in suffix else 0
            bits = dense if suffix.startswith("mlp.") and "proj.weight" in suffix else bits
            experts = suffix.startswith("mlp.experts")
            if experts or bits:
                weight = original.tensor(f"layers.{layer.index}.{suffix}")
                tensors[suffix] = quantize_rtn(weight, 4 if experts else bits, group_size if experts else -1)
        writer.write_layer(layer.index, tensors)
    rest = {"lm_head.weight": quantize_rtn(original.tensor("lm_head.weight"), lm_head)} if lm_head else {}
    return original, writer.finish(rest)


def fresh(path: Path) -> Path:
    """`path`, empty."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def decoder_inputs(model: MoEVLM, seed: int, batch: int, seq: int) -> tuple[DecoderInputs, np.ndarray]:
    """Random embeddings and DeepStack features on two thirds text, one third image; and the positions [3, batch, seq]."""
    rng = np.random.default_rng(seed)
    spec = model.spec
    positions = np.sort(rng.integers(0, seq + 3, (3, batch, seq)), -1)
    cos, sin = host.rope_tables(spec.rope, positions)
    types = (rng.random((batch, seq)) < 0.3).astype(np.int64)
    embeds = rng.normal(size=(batch, seq, spec.hidden_size)).astype(np.float32)
    deepstack = [(rng.normal(size=embeds.shape) * types[..., None]).astype(np.float32) for _ in range(spec.num_deepstack)]
    mask = host.attention_mask(np.zeros(batch, np.int64), seq, seq)
    inputs = DecoderInputs(
        torch.from_numpy(embeds), torch.from_numpy(np.concatenate([cos, cos], -1)),
        torch.from_numpy(np.concatenate([sin, sin], -1)), torch.from_numpy(mask), [torch.from_numpy(d) for d in deepstack],
        torch.from_numpy(types), torch.full((batch,), seq), torch.zeros(batch, dtype=torch.int64), torch.from_numpy(types),
    )  # fmt: skip
    return inputs, positions


def quantized_graph(model: MoEVLM, dtype=ir.DataType.FLOAT, group_size: int = -1, max_seq: int = 40) -> ir.Model:
    """The decoder of a quantized checkpoint with both quantizing passes behind it."""
    graph = emit_decoder(model, max_seq, dtype)
    QuantizeLinearsPass(model, dtype)(graph)
    QuantizeExpertsPass(model, group_size)(graph)
    return graph
