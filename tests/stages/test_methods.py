"""Every method through every stage on the tiny model, and every setting that puts another part in the place of a method's."""

import hashlib
import json
import typing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ecmfq_export import bundle
from ecmfq_export.config import Method, QuantConfig
from ecmfq_export.errors import UserError
from ecmfq_export.models.moe_vlm import open_model
from ecmfq_export.models.torch_decoder import load_layer
from ecmfq_export.progress import Silent
from ecmfq_export.stages.calibrate import calibrate
from ecmfq_export.stages.calibration import load_calibration
from ecmfq_export.stages.fold import LayerScales, fold_layer
from ecmfq_export.stages.methods import METHODS, calibration_settings, resolve, rounding_settings, smoothing_settings
from ecmfq_export.stages.quantize import quantize
from ecmfq_export.stages.smooth import load_scales, smooth
from ecmfq_export.workflow import quantize_model
from tests.stages.common import SETTINGS, divergence, file_hashes
from tests.tiny_kimi import make_kimi_vl
from tests.tiny_models import make_qwen3_vl_moe

WITH_DATA = sorted(set(METHODS) - {"rtn", "quarot_gptq"})


def settings(method: str, **changes) -> QuantConfig:
    return replace(SETTINGS, **{"method": method, "attention": "w4a8", "cross_strength": -1.0, **changes})


class Runs:
    """Runs of methods on the tiny model; stages that runs have in common are made once."""

    def __init__(self, model: Path, pool: Path, root: Path) -> None:
        self.model, self.pool, self.root = model, pool, root

    def calibration(self, config: QuantConfig) -> Path:
        return self._once("calibration", calibration_settings(config), lambda out: calibrate(self.model, self.pool, out, config, Silent()))

    def smoothing(self, config: QuantConfig) -> Path | None:
        if resolve(config).smoothing == "none":
            return None
        calibration = self.calibration(config)
        key = [smoothing_settings(config), calibration.name]
        return self._once("smoothing", key, lambda out: smooth(self.model, calibration, out, config, Silent()))

    def quantized(self, config: QuantConfig) -> Path:
        data = self.calibration(config) if resolve(config).needs_data else None
        scales = self.smoothing(config)
        key = [rounding_settings(config), data and data.name, scales and scales.name]
        return self._once("quantized", key, lambda out: quantize(self.model, data, scales, out, config, Silent()))

    def _once(self, stage: str, key: object, make) -> Path:
        out = self.root / f"{stage}.{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]}"
        return out if out.is_dir() else make(out)


@pytest.fixture(scope="session")
def runs(tiny, pool, tmp_path_factory) -> Runs:
    return Runs(tiny, pool, tmp_path_factory.mktemp("methods"))


@pytest.fixture(scope="session")
def kimi(tmp_path_factory) -> Path:
    return make_kimi_vl(tmp_path_factory.mktemp("kimi"), seed=1)


@pytest.fixture(scope="session")
def plain(runs, fresh_pool) -> float:
    return divergence(runs.model, runs.quantized(settings("rtn")), fresh_pool)


def test_the_table_names_every_method():
    assert set(METHODS) == set(typing.get_args(Method))


@pytest.mark.parametrize("method", WITH_DATA)
def test_method_runs_end_to_end_and_is_closer_than_rounding(runs, fresh_pool, plain, method):
    out = runs.quantized(settings(method))
    assert 0 < divergence(runs.model, out, fresh_pool) < plain
    manifest = bundle.read_manifest(out, "quantize")
    assert manifest.info["method"] == method or "method" not in manifest.config
    layers = json.loads((out / "quantization.json").read_text())
    assert [entry["layer"] for entry in layers] == [0, 1]
    for entry in layers:
        assert set(entry["errors"]) == {"attention_input", "value", "gate_up", "down"}
        assert len(entry["errors"]["down"]) == 8 and all(0 <= e < 0.2 for e in entry["errors"]["gate_up"])
        assert sum(map(sum, entry["tokens"])) > 0
    assert (out / "smoothing_scales.safetensors").exists() == (METHODS[method].smoothing != "none")


@pytest.mark.parametrize("method", sorted(name for name in METHODS if METHODS[name].smoothing not in ("none", "ecs")))
def test_folds_of_real_scales_keep_the_floating_point_function(runs, method):
    """Up to rounding: outputs to single precision's, and every token's experts but for ties."""
    model, scales = open_model(runs.model), load_scales(runs.smoothing(settings(method)))
    assert scales
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    for index, found in scales.items():
        layer = load_layer(model, index)
        folded = fold_layer(layer, LayerScales(moe_input=found.moe_input, down=found.down))
        a, b = (side.mlp(side.moe_input(x)) for side in (layer, folded))
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4 * float(a.abs().max()))
        if found.moe_input is not None:
            assert not torch.equal(torch.log2(found.moe_input), torch.log2(found.moe_input).round())


def test_weights_and_norms_of_a_bfloat16_model_keep_what_real_scales_need(runs, tmp_path):
    """The quantized model of a bfloat16 checkpoint holds its folded norms and router in float32."""
    model = make_qwen3_vl_moe(tmp_path / "model", seed=1, dtype=torch.bfloat16)
    calibration = calibrate(model, runs.pool, tmp_path / "c", settings("smoothquant"), Silent())
    scales = smooth(model, calibration, tmp_path / "s", settings("smoothquant"), Silent())
    out = open_model(quantize(model, calibration, scales, tmp_path / "q", settings("smoothquant"), Silent()))
    layer = fold_layer(load_layer(open_model(model), 0), load_scales(scales)[0])
    for name in ("post_attention_layernorm.weight", "mlp.router.weight", "input_layernorm.weight"):
        assert torch.equal(out.tensor(f"layers.0.{name}"), layer.tensors[name])
    assert out.tensor("norm.weight").dtype == torch.bfloat16


@pytest.mark.parametrize(("method", "change"), [
    ("ecmfq", {"selection": "random"}), ("ecmfq", {"smoothing": "none"}), ("ecmfq", {"smooth_rounding": "real"}),
    ("ecmfq", {"shrinkage_kappa": 0.0}), ("ecmfq", {"cross_strength": 1.0}),
    ("ecmfq", {"weighting": "rho_g", "gate_power": 2.0}), ("ecmfq", {"fusion_lambda": 1.0, "weighting": "rho_g_phi"}),
    ("ecmfq", {"balance": "none", "weighting": "rho"}), ("ecmfq", {"rounding": "rtn"}), ("gptq", {"smoothing": "ecs"}),
    ("gptq", {"clip": "absmax"}), ("gptq", {"activation_order": False}), ("gptq", {"selection": "macs"}),
    ("smoothquant", {"smooth_alpha": 0.0}), ("smoothquant", {"smooth_alpha": 0.8}), ("rtn", {"clip": "mse"}), ("rtn", {"clip": "output"}),
    ("awq", {"clip": "mse"}), ("awq", {"rounding": "gptq"}), ("mbq", {"gamma_text": 3.0}), ("moequant", {"selection": "random"}),
])
def test_every_setting_changes_the_result(runs, method, change):
    base = {key: "rho_g" if key == "weighting" and "gate_power" in change else "rho_g_phi" if "fusion_lambda" in change else change[key]
            for key in change if key == "weighting"}
    one, two = (runs.quantized(settings(method, **values)) for values in (base, change))
    assert file_hashes(one) != file_hashes(two)


@pytest.mark.parametrize(("method", "change", "message"), [
    ("gptq", {"clip": "output"}, "rounding = 'rtn' only"),
    ("rtn", {"cross_strength": 1.0}, "does nothing with rounding = 'rtn'"),
    ("awq", {"shrinkage_kappa": 256.0}, "does nothing with rounding = 'rtn'"),
    ("awq", {"weighting": "auto"}, "does nothing with rounding = 'rtn'"),
    ("smoothquant", {"weighting": "rho"}, "does nothing with rounding = 'rtn'"),
])
def test_what_would_do_nothing_is_refused(method, change, message):
    with pytest.raises(UserError, match=message):
        resolve(settings(method, **change))


def test_same_parts_share_their_stages_whatever_the_method_is_called():
    assert calibration_settings(settings("gptq")) == calibration_settings(settings("awq"))
    assert rounding_settings(settings("gptq")) == rounding_settings(settings("moequant", selection="random", weighting="none"))
    assert rounding_settings(settings("gptq")) != rounding_settings(settings("gptaq"))
    assert smoothing_settings(settings("awq")) != smoothing_settings(settings("mbq"))
    # What ECS does not read must not make its directory stale.
    assert smoothing_settings(settings("ecmfq")) == smoothing_settings(settings("ecmfq", percdamp=0.1, shrinkage_kappa=1.0))


def test_settings_that_say_what_the_method_says_change_nothing():
    explicit = settings("ecmfq", selection="macs", smoothing="ecs", smooth_rounding="power_of_two", rounding="gptq", clip="mse",
                        weighting="auto", gamma_text=10.0, balance="limited", cross_strength=0.0, shrinkage_kappa=32.0, rotate="none")
    assert resolve(explicit) == resolve(settings("ecmfq"))


def test_methods_that_choose_nothing_calibrate_on_every_sample(runs):
    config = settings("gptq")
    out = runs.quantized(config)
    lengths = [sample.length for sample in load_calibration(runs.calibration(config)).samples]
    layers = json.loads((out / "quantization.json").read_text())
    assert sum(map(sum, layers[0]["tokens"])) == sum(lengths) * 2  # top-2
    assert bundle.read_manifest(out, "quantize").info["heldout_is_calibration"] is True


def test_measured_gamma_of_every_layer_reaches_mbq(runs):
    calibration = load_calibration(runs.calibration(settings("mbq")))
    assert calibration.gamma > 0 and len(calibration.gamma_by_layer) == len(calibration.gamma_by_layer_attention) == 2
    assert calibration.gamma_by_layer[-1] is None


def test_rotation_first_then_gptq(runs, fresh_pool, plain, tmp_path):
    out = quantize_model(runs.model, runs.pool, tmp_path / "quantized", settings("quarot_gptq"), Silent())
    assert (tmp_path / "rotated").is_dir() and not (tmp_path / "smoothing").exists()
    assert 0 < divergence(runs.model, out, fresh_pool) < plain


@pytest.mark.parametrize("method", ["smoothquant", "mbq", "moequant", "eaquant", "veq_me_ma"])
def test_latent_attention_and_shared_experts(kimi, pool, tmp_path, method):
    out = quantize_model(kimi, pool, tmp_path / "quantized", settings(method, num_samples=6), Silent())
    assert open_model(out).recipe("layers.1.self_attn.kv_b_proj.weight") == "w4a8"
    layers = json.loads((out / "quantization.json").read_text())
    spec = open_model(kimi).spec.layers[1].mlp
    assert len(layers[1]["errors"]["gate_up"]) == len(layers[1]["tokens"]) == spec.total_experts
    if METHODS[method].smoothing != "none":
        found = load_scales(tmp_path / "smoothing")[1]
        assert found.moe_input is not None and found.kv_latent is not None
        assert (found.value is None) == (method == "smoothquant")  # which smooths behind norms only


def test_workflow_runs_a_baseline_and_refuses_what_is_missing(runs, tmp_path):
    out = quantize_model(runs.model, runs.pool, tmp_path / "quantized", settings("smoothquant", num_samples=4), Silent())
    assert open_model(out).quantization is not None and (tmp_path / "smoothing").is_dir()
    with pytest.raises(UserError, match="needs calibration samples"):
        quantize_model(runs.model, None, tmp_path / "b", settings("awq"), Silent())
    with pytest.raises(UserError, match="has no scales to search"):
        smooth(runs.model, runs.calibration(settings("gptq")), tmp_path / "s", settings("gptq"), Silent())
