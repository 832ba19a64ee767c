"""Kimi-VL's graphs: the decoder with latent attention and shared experts, and the MoonViT tower, against PyTorch."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch

from ecmfq_export.graph.decoder import add_taps, emit_decoder
from ecmfq_export.graph.passes.decompose_attention import DecomposeAttentionPass
from ecmfq_export.graph.vision import trace_vision
from ecmfq_export.models.moe_vlm import MoEVLM, open_model
from ecmfq_export.models.torch_decoder import load_layer, run_decoder
from ecmfq_export.runtime import host_inputs as host
from tests.graph.checkpoints import decoder_inputs, quantized_checkpoint, quantized_graph
from tests.graph.helpers import Decoder, session
from tests.tiny_kimi import make_kimi_k25, make_kimi_vl

SEQ = 40
F32 = ir.DataType.FLOAT
VARIANTS = {
    "plain": {},
    "query latent, halves": {"q_lora_rank": 40, "rope_interleave": False},
    "one group": {"n_group": 1, "topk_group": 1, "n_routed_experts": 6, "num_experts_per_tok": 3, "norm_topk_prob": False},
    "two of four groups, one shared": {"n_group": 4, "topk_group": 2, "n_routed_experts": 12, "num_experts_per_tok": 5,
                                       "n_shared_experts": 1},
    "tied, values wider than keys": {"tie_word_embeddings": True, "v_head_dim": 40},
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[MoEVLM, MoEVLM]:
    """W8A8 attention, W4A8 dense MLP, W8A8 lm_head, W4A8 experts."""
    return quantized_checkpoint(tmp_path_factory.mktemp("kimi"), dense=4, lm_head=8, make=make_kimi_vl)


@pytest.fixture(scope="module")
def tapped(models):
    graph = quantized_graph(models[1])
    add_taps(graph)
    return session(graph)


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("form", ["opset 24", "decomposed"])
def test_floating_point_decoder_equals_pytorch(tmp_path, variant: str, form: str) -> None:
    model = open_model(make_kimi_k25(tmp_path, seed=6, **VARIANTS[variant]))
    graph = emit_decoder(model, SEQ, F32)
    if form == "decomposed":
        DecomposeAttentionPass()(graph)
        assert not {n.op_type for n in graph.graph} & {"Attention", "TensorScatter", "RotaryEmbedding", "RMSNormalization"}
    inputs, positions = decoder_inputs(model, 2, 2, 11)
    runner = session(graph)
    out = Decoder(runner, model.spec, SEQ, 2).step(inputs.inputs_embeds.numpy(), positions, [0, 0])
    expected = run_decoder(model, inputs).numpy()
    np.testing.assert_allclose(out["logits"], expected, atol=1e-5 * np.abs(expected).max())
    assert out["present_key_0"].shape[-1] == out["present_value_0"].shape[-1] == max(24, VARIANTS[variant].get("v_head_dim", 16))


@torch.no_grad()
def test_ragged_batch_with_decode_steps(models) -> None:
    """Two right-padded prompts, then steps through the cache, each row at its own place, equal the whole sequences at once."""
    model, lengths, steps = models[0], np.array([5, 9]), 4
    inputs, positions = decoder_inputs(model, 3, 2, 9 + steps)
    positions = np.broadcast_to(np.arange(9 + steps), (3, 2, 9 + steps))
    cos, sin = host.rope_tables(model.spec.rope, positions)
    whole = run_decoder(model, type(inputs)(
        inputs.inputs_embeds, torch.from_numpy(np.concatenate([cos, cos], -1)), torch.from_numpy(np.concatenate([sin, sin], -1)),
        inputs.mask, [], inputs.token_types, inputs.lengths, inputs.deltas)).numpy()
    embeds = inputs.inputs_embeds.numpy()
    ours = Decoder(session(emit_decoder(model, SEQ, F32)), model.spec, SEQ, 2)
    prompt = embeds[:, :9].copy()
    prompt[0, 5:] = 3.0
    logits = ours.step(prompt, positions[..., :9], [0, 0])["logits"]
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(logits[row, :length], whole[row, :length], atol=2e-5)
    for step in range(steps):
        cached = lengths + step
        new = np.stack([embeds[row, [at]] for row, at in enumerate(cached)])
        logits = ours.step(new, np.broadcast_to(cached[None, :, None], (3, 2, 1)), cached)["logits"]
        for row, at in enumerate(cached):
            np.testing.assert_allclose(logits[row, 0], whole[row, at], atol=2e-5)


@torch.no_grad()
def test_each_quantized_layer_equals_pytorch(models, tapped) -> None:
    """Layer by layer from the graph's own input to it, with the tolerance that tests/graph/test_quantized.py argues."""
    model = models[1]
    inputs, positions = decoder_inputs(model, 0, 2, SEQ)
    out = Decoder(tapped, model.spec, SEQ, 2).step(inputs.inputs_embeds.numpy(), positions, [0, 0])
    hidden = inputs.inputs_embeds
    for index in range(model.spec.num_layers):
        expected = load_layer(model, index).forward(hidden, inputs.cos, inputs.sin, inputs.mask)
        got = torch.from_numpy(out[f"hidden_{index}"])
        change = (got - expected).abs().amax(-1) / expected.abs().amax(-1)
        assert float((change < 1e-5).float().mean()) > 0.85, f"layer {index}"
        assert float(change.max()) < 0.02, f"layer {index}"
        hidden = got
    error = (run_decoder(model, inputs) - run_decoder(models[0], inputs)).pow(2).mean().sqrt()
    difference = torch.from_numpy(out["logits"]) - run_decoder(model, inputs)
    assert float(difference.pow(2).mean().sqrt()) < 0.15 * float(error)


def test_form(models) -> None:
    graph = quantized_graph(models[1])
    kinds = [n.op_type for n in graph.graph]
    assert kinds.count("EcmfqRoutedMoE") == 2 and not graph.functions
    # q and kv_a share one quantization, kv_b and o have theirs; the dense layer's gate and up share one, down and lm_head have theirs.
    assert kinds.count("QuantizeLinear") == 3 * 3 + 2 + 1
    weights = graph.graph.initializers
    assert list(weights["layers.1.mlp.experts.gate_up_proj.qweight"].shape) == [10, 192, 64]
    node = next(n for n in graph.graph if n.op_type == "EcmfqRoutedMoE")
    assert (node.attributes["num_experts"].value, node.attributes["top_k"].value) == (10, 4)
    names = [n.name for n in graph.graph]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("quantized", [False, True])
def test_float16_graph_stays_near(models, quantized: bool) -> None:
    model = models[quantized]
    graph = quantized_graph(model, ir.DataType.FLOAT16) if quantized else emit_decoder(model, SEQ, ir.DataType.FLOAT16)
    inputs, positions = decoder_inputs(model, 4, 1, SEQ)
    out = Decoder(session(graph), model.spec, SEQ, 1, np.float16).step(inputs.inputs_embeds.numpy(), positions, [0])
    expected = run_decoder(model, inputs).numpy()
    change = np.sqrt(np.mean((out["logits"] - expected) ** 2, -1)) / np.sqrt(np.mean(expected**2))
    # A rounding can move a token of a random model to another group of experts: few tokens may be far off, none of the others.
    assert np.median(change) < (0.08 if quantized else 0.005) and np.mean(change > 0.15) < 0.15


@pytest.fixture(scope="module")
def vision(models):
    return session(trace_vision(models[0].vision_module(), models[0].spec.vision, F32), reference=False)


@torch.no_grad()
@pytest.mark.parametrize("grids", [[[1, 2, 2]], [[1, 6, 6]], [[1, 4, 6], [1, 8, 2], [1, 4, 4], [1, 2, 2]]])
def test_vision_graph_equals_transformers(models, vision, grids) -> None:
    spec, grid = models[0].spec.vision, np.array(grids)
    patches = torch.randn(int(grid.prod(1).sum()), spec.patch_features, generator=torch.Generator().manual_seed(0))
    expected = models[0].vision_module()(patches, torch.from_numpy(grid)).pooler_output
    feeds = {"patches": host.merge_block_order(patches.numpy(), grid, spec), **host.vision_inputs(grid, spec)}
    (got,) = vision.run(None, feeds)
    np.testing.assert_allclose(got, expected.numpy(), atol=1e-5)


def test_images_do_not_see_each_other(models, vision) -> None:
    spec, grid = models[0].spec.vision, np.array([[1, 4, 4], [1, 2, 6]])
    patches = np.random.default_rng(0).normal(size=(28, spec.patch_features)).astype(np.float32)
    changed = patches.copy()
    changed[16:] = 50.0
    first, second = (vision.run(None, {"patches": p, **host.vision_inputs(grid, spec)})[0] for p in (patches, changed))
    np.testing.assert_array_equal(first[:4], second[:4])
    assert np.abs(first[4:] - second[4:]).max() > 0.1
