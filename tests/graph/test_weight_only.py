"""Graphs for ONNX Runtime alone against PyTorch with the same weights dequantized."""

from __future__ import annotations

import shutil

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file

from ecmfq_export.config import ExportConfig
from ecmfq_export.errors import UnsupportedError, UserError
from ecmfq_export.graph.decoder import emit_decoder
from ecmfq_export.graph.passes.weight_only_experts import WeightOnlyExpertsPass
from ecmfq_export.graph.passes.weight_only_linears import WeightOnlyLinearsPass
from ecmfq_export.graph.pipeline import resolve_sizes
from ecmfq_export.models.moe_vlm import MoEVLM, open_model
from ecmfq_export.models.torch_decoder import run_decoder
from ecmfq_export.quant.block_layout import block_size, by_block, common_block, pack_blocks, pack_pairs
from ecmfq_export.quant.weight_only import WeightOnly
from tests.graph.checkpoints import decoder_inputs, quantized_checkpoint
from tests.graph.helpers import Decoder, session
from tests.graph.test_kimi import VARIANTS
from tests.interop.checkpoints import make
from tests.tiny_aria import make_aria
from tests.tiny_ernie import make_ernie
from tests.tiny_kimi import make_kimi_vl

SEQ = 24
F32 = ir.DataType.FLOAT


def weight_only_graph(model: MoEVLM, dtype: ir.DataType = F32) -> ir.Model:
    graph = emit_decoder(model, SEQ, dtype)
    WeightOnlyLinearsPass(model, dtype)(graph)
    WeightOnlyExpertsPass(model, dtype)(graph)
    return graph


@torch.no_grad()
def check(model: MoEVLM) -> ir.Model:
    """The graph's logits are those of the dequantized model; far from those of another."""
    graph = weight_only_graph(model)
    inputs, positions = decoder_inputs(model, 2, 2, 13)
    deepstack = [feature.numpy() for feature in inputs.deepstack]
    decoder = Decoder(session(graph, reference=False), model.spec, SEQ, 2)
    out = decoder.step(inputs.inputs_embeds.numpy(), positions, [0, 0], deepstack, types=inputs.router_types.numpy())
    expected = run_decoder(model.with_float_activations(), inputs).numpy()
    np.testing.assert_allclose(out["logits"], expected, atol=2e-5 * np.abs(expected).max())
    return graph


def test_our_checkpoint(tmp_path) -> None:
    """W8A8 attention becomes W8A16, dense layers and experts W4A16; nothing of our own operators is left."""
    _, model = quantized_checkpoint(tmp_path, dense=4, mlp_only_layers=[1], num_hidden_layers=3)
    graph = check(model)
    kinds = [(node.domain, node.op_type) for node in graph.graph]
    assert kinds.count(("com.microsoft", "QMoE")) == 2 and kinds.count(("com.microsoft", "MatMulNBits")) == 3
    assert ("ecmfq", "EcmfqMoE") not in kinds and not any(kind == "QuantizeLinear" for _, kind in kinds)
    inputs, _ = decoder_inputs(model, 2, 2, 13)
    with torch.no_grad():
        weight_only, integer = (run_decoder(m, inputs) for m in (model.with_float_activations(), model))
    assert float((weight_only - integer).abs().max()) > 0.01 * float(integer.abs().max())


def test_two_level_scales(tmp_path) -> None:
    check(quantized_checkpoint(tmp_path, attention=0, group_size=128, hidden_size=256, moe_intermediate_size=384)[1])


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_router_is_ours(tmp_path, variant: str) -> None:
    """Sigmoid scores with selection bias and scaling, groups, no renormalization, shared experts."""
    check(quantized_checkpoint(tmp_path, attention=4, make=make_kimi_vl, **VARIANTS[variant])[1])


def test_experts_that_lie_transposed(tmp_path) -> None:
    check(quantized_checkpoint(tmp_path, attention=4, make=make_aria)[1])


@pytest.mark.parametrize("widths", [[64, 32], [32, 64]])
def test_slots_that_a_token_leaves_empty(tmp_path, widths: list[int]) -> None:
    """Text and image tokens with experts of their own of different widths."""
    model = quantized_checkpoint(tmp_path, attention=4, make=make_ernie, moe_intermediate_size=widths)[1]
    graph = check(model)
    assert [node.attributes["k"].as_int() for node in graph.graph if node.op_type == "QMoE"] == [model.spec.layers[1].mlp.num_slots]


def test_float16_stays_near(tmp_path) -> None:
    model = quantized_checkpoint(tmp_path)[1]
    inputs, positions = decoder_inputs(model, 2, 1, 13)
    graph = weight_only_graph(model, ir.DataType.FLOAT16)
    deepstack = [feature.numpy() for feature in inputs.deepstack]
    decoder = Decoder(session(graph, reference=False), model.spec, SEQ, 1, np.float16)
    out = decoder.step(inputs.inputs_embeds.numpy(), positions, [0], deepstack)
    with torch.no_grad():
        expected = run_decoder(model.with_float_activations(), inputs).numpy()
    assert np.median(np.abs(out["logits"] - expected)) < 0.005 * np.abs(expected).max()


@pytest.mark.parametrize("name", ["example_gptq", "gptq_groups", "gptq_v2_zero_points", "awq_zero_points"])
def test_checkpoints_of_other_quantizers(tmp_path, name: str) -> None:
    """Groups of 32 and 128, one scale a channel, zero points. (tests/interop has PyTorch against the library itself.)"""
    check(open_model(make(name, tmp_path / "checkpoint").path))


def test_dense_activation_order_is_gathered_and_down_projections_folded(tmp_path) -> None:
    """Attention in activation order and down projections in orders of their own; gate and up in order is refused."""
    path = make("gptq_act_order", tmp_path / "checkpoint").path
    model = open_model(path)
    with pytest.raises(UnsupportedError, match="gate_up_proj' has columns in activation order") as refusal:
        weight_only_graph(model)
    assert "ecmfq-export quantize" in refusal.value.fix
    shutil.copytree(path, tmp_path / "sorted")
    tensors = load_file(path / "model.safetensors")
    for name in tensors:
        if name.endswith(("gate_proj.g_idx", "up_proj.g_idx")):
            tensors[name] = tensors[name].sort().values
    save_file(tensors, tmp_path / "sorted" / "model.safetensors")
    model = open_model(tmp_path / "sorted")
    assert model.weight_only_tensor("layers.0.mlp.experts.down_proj").group_index is not None
    graph = check(model)
    # o_proj has one group: no order.
    assert sum(node.op_type == "Gather" for node in graph.graph) == 3


def test_float_experts_are_refused(tmp_path) -> None:
    original, _ = quantized_checkpoint(tmp_path)
    with pytest.raises(UnsupportedError, match="gate_up_proj' is not int4"):
        weight_only_graph(original)


def test_sizes_without_a_target(tmp_path) -> None:
    model = quantized_checkpoint(tmp_path)[0]
    assert resolve_sizes(model, None, ExportConfig()).max_seq_len == 512
    with pytest.raises(UserError, match="the model allows 512"):
        resolve_sizes(model, None, ExportConfig(max_seq_len=513))


def test_blocks() -> None:
    assert [block_size(size, 256) for size in (256, 128, 64, 32, 48, 100)] == [128, 128, 64, 32, 16, None]
    assert common_block([128, 128], [256, 96]) == 32 and common_block([256, 96], [256, 96]) == 32
    assert common_block([24, 96], [96, 96]) is None
    weight = WeightOnly(torch.arange(10, dtype=torch.uint8).expand(3, 10), torch.rand(3, 3), None, 4)
    packed = pack_blocks(weight.qvalue, 16)
    assert packed.shape == (3, 1, 8) and packed[0, 0].tolist() == [0x10, 0x32, 0x54, 0x76, 0x98, 0x88, 0x88, 0x88]
    assert torch.equal(by_block(weight.scale, weight, 2), weight.scale[:, [0, 0, 1, 1, 2]])
    assert pack_pairs(torch.tensor([[1, 2, 3]], dtype=torch.uint8)).tolist() == [[0x21, 0x83]]
