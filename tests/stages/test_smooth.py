"""Stage smooth: planted outlier channels are found, and the folded model routes as the original."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ecmfq_export.errors import BundleError
from ecmfq_export.models.moe_vlm import open_model
from ecmfq_export.models.spec import MoESpec
from ecmfq_export.models.torch_decoder import DecoderLayer, load_layer
from ecmfq_export.progress import Silent
from ecmfq_export.runtime.processor import Processor
from ecmfq_export.stages.calibrate import calibrate
from ecmfq_export.stages.calibration import load_calibration
from ecmfq_export.stages.fold import LayerScales, fold_layer
from ecmfq_export.stages.quantize import quantize
from ecmfq_export.stages.samples import load_pool
from ecmfq_export.stages.smooth import load_scales, smooth
from ecmfq_export.stages.streams import ActivationStore, add_deepstack, prepare_batches
from tests.stages.common import SETTINGS, divergence, file_hashes
from tests.tiny_models import make_qwen3_vl_moe


def decode(model, samples, layers: list[DecoderLayer]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Expert ids of every token in every routed layer, and the last hidden states."""
    ids, last = [], []
    with torch.no_grad(), ActivationStore() as store:
        for batch in list(prepare_batches(model, samples, store)):
            hidden = store.get(f"hidden/{batch.index}")
            for index, layer in enumerate(layers):
                out, _ = layer.attend(layer.attention_input(hidden), batch.cos, batch.sin, batch.mask)
                x = layer.moe_input(hidden + out)
                if isinstance(layer.spec.mlp, MoESpec):
                    ids.append(layer.route(x.flatten(0, 1)).topk_ids)
                hidden = add_deepstack(hidden + out + layer.mlp(x), index, batch, store)
            last.append(hidden)
    return ids, last


def test_planted_outliers_are_smoothed(smoothed):
    log = json.loads((smoothed / "search.json").read_text())
    for index in range(2):
        entry = log[f"layers.{index}.moe_input"]
        assert entry["accepted"] and entry["heldout_after"] < 0.9 * entry["heldout_before"]
    assert load_scales(smoothed)[0].moe_input.shape == (128,)


def test_folded_model_routes_every_token_as_the_original_and_gives_the_same_bits(tiny, calibrated, smoothed):
    model, samples, scales = open_model(tiny), load_calibration(calibrated).samples, load_scales(smoothed)
    original = [load_layer(model, index) for index in range(2)]
    folded = [fold_layer(layer, scales.get(index, LayerScales())) for index, layer in enumerate(original)]
    assert any(not torch.equal(a.tensors["post_attention_layernorm.weight"], b.tensors["post_attention_layernorm.weight"])
               for a, b in zip(original, folded, strict=True))
    (ids, last), (folded_ids, folded_last) = decode(model, samples, original), decode(model, samples, folded)
    assert all(torch.equal(a, b) for a, b in zip(ids, folded_ids, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(last, folded_last, strict=True))


def test_same_seed_same_bytes(tiny, calibrated, smoothed, tmp_path):
    assert file_hashes(smooth(tiny, calibrated, tmp_path / "smoothing", SETTINGS, Silent())) == file_hashes(smoothed)


def test_attention_in_floating_point_is_left_alone(tiny, calibrated, tmp_path):
    out = smooth(tiny, calibrated, tmp_path / "s", replace(SETTINGS, attention="fp16", smooth_rounding="real"), Silent())
    for scales in load_scales(out).values():
        assert scales.attention_input is None and scales.value is None
        if scales.moe_input is not None:
            assert not torch.equal(torch.log2(scales.moe_input), torch.log2(scales.moe_input).round())


def test_dense_layer_is_smoothed_as_one_expert(calibrated, tmp_path):
    model = make_qwen3_vl_moe(tmp_path / "model", seed=2, mlp_only_layers=[0])
    out = smooth(model, calibrated, tmp_path / "s", SETTINGS, Silent())
    assert json.loads((out / "search.json").read_text())["layers.0.down"]["experts"] == 1


def test_damage_is_refused(smoothed, calibrated, tmp_path):
    with pytest.raises(BundleError, match="'calibrate' directory"):
        load_scales(calibrated)
    shutil.copytree(smoothed, tmp_path / "s")
    (tmp_path / "s" / "scales.safetensors").unlink()
    with pytest.raises(BundleError, match="missing"):
        load_scales(tmp_path / "s")


def test_trained_example_routes_every_token_as_before_whatever_is_folded():
    """Random powers of two on every norm, value and expert, through the stored bf16: harsher than any search's result."""
    root = Path(__file__).parents[2]
    directory = root / "examples" / "tiny_vlm" / "checkpoint"
    model, processor = open_model(directory), Processor(directory)
    samples = [sample.process(processor) for sample in load_pool(root / "calib_data")[:32]]
    original = [load_layer(model, index) for index in range(model.spec.num_layers)]
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.exp2(torch.randint(-5, 6, shape, generator=generator).float())

    folded = []
    for layer in original:
        spec, mlp = layer.spec.attention, layer.spec.mlp
        scales = LayerScales(draw(mlp.hidden_size), draw(spec.num_kv_heads * spec.head_dim), draw(mlp.hidden_size),
                             draw(mlp.num_experts, mlp.intermediate_size))
        after = fold_layer(layer, scales)
        after.tensors = {name: tensor.bfloat16().float() for name, tensor in after.tensors.items()}
        folded.append(after)
    (ids, last), (folded_ids, folded_last) = decode(model, samples, original), decode(model, samples, folded)
    assert sum(len(part) for part in ids) > 4000
    assert all(torch.equal(a, b) for a, b in zip(ids, folded_ids, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(last, folded_last, strict=True))


def test_down_scales_are_searched_behind_the_rotation_that_follows(pool, tmp_path):
    """Planted intermediate channels are scaled with and without the rotation; what is quantized behind it is better for it."""
    tiny = make_qwen3_vl_moe(tmp_path / "model", seed=6)
    tensors = load_file(tiny / "model.safetensors")
    for name in [name for name in tensors if name.endswith("mlp.experts.gate_up_proj")]:
        tensors[name][:, 96:98] *= 32  # two rows of up
        tensors[name.replace("gate_up", "down")][:, :, :2] /= 32
    save_file(tensors, tiny / "model.safetensors", metadata={"format": "pt"})
    config = replace(SETTINGS, rotate="residual_online", weighting="none")
    calibrated = calibrate(tiny, pool, tmp_path / "calibration", config, Silent())
    smoothed = smooth(tiny, calibrated, tmp_path / "smoothing", config, Silent())
    scale = load_scales(smoothed)[0].down
    assert bool((scale[:, :2].mean(1) > 4 * scale[:, 2:].mean(1)).float().mean() > 0.5)
    with_scales, without = (quantize(tiny, calibrated, given, tmp_path / f"q{i}", config, Silent())
                            for i, given in enumerate((smoothed, None)))
    assert divergence(tiny, with_scales, pool) < 0.7 * divergence(tiny, without, pool)
