"""The quantized decoder graph: its form, and its numbers against the PyTorch reference."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from ecmfq_export.errors import UnsupportedError
from ecmfq_export.graph.decoder import add_taps, emit_decoder
from ecmfq_export.graph.passes.decompose_attention import DecomposeAttentionPass
from ecmfq_export.graph.passes.quantize_experts import QuantizeExpertsPass
from ecmfq_export.models.moe_vlm import MoEVLM
from ecmfq_export.models.torch_decoder import load_layer, run_decoder
from ecmfq_export.quant.rtn import quantize_rtn
from tests.graph.checkpoints import decoder_inputs, quantized_checkpoint, quantized_graph
from tests.graph.helpers import Decoder, HfSource, session
from tests.tiny_models import build_qwen3_vl_moe, qwen3_vl_moe_config

SEQ = 40
MIXED = {"num_hidden_layers": 3, "mlp_only_layers": [1], "moe_intermediate_size": 96}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[MoEVLM, MoEVLM]:
    """W8A8 attention, W4A8 dense MLP, W8A8 lm_head, W4A8 experts: every recipe at once."""
    return quantized_checkpoint(tmp_path_factory.mktemp("mixed"), dense=4, lm_head=8, **MIXED)


@pytest.fixture(scope="module")
def tapped(models):
    graph = quantized_graph(models[1])
    add_taps(graph)
    return session(graph)


def onnx_outputs(runner, model: MoEVLM, seed: int, batch: int, seq: int, dtype=np.float32, max_seq: int = SEQ):
    inputs, positions = decoder_inputs(model, seed, batch, seq)
    decoder = Decoder(runner, model.spec, max_seq, batch, dtype)
    deepstack = [d.numpy() for d in inputs.deepstack]
    return inputs, decoder.step(inputs.inputs_embeds.numpy(), positions, [0] * batch, deepstack)


def test_each_layer_in_lockstep_equals_pytorch(models, tapped):
    """Every layer from the graph's own input to it, so that differences cannot pile up.

    Both sides quantize activations that may differ in the last float32 bit (sums in another order), so an integer may be one
    step off where a value lies on a rounding boundary: at 1e-7 relative, about one activation in 10 ** 4. One step moves the
    outputs of one token by a few thousandths of their size. Hence: nearly every token equal to float32 rounding, and
    the others within a hundredth.
    """
    model = models[1]
    inputs, out = onnx_outputs(tapped, model, 0, 2, SEQ)
    hidden = inputs.inputs_embeds
    for index in range(model.spec.num_layers):
        expected = load_layer(model, index).forward(hidden, inputs.cos, inputs.sin, inputs.mask)
        if index < model.spec.num_deepstack:
            expected = expected + inputs.deepstack[index]
        got = torch.from_numpy(out[f"hidden_{index}"])
        change = (got - expected).abs().amax(-1) / expected.abs().amax(-1)
        assert float((change < 1e-5).float().mean()) > 0.9, f"layer {index}"
        assert float(change.max()) < 0.01, f"layer {index}"
        hidden = got


@pytest.mark.parametrize(("batch", "seq"), [(1, 1), (1, 7), (2, SEQ)])
def test_final_logits_within_the_flip_tolerance(models, tapped, batch, seq):
    """Flipped steps are a small part of all rounding steps, so the difference is a small part of the quantization error."""
    original, model = models
    inputs, out = onnx_outputs(tapped, model, seq, batch, seq)
    quantized, exact = run_decoder(model, inputs), run_decoder(original, inputs)
    difference = torch.from_numpy(out["logits"]) - quantized
    error = (quantized - exact).pow(2).mean().sqrt()
    assert float(difference.pow(2).mean().sqrt()) < 0.15 * float(error)
    same = torch.from_numpy(out["logits"]).argmax(-1) == quantized.argmax(-1)
    assert float(same.float().mean()) >= 0.95


def test_decode_steps_equal_prefill(models, tapped):
    """The quantized graph, token by token, gives what it gives for the whole prompt (activations are quantized per token)."""
    model = models[1]
    inputs, positions = decoder_inputs(model, 9, 1, 8)
    decoder = Decoder(tapped, model.spec, SEQ, 1)
    embeds, deepstack = inputs.inputs_embeds.numpy(), [d.numpy() for d in inputs.deepstack]
    whole = decoder.step(embeds, positions, [0], deepstack)["logits"]
    decoder = Decoder(tapped, model.spec, SEQ, 1)
    steps = [
        decoder.step(embeds[:, i : i + 1], positions[..., i : i + 1], [i], [d[:, i : i + 1] for d in deepstack])["logits"] for i in range(8)
    ]
    change = np.abs(np.concatenate(steps, 1) - whole).max(-1) / np.abs(whole).max()
    assert np.median(change) < 1e-5 and change.max() < 0.05


def test_form(models):
    graph = quantized_graph(models[1])
    kinds = [n.op_type for n in graph.graph]
    assert kinds.count("EcmfqRoutedMoE") == 2 and "EcmfqMoE" not in kinds and not graph.functions
    # q, k and v share one quantization; o has its own; gate and up share one; down and lm_head have theirs.
    assert kinds.count("QuantizeLinear") == 3 * 2 + 2 + 1
    weights = graph.graph.initializers
    assert weights["layers.0.self_attn.q_proj.weight.qvalue"].dtype == ir.DataType.INT8
    assert weights["layers.1.mlp.up_proj.weight.qvalue"].dtype == ir.DataType.INT4
    assert list(weights["layers.0.mlp.experts.gate_up_proj.qweight"].shape) == [8, 192, 64]
    assert "layers.0.self_attn.q_proj.weight" not in weights and "layers.0.mlp.experts.down_proj" not in weights
    node = next(n for n in graph.graph if n.op_type == "EcmfqRoutedMoE")
    assert {k: a.value for k, a in node.attributes.items()} == {
        "num_experts": 8, "top_k": 2, "hidden_size": 128, "intermediate_size": 96, "activation": "silu_glu", "group_size": -1,
        "weight_layout": "row_major", "abi_version": 1, "plugin_version": "1", "plugin_namespace": "",
    }  # fmt: skip
    names = [n.name for n in graph.graph]
    assert len(names) == len(set(names))


def test_group_multipliers(tmp_path: Path):
    _, model = quantized_checkpoint(tmp_path, group_size=128, moe_intermediate_size=256, attention=0)
    runner = session(quantized_graph(model, group_size=128))
    inputs, out = onnx_outputs(runner, model, 1, 1, 6)
    expected = run_decoder(model, inputs).numpy()
    change = np.abs(out["logits"] - expected).max(-1) / np.abs(expected).max()
    assert np.median(change) < 1e-3 and change.max() < 0.05


def test_float16_graph_stays_near(models):
    model = models[1]
    runner = session(quantized_graph(model, ir.DataType.FLOAT16))
    inputs, out = onnx_outputs(runner, model, 4, 1, 9, np.float16)
    expected = run_decoder(model, inputs).numpy()
    # float16 activations move many integers by a step: the difference is of the quantization error's size, not larger.
    assert np.sqrt(np.mean((out["logits"] - expected) ** 2)) < 0.1 * np.sqrt(np.mean(expected**2))


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT, ir.DataType.FLOAT16])
def test_decomposed_form_equals_the_new_operators(models, tapped, dtype):
    model = models[1]
    graph = quantized_graph(model, dtype)
    DecomposeAttentionPass()(graph)
    assert not {n.op_type for n in graph.graph} & {"Attention", "TensorScatter", "RotaryEmbedding", "RMSNormalization"}
    assert graph.opset_imports[""] == 21
    numpy_dtype = dtype.numpy()
    new = session(quantized_graph(model, dtype)) if dtype != ir.DataType.FLOAT else tapped
    _, old_form = onnx_outputs(session(graph), model, 5, 2, 11, numpy_dtype)
    _, new_form = onnx_outputs(new, model, 5, 2, 11, numpy_dtype)
    change = np.abs(old_form["logits"] - new_form["logits"]).max(-1) / np.abs(new_form["logits"]).max()
    assert np.median(change) < (1e-4 if dtype == ir.DataType.FLOAT else 0.05) and change.max() < 0.1
    np.testing.assert_allclose(old_form["present_value_0"].astype(np.float32), new_form["present_value_0"].astype(np.float32), atol=0.05)


def test_half_quantized_experts_are_refused():
    model = build_qwen3_vl_moe(qwen3_vl_moe_config())
    name = "layers.0.mlp.experts.down_proj"
    source = HfSource(model, {name: quantize_rtn(HfSource(model).tensor(name), 4)})
    with pytest.raises(UnsupportedError, match="is float"):
        QuantizeExpertsPass(source)(emit_decoder(source, 8, ir.DataType.FLOAT))


def test_each_weight_is_read_once_for_all_its_parts(models):
    model = models[1]
    reads = []
    source = type("Counting", (), {
        "recipe": staticmethod(model.recipe), "has": staticmethod(model.has), "spec": model.spec,
        "tensor": staticmethod(model.tensor), "qtensor": lambda self, name: reads.append(name) or model.qtensor(name),
    })()  # fmt: skip
    graph = quantized_graph(source)
    assert reads == []
    for value in graph.graph.initializers.values():
        if value.name.startswith("layers.0."):
            value.const_value.numpy()
    assert len(reads) == len(set(reads)) == 6
