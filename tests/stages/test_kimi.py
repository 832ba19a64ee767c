"""The stages on Kimi-VL: latent attention's groups and folds, shared experts, and the whole way to a quantized checkpoint."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ecmfq_export import bundle
from ecmfq_export.config import QuantConfig
from ecmfq_export.models.moe_vlm import open_model
from ecmfq_export.models.torch_decoder import load_layer
from ecmfq_export.progress import Silent
from ecmfq_export.quant.ecs_objective import expert_importance
from ecmfq_export.runtime.processor import Processor
from ecmfq_export.stages import attention_view
from ecmfq_export.stages.calibrate import calibrate, potential_mass, score_pool
from ecmfq_export.stages.calibration import load_calibration
from ecmfq_export.stages.fold import LayerScales, fold_layer
from ecmfq_export.stages.quantize import quantize
from ecmfq_export.stages.samples import load_pool
from ecmfq_export.stages.smooth import load_scales, smooth
from ecmfq_export.stages.streams import ActivationStore, prepare_batches
from tests.stages.common import SETTINGS, make_pool
from tests.stages.test_quantize import divergence
from tests.stages.test_smooth import decode
from tests.tiny_kimi import make_kimi_vl

VARIANTS = {"queries projected directly": {}, "queries with a latent": {"q_lora_rank": 40}}


@pytest.fixture(scope="module", params=VARIANTS)
def layers(request, tmp_path_factory):
    """A dense and a routed layer."""
    model = open_model(make_kimi_vl(tmp_path_factory.mktemp("kimi"), seed=5, num_hidden_layers=2, **VARIANTS[request.param]))
    return [load_layer(model, index) for index in range(2)]


def draw_scales(layer, seed: int) -> LayerScales:
    """A power of two for everything that can be scaled."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.exp2(torch.randint(-5, 6, shape, generator=g).float())

    attention, mlp = layer.spec.attention, layer.spec.mlp
    experts = getattr(mlp, "total_experts", 1)
    return LayerScales(
        attention_input=draw(128), value=draw(attention.num_heads * attention.v_head_dim), moe_input=draw(128),
        down=draw(experts, mlp.intermediate_size), kv_latent=draw(attention.kv_lora_rank),
        q_latent=None if attention.q_lora_rank is None else draw(attention.q_lora_rank),
    )  # fmt: skip


def run(layer, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(2, 9, 128, generator=g)
    angle = torch.rand(2, 9, 4, generator=g) * 6
    cos, sin = (torch.cat((f(angle), f(angle)), -1) for f in (torch.cos, torch.sin))
    mask = torch.triu(torch.full((9, 9), -1e9), 1).expand(2, 1, 9, 9)
    out, _ = layer.attend(layer.attention_input(hidden), cos, sin, mask)
    return layer.forward(hidden, cos, sin, mask), layer.moe_input(hidden + out).flatten(0, 1)


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("seed", range(2))
def test_powers_of_two_keep_every_bit(layers, kind: int, seed: int) -> None:
    layer, scales = layers[kind], draw_scales(layers[kind], seed)
    folded = fold_layer(layer, scales)
    assert len(scales.named()) == 5 + (layer.spec.attention.q_lora_rank is not None)
    (out, x), (folded_out, folded_x) = run(layer, seed), run(folded, seed)
    assert torch.equal(out, folded_out) and not torch.equal(x, folded_x)
    if kind == 1:
        ours, theirs = layer.route(x), folded.route(folded_x)
        assert torch.equal(ours.logits, theirs.logits) and torch.equal(ours.topk_ids, theirs.topk_ids)


def test_each_scale_alone_keeps_the_function_and_reaches_its_weights(layers) -> None:
    layer = layers[1]
    whole = draw_scales(layer, 3).named()
    for name, scale in whole.items():
        folded = fold_layer(layer, LayerScales(**{name: scale}))
        assert torch.equal(run(layer)[0], run(folded)[0]), name
        changed = {suffix for suffix, tensor in folded.tensors.items() if not torch.equal(tensor, layer.tensors[suffix])}
        group = next((g for g in attention_view.groups(layer.spec.attention) if g.name == name), None)
        if group is not None:
            assert changed == {*group.weights, *group.producers}


def test_value_scales_leave_the_key_rows_of_kv_b_alone(layers) -> None:
    layer, spec = layers[1], layers[1].spec.attention
    folded = fold_layer(layer, LayerScales(value=torch.full((spec.num_heads * spec.v_head_dim,), 2.0)))
    before, after = (x.tensors["self_attn.kv_b_proj.weight"].unflatten(0, (spec.num_heads, -1)) for x in (layer, folded))
    assert torch.equal(before[:, : spec.qk_nope_head_dim], after[:, : spec.qk_nope_head_dim])
    assert torch.equal(before[:, spec.qk_nope_head_dim :], 2 * after[:, spec.qk_nope_head_dim :])


def test_groups_read_what_their_projections_multiply(layers) -> None:
    """Each group's weight times its tap is what the projection gives inside the layer."""
    from types import SimpleNamespace

    layer, g = layers[1], torch.Generator().manual_seed(1)
    hidden = torch.randn(1, 5, 128, generator=g)
    batch = SimpleNamespace(cos=torch.ones(1, 5, 8), sin=torch.zeros(1, 5, 8), mask=torch.zeros(1, 1, 5, 5))
    taps, probs = attention_view.taps(layer, hidden, batch)
    groups = attention_view.groups(layer.spec.attention)
    assert list(taps) == [group.name for group in groups] and probs.shape == (1, 4, 5, 5)
    seen: dict[str, torch.Tensor] = {}

    class Watched(type(layer)):
        def linear(self, x, name):
            seen[f"{name}.weight"] = x
            return super().linear(x, name)

    watched = Watched(layer.spec, layer.eps, layer.tensors)
    watched.attend(watched.attention_input(hidden), batch.cos, batch.sin, batch.mask)
    assert set(seen) == set(attention_view.weight_names(layer.spec.attention))
    for group in groups:
        assert torch.equal(attention_view.tap(layer, hidden, batch, group.name), taps[group.name])
        assert all(torch.equal(seen[name], taps[group.name]) for name in group.weights)
        assert attention_view.stacked_weight(layer, group).shape[-1] == taps[group.name].shape[-1]


def test_shared_experts_have_full_weight_and_no_score_mass(layers) -> None:
    layer = layers[1]
    routing = layer.route(run(layer)[1])
    assert potential_mass(routing, layer).shape[1] == 8
    omega = expert_importance(torch.tensor([[1.0, 3.0], [3.0, 0.0], [0.0, 1.0]]), num_shared=2)
    assert omega.shape == (5,) and torch.isclose(omega.sum(), torch.tensor(1.0))
    assert omega[3] == omega[4] and bool((omega[3] > omega[:3]).all())
    assert torch.allclose(omega[3] / omega[0], torch.tensor(2 / (0.25**0.5 + 0.75**0.5)))


@pytest.fixture(scope="module")
def pool(tmp_path_factory) -> Path:
    return make_pool(tmp_path_factory.mktemp("kimi-pool"))


@pytest.fixture(scope="module")
def stages(pool, tmp_path_factory) -> Path:
    """A model and every stage's directory beside each other."""
    root = tmp_path_factory.mktemp("kimi-stages")
    model = make_kimi_vl(root / "model", seed=1)
    config = replace(SETTINGS, attention="w4a8", weighting="rho_g")
    calibrate(model, pool, root / "calibration", config, Silent())
    smooth(model, root / "calibration", root / "smoothing", config, Silent())
    quantize(model, root / "calibration", root / "smoothing", root / "ecmfq", config, Silent())
    quantize(model, None, None, root / "rtn", QuantConfig(method="rtn", attention="w4a8"), Silent())
    return root


def test_calibration_counts_routed_experts_only(stages, pool) -> None:
    model, processor = open_model(stages / "model"), Processor(stages / "model")
    samples = [sample.process(processor) for sample in load_pool(pool)[:6]]
    with ActivationStore() as store:
        scores = score_pool(model, list(prepare_batches(model, samples, store)), len(samples), store, 0, Silent())
    assert scores.mass.shape == (6, 2, 8, 2)
    assert torch.equal(scores.tokens.sum(-1), torch.tensor([[2 * sample.length] * 2 for sample in samples]))


def test_smoothing_searches_every_group(stages) -> None:
    log = json.loads((stages / "smoothing" / "search.json").read_text())
    for index in range(3):
        for name in ("attention_input", "kv_latent", "value", "down"):
            assert f"layers.{index}.{name}" in log
    assert log["layers.1.down"]["experts"] == 10


def test_folded_model_routes_every_token_as_before(stages) -> None:
    model = open_model(stages / "model")
    samples, scales = load_calibration(stages / "calibration").samples, load_scales(stages / "smoothing")
    original = [load_layer(model, index) for index in range(3)]
    folded = [fold_layer(layer, scales.get(i, LayerScales())) for i, layer in enumerate(original)]
    harsh = [fold_layer(layer, draw_scales(layer, i)) for i, layer in enumerate(original)]
    ids, last = decode(model, samples, original)
    for other in (folded, harsh):
        other_ids, other_last = decode(model, samples, other)
        assert all(torch.equal(a, b) for a, b in zip(ids, other_ids, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(last, other_last, strict=True))


@pytest.mark.parametrize("method", ["ecmfq", "rtn"])
def test_result_reads_back_with_its_recipes(stages, method: str) -> None:
    model = open_model(stages / method)
    for name in model.names():
        wanted = "w4a8" if name.endswith(("_proj", "_proj.weight")) and name.startswith("layers.") else "float"
        assert model.recipe(name) == wanted, name
    weight = model.qtensor("layers.2.mlp.experts.down_proj")
    assert weight.qvalue.shape == (10, 128, 96) and weight.scale.shape == (10, 128)
    info = bundle.read_manifest(stages / method, "quantize").info
    assert 0.25 < info["quantized_bytes"] / info["quantized_bytes_in_16_bits"] < 0.28
    names = set(model.checkpoint.names())
    assert "language_model.model.layers.1.mlp.shared_experts.1.down_proj.weight_packed" in names
    assert "language_model.model.layers.1.self_attn.kv_a_proj_with_mqa.weight_packed" in names


def test_closer_than_rounding_to_nearest(stages, tmp_path) -> None:
    fresh = make_pool(tmp_path / "fresh", size=8, seed=9)
    ours, nearest = (divergence(stages / "model", stages / method, fresh) for method in ("ecmfq", "rtn"))
    assert 0 < ours < 0.7 * nearest


def test_floating_experts_keep_their_published_form(stages, tmp_path) -> None:
    """A checkpoint whose attention alone is quantized still has the experts of the source, tensor for tensor."""
    from ecmfq_export.models.quantized_format import QuantizedWriter
    from ecmfq_export.quant.rtn import quantize_rtn

    source = open_model(stages / "model")
    (tmp_path / "q").mkdir()
    writer = QuantizedWriter(tmp_path / "q", source)
    for index in range(3):
        o_proj = quantize_rtn(source.tensor(f"layers.{index}.self_attn.o_proj.weight"), 8)
        tensors = {"self_attn.o_proj.weight": o_proj}
        if index == 2:
            tensors["mlp.experts.gate_up_proj"] = source.tensor("layers.2.mlp.experts.gate_up_proj") * 2
        writer.write_layer(index, tensors)
    result = writer.finish()
    for name in source.names():
        if name.endswith("o_proj.weight"):
            continue
        factor = 2 if name == "layers.2.mlp.experts.gate_up_proj" else 1
        assert torch.equal(result.tensor(name), source.tensor(name) * factor), name
    assert "language_model.model.layers.1.mlp.shared_experts.gate_proj.weight" in result.checkpoint.names()


def test_recipes(stages, tmp_path) -> None:
    out = quantize(stages / "model", None, None, tmp_path / "fp16", QuantConfig(method="rtn", attention="fp16"), Silent())
    model = open_model(out)
    assert model.recipe("layers.1.self_attn.kv_b_proj.weight") == "float" and model.recipe("layers.1.mlp.experts.down_proj") == "w4a8"
    assert torch.equal(model.tensor("layers.0.mlp.up_proj.weight"), open_model(stages / "model").tensor("layers.0.mlp.up_proj.weight"))
