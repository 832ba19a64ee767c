"""Quantized arithmetic of the PyTorch reference, against integers computed one pair at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ecmfq_export.models import torch_math
from ecmfq_export.models.inputs import prepare_inputs
from ecmfq_export.models.moe_vlm import MoEVLM, open_model
from ecmfq_export.models.torch_decoder import DecoderLayer, Routing, load_layer, quantized_linear, run_decoder
from ecmfq_export.quant.qtensor import QTensor
from ecmfq_export.quant.rtn import quantize_rtn
from tests.models.test_quantized_format import write
from tests.tiny_models import make_qwen3_vl_moe, random_sample


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[MoEVLM, MoEVLM]:
    root = tmp_path_factory.mktemp("torch_quantized")
    source = open_model(make_qwen3_vl_moe(root / "float", seed=3))
    return source, write(source, root / "quantized")


def quantize(x: np.ndarray) -> tuple[np.ndarray, np.float32]:
    scale = np.maximum(np.abs(x).max(), np.float32(1e-30)) / np.float32(127)
    return np.clip(np.rint(x / scale), -127, 127).astype(np.int64), np.float32(scale)


def linear(qx: np.ndarray, act_scale: np.float32, weight: QTensor) -> np.ndarray:
    acc = weight.integer().numpy().astype(np.int64) @ qx
    return acc.astype(np.float32) * act_scale * weight.scale.numpy()


def random_weight(shape: tuple[int, ...], bits: int, seed: int, group_size: int = -1) -> QTensor:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return quantize_rtn(weight * torch.rand(shape[-1:], generator=torch.Generator().manual_seed(seed + 1)), bits, group_size)


@pytest.mark.parametrize(("bits", "columns", "group_size"), [(4, 100, -1), (8, 1024, -1), (8, 3000, -1), (4, 512, 128), (8, 384, 128)])
def test_linear_is_integer_exact(bits: int, columns: int, group_size: int) -> None:
    weight = random_weight((24, columns), bits, columns, group_size)
    # One row drives every product to its largest, so that sums far above 2^24 occur at 8 bits.
    weight.qvalue[0] = 127 if bits == 8 else 7
    x = torch.randn(2, 3, columns, generator=torch.Generator().manual_seed(1)) * 10
    x[0, 0] = 1.0
    x[1, 2] = 0.0
    bias = torch.randn(24)
    out = quantized_linear(x, weight, bias)
    for row in np.ndindex(2, 3):
        expected = linear(*quantize(x[row].numpy()), weight) + bias.numpy()
        assert np.array_equal(out[row].numpy(), expected)
    assert quantized_linear(x[:0], weight).shape == (0, 3, 24)


def test_experts_are_the_operator(models: tuple[MoEVLM, MoEVLM]) -> None:
    """Stage by stage as docs/graph.md gives EcmfqRoutedMoE; the one floating-point step that may differ by rounding, SiLU, is shared."""
    layer = load_layer(models[1], 1)
    gate_up, down = layer.quantized["mlp.experts.gate_up_proj"], layer.quantized["mlp.experts.down_proj"]
    x = torch.randn(13, 128, generator=torch.Generator().manual_seed(5))
    routing = layer.route(x)
    out = layer.experts(x, routing)
    for token in range(len(x)):
        qx, scale = quantize(x[token].numpy())
        total = np.float32(0)
        for slot, expert in enumerate(routing.topk_ids[token].tolist()):
            weight = QTensor(gate_up.qvalue[expert], gate_up.scale[expert], 4)
            gate, up = np.split(linear(qx, scale, weight), 2)
            inner = torch.nn.functional.silu(torch.from_numpy(gate)).numpy() * up
            row = linear(*quantize(inner), QTensor(down.qvalue[expert], down.scale[expert], 4))
            term = row * routing.topk_weights[token, slot].numpy()
            total = term if slot == 0 else total + term
        assert np.array_equal(out[token].numpy(), total)


def test_experts_with_groups_no_tokens_and_unused_experts() -> None:
    from ecmfq_export.models.spec import DecoderLayerSpec, GqaSpec, MoESpec, RouterSpec

    spec = MoESpec(128, 128, 4, 2, RouterSpec("softmax", True))
    layer = DecoderLayer(DecoderLayerSpec(0, GqaSpec(2, 1, 8, False), spec), 1e-6)
    layer.quantized["mlp.experts.gate_up_proj"] = random_weight((4, 256, 128), 4, 1, 128)
    layer.quantized["mlp.experts.down_proj"] = random_weight((4, 128, 128), 4, 2, 128)
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(3))
    ids = torch.tensor([[3, 0]] * 5)
    routing = Routing(torch.zeros(5, 4), torch.zeros(5, 4), ids, torch.full((5, 2), 0.5))
    first = layer.experts(x, routing)
    flipped = layer.experts(x.flip(0), routing).flip(0)
    assert torch.equal(first, flipped)
    empty = Routing(torch.zeros(0, 4), torch.zeros(0, 4), ids[:0], routing.topk_weights[:0])
    assert layer.experts(x[:0], empty).shape == (0, 128)
    # Another weight in its place takes effect although the widened form of the first was kept.
    layer.quantized["mlp.experts.down_proj"] = random_weight((4, 128, 128), 4, 9, 128)
    assert not torch.equal(layer.experts(x, routing), first)


def test_close_to_the_floating_point_model(models: tuple[MoEVLM, MoEVLM]) -> None:
    """Nothing is swapped or mis-scaled: on a random model the quantized logits stay near the originals, W8A8 ones nearer."""
    source, quantized = models
    samples = [random_sample(1, [(1, 4, 6)]), random_sample(2)]
    inputs = prepare_inputs(source, samples)
    same = prepare_inputs(quantized, samples)
    assert torch.equal(inputs.inputs_embeds, same.inputs_embeds) and torch.equal(inputs.deepstack[0], same.deepstack[0])
    logits, approximate = run_decoder(source, inputs), run_decoder(quantized, inputs)
    real = torch.arange(logits.shape[1]) < inputs.lengths[:, None]
    error = float((approximate - logits)[real].norm() / logits[real].norm())
    assert 1e-3 < error < 0.25
    attention_only = [load_layer(quantized, i) for i in range(2)]
    for index, layer in enumerate(attention_only):
        for name in ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"):
            del layer.quantized[name]
            layer.tensors[name] = source.tensor(f"layers.{index}.{name}")
    nearer = run_decoder(source, inputs, layers=attention_only)
    assert float((nearer - logits)[real].norm() / logits[real].norm()) < error / 2


def test_grouped_linear_forms_agree() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(9, 16, generator=generator), torch.randn(4, 8, 16, generator=generator)
    offsets = torch.tensor([0, 2, 2, 9, 9])
    narrow, wide = torch_math.grouped_linear(x, weight, offsets), torch_math.grouped_linear(x.double(), weight.double(), offsets)
    torch.testing.assert_close(narrow.double(), wide, atol=1e-5, rtol=1e-5)
    x.requires_grad_()
    torch_math.grouped_linear(x, weight, offsets).square().sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
