"""Folds change no bit of the floating-point model."""

import pytest
import torch

from ecmfq_export.models.moe_vlm import open_model
from ecmfq_export.models.torch_decoder import load_layer
from ecmfq_export.stages.attention_view import value_tie
from ecmfq_export.stages.fold import LayerScales, fold_layer, rotate_down
from tests.tiny_models import make_qwen3_vl_moe


@pytest.fixture(scope="module")
def layers(tmp_path_factory):
    """A routed and a dense layer."""
    model = open_model(make_qwen3_vl_moe(tmp_path_factory.mktemp("fold"), seed=5, mlp_only_layers=[1]))
    return [load_layer(model, index) for index in range(2)]


def random_scales(layer, seed: int, power_of_two: bool) -> LayerScales:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        log = 10 * torch.rand(shape, generator=g) - 5
        return torch.exp2(log.round() if power_of_two else log)

    kv = layer.spec.attention.num_kv_heads * layer.spec.attention.head_dim
    experts = getattr(layer.spec.mlp, "num_experts", 1)
    return LayerScales(draw(128), draw(kv), draw(128), draw(experts, layer.spec.mlp.intermediate_size))


def run(layer, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(2, 9, 128, generator=g)
    angle = torch.rand(2, 9, 16, generator=g) * 6
    cos, sin = (torch.cat((f(angle), f(angle)), -1) for f in (torch.cos, torch.sin))
    mask = torch.triu(torch.full((9, 9), -1e9), 1).expand(2, 1, 9, 9)
    out, _ = layer.attend(layer.attention_input(hidden), cos, sin, mask)
    middle = hidden + out
    return layer.forward(hidden, cos, sin, mask), layer.moe_input(middle).flatten(0, 1)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", [0, 1])
def test_powers_of_two_keep_every_bit(layers, kind, seed):
    layer = layers[kind]
    folded = fold_layer(layer, random_scales(layer, seed, True))
    (out, x), (folded_out, folded_x) = run(layer, seed), run(folded, seed)
    assert torch.equal(out, folded_out)
    assert not torch.equal(x, folded_x)
    if kind == 0:
        assert torch.equal(layer.route(x).logits, folded.route(folded_x).logits)
        assert torch.equal(layer.route(x).topk_ids, folded.route(folded_x).topk_ids)


@pytest.mark.parametrize("kind", [0, 1])
def test_real_scales_keep_the_function(layers, kind):
    folded = fold_layer(layers[kind], random_scales(layers[kind], 0, False))
    assert torch.allclose(run(layers[kind])[0], run(folded)[0], rtol=1e-4, atol=1e-4)


def test_the_original_is_left_alone_and_no_scale_changes_nothing(layers):
    before = {name: tensor.clone() for name, tensor in layers[0].tensors.items()}
    fold_layer(layers[0], random_scales(layers[0], 0, True))
    assert all(torch.equal(layers[0].tensors[name], tensor) for name, tensor in before.items())
    assert fold_layer(layers[0], LayerScales()).tensors == layers[0].tensors


def test_heads_of_a_group_share_their_value_scales(layers):
    tie = value_tie(layers[0].spec.attention).view(6, 32)
    assert torch.equal(tie[0], tie[2]) and torch.equal(tie[3], tie[5])
    assert tie[0].tolist() == list(range(32)) and tie[3].tolist() == list(range(32, 64))


@pytest.mark.parametrize(("kind", "block"), [(0, 32), (1, 32)])
def test_rotating_down_inputs_keeps_the_function(layers, kind, block):
    folded = fold_layer(layers[kind], random_scales(layers[kind], 0, True))
    rotated = rotate_down(folded)
    assert rotated.down_block == block and layers[kind].down_block == folded.down_block == 1
    assert torch.allclose(run(layers[kind])[0], run(rotated)[0], rtol=1e-4, atol=1e-4)
    name = "mlp.experts.down_proj" if kind == 0 else "mlp.down_proj.weight"
    assert not torch.allclose(rotated.tensors[name], folded.tensors[name], atol=1e-2)
    with pytest.raises(ValueError, match="after its down projection was rotated"):
        fold_layer(rotated, LayerScales())
