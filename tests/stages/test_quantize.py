"""Stage quantize: what comes out is closer than rounding, complete, reproducible, and survives being killed."""

import json
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ecmfq_export import bundle
from ecmfq_export.config import QuantConfig
from ecmfq_export.errors import CheckpointError, UnsupportedError, UserError
from ecmfq_export.models.moe_vlm import open_model
from ecmfq_export.progress import Silent
from ecmfq_export.quant.expert_memory import plan_experts
from ecmfq_export.quant.hadamard import block_hadamard
from ecmfq_export.quant.rtn import quantize_rtn
from ecmfq_export.stages.calibration import load_calibration
from ecmfq_export.stages.quantize import quantize
from tests.stages.common import SETTINGS, divergence, file_hashes
from tests.tiny_models import make_qwen3_vl_moe

RTN = QuantConfig(method="rtn")


@pytest.fixture(scope="session")
def quantized(tiny, calibrated, smoothed) -> Path:
    return quantize(tiny, calibrated, smoothed, calibrated.with_name("quantized"), SETTINGS, Silent())


@pytest.fixture(scope="session")
def rounded(tiny, calibrated) -> Path:
    return quantize(tiny, None, None, calibrated.with_name("rtn"), RTN, Silent())


def test_closer_than_rounding_to_nearest_on_fresh_samples(tiny, quantized, rounded, fresh_pool):
    ours, nearest = divergence(tiny, quantized, fresh_pool), divergence(tiny, rounded, fresh_pool)
    assert 0 < ours < 0.5 * nearest


def test_result_reads_back_with_its_recipes_and_figures(quantized):
    model = open_model(quantized)
    assert model.recipe("layers.0.mlp.experts.gate_up_proj") == "w4a8"
    assert model.recipe("layers.1.self_attn.o_proj.weight") == "w8a8"
    assert model.recipe("lm_head.weight") == model.recipe("layers.0.mlp.router.weight") == "float"
    info = bundle.read_manifest(quantized, "quantize").info
    assert [entry["weighting"] in entry["kl"] and len(entry["kl"]) for entry in info["layers"]] == [4, 4]
    assert info["heldout_kl"] == info["layers"][-1]["kl"][info["layers"][-1]["weighting"]]
    assert 0.25 < info["quantized_bytes"] / info["quantized_bytes_in_16_bits"] < 0.5
    assert not [name for name in file_hashes(quantized) if name.startswith(".")]


@pytest.mark.parametrize("part", [0.0, 0.5])
def test_memory_for_experts_changes_no_byte_and_no_stage(tiny, calibrated, smoothed, quantized, tmp_path, part):
    """One expert at a time, and a few: the checkpoint of all experts at a time."""
    spec = open_model(tiny).spec
    mlp, hidden = spec.layers[0].mlp, spec.hidden_size
    sizes = ((2 * mlp.intermediate_size, hidden, True, False), (hidden, mlp.intermediate_size, False, True))

    def chunks(limit: float) -> list[int]:
        return [plan_experts(mlp.num_experts, rows, columns, cross=True, shared=shared, own_target=own, limit=int(limit)).chunk
                for rows, columns, shared, own in sizes]

    def smallest(wanted: int) -> float:
        limit = 1e4
        while True:
            try:
                if min(chunks(limit)) >= wanted:
                    return limit
            except UserError:
                pass
            limit *= 1.01

    limit = smallest(1) + part * (smallest(mlp.num_experts) - smallest(1))
    assert min(chunks(limit)) < mlp.num_experts and (min(chunks(limit)) == 1) == (part == 0.0)
    few = replace(SETTINGS, expert_memory_gb=limit / 1e9)
    out = quantize(tiny, calibrated, smoothed, tmp_path / "quantized", few, Silent())
    assert file_hashes(out) == file_hashes(quantized)
    stamp = (out / "manifest.json").stat().st_mtime_ns
    quantize(tiny, calibrated, smoothed, out, SETTINGS, Silent())
    assert (out / "manifest.json").stat().st_mtime_ns == stamp


def test_no_memory_for_one_expert_is_said_in_numbers(tiny, calibrated, smoothed, tmp_path):
    with pytest.raises(UserError, match="one expert of .* takes .* GB .* expert_memory_gb allows 1e-06"):
        quantize(tiny, calibrated, smoothed, tmp_path / "quantized", replace(SETTINGS, expert_memory_gb=1e-6), Silent())


def test_same_seed_same_bytes_and_up_to_date_is_skipped(tiny, calibrated, smoothed, quantized, tmp_path):
    again = quantize(tiny, calibrated, smoothed, tmp_path / "quantized", SETTINGS, Silent())
    assert file_hashes(again) == file_hashes(quantized)
    stamp = (again / "manifest.json").stat().st_mtime_ns
    quantize(tiny, calibrated, smoothed, again, SETTINGS, Silent())
    assert (again / "manifest.json").stat().st_mtime_ns == stamp


def test_rounding_needs_no_data_and_is_the_plain_rule(tiny, rounded):
    weight = open_model(tiny).tensor("layers.0.mlp.experts.down_proj")
    q = open_model(rounded).qtensor("layers.0.mlp.experts.down_proj")
    scale = (weight.abs().amax(-1) / 7).half().float()
    assert torch.equal(q.scale, scale)
    assert torch.equal(q.qvalue.float(), torch.round(weight / scale.unsqueeze(-1)).clamp(-7, 7))


KILL = """
    import os, signal, sys
    from pathlib import Path
    import torch
    torch.set_num_threads(1)
    from ecmfq_export.models.quantized_format import QuantizedWriter
    from ecmfq_export.progress import Silent
    from ecmfq_export.stages import quantize as stage
    from tests.stages.common import SETTINGS

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    where, tiny, calibrated, smoothed, out = sys.argv[1:]
    if where == "between the second layer's weights and its state":
        write = QuantizedWriter.write_layer
        def write_layer(self, index, tensors):
            write(self, index, tensors)
            if index == 1:
                die()
        QuantizedWriter.write_layer = write_layer
    else:
        QuantizedWriter.finish = die
    stage.quantize(Path(tiny), Path(calibrated), Path(smoothed), Path(out), SETTINGS, Silent())
"""


def test_killed_twice_and_run_again_gives_the_same_bytes(tiny, calibrated, smoothed, quantized, tmp_path):
    out = tmp_path / "quantized"
    for where in ("between the second layer's weights and its state", "after the last layer"):
        script = [sys.executable, "-c", textwrap.dedent(KILL), where, *map(str, (tiny, calibrated, smoothed, out))]
        ended = subprocess.run(script, capture_output=True, text=True, cwd=Path(__file__).parents[2])
        assert ended.returncode == -9, ended.stderr
        assert not out.exists() and bundle.partial_dir(out).is_dir()
    notes = []

    class Notes(Silent):
        def note(self, text):
            notes.append(text)

    quantize(tiny, calibrated, smoothed, out, SETTINGS, Notes())
    assert any("continuing after layer 2 of 2" in note for note in notes)
    assert file_hashes(out) == file_hashes(quantized)
    assert not bundle.partial_dir(out).exists()


def test_other_settings_do_not_continue_from_a_killed_run(tiny, tmp_path):
    out = tmp_path / "rtn"
    partial = bundle.partial_dir(out)
    partial.mkdir()
    (partial / "model-00001-of-00003.safetensors").write_bytes(b"another run's")
    quantize(tiny, None, None, out, RTN, Silent())
    assert open_model(out).quantization is not None


@pytest.mark.parametrize("change", [
    {"attention": "w4a8", "weighting": "rho_g"}, {"attention": "fp16", "weighting": "rho", "lm_head": "w8a8"},
])  # fmt: skip
def test_recipes(tiny, calibrated, smoothed, fresh_pool, tmp_path, change):
    out = quantize(tiny, calibrated, smoothed, tmp_path / "q", replace(SETTINGS, **change), Silent())
    model = open_model(out)
    assert model.recipe("layers.0.self_attn.q_proj.weight") == {"fp16": "float"}.get(change["attention"], change["attention"])
    assert model.recipe("lm_head.weight") == ("w8a8" if "lm_head" in change else "float")
    assert divergence(tiny, out, fresh_pool) < 0.2
    assert list(bundle.read_manifest(out).info["layers"][-1]["kl"]) == [change["weighting"]]


def test_held_out_samples_enter_the_hessians_once_the_weighting_is_chosen(tiny, calibrated, quantized):
    """The tokens that the final Hessians saw are those of every selected sample, as with a single weighting, which keeps none out."""
    log = json.loads((quantized / "quantization.json").read_text())
    spec, samples = open_model(tiny).spec, load_calibration(calibrated)
    total = sum(sample.length for sample in samples.samples)
    assert any(samples.heldout)
    assert all(sum(map(sum, entry["tokens"])) == total * spec.layers[0].mlp.top_k for entry in log)


@pytest.mark.parametrize(("bits", "limit"), [(3, 3), (2, 1)])
def test_fewer_bits_are_a_coarser_grid_in_the_same_format(tiny, calibrated, smoothed, tmp_path, bits, limit):
    for config in (replace(SETTINGS, weighting="none"), RTN):
        out = quantize(tiny, calibrated, smoothed, tmp_path / config.method, replace(config, expert_bits=bits), Silent())
        q = open_model(out).qtensor("layers.1.mlp.experts.down_proj")
        assert q.num_bits == 4 and int(q.qvalue.abs().max()) == limit


def test_a_dense_layer_follows_the_attention_recipe(calibrated, fresh_pool, tmp_path):
    tiny = make_qwen3_vl_moe(tmp_path / "model", seed=2, mlp_only_layers=[0])
    out = quantize(tiny, calibrated, None, tmp_path / "q", replace(SETTINGS, weighting="rho_g_phi"), Silent())
    assert open_model(out).recipe("layers.0.mlp.up_proj.weight") == "w8a8"
    assert divergence(tiny, out, fresh_pool) < 0.1


def test_groups_of_128(calibrated, fresh_pool, tmp_path):
    tiny = make_qwen3_vl_moe(tmp_path / "model", seed=2, moe_intermediate_size=256)
    config = replace(SETTINGS, group_size=128, weighting="rho_g")
    out = quantize(tiny, calibrated, None, tmp_path / "q", config, Silent())
    weight = open_model(out).qtensor("layers.0.mlp.experts.down_proj")
    assert weight.group_size == 128 and weight.group_multiplier.shape == (8, 128, 2)
    assert divergence(tiny, out, fresh_pool) < 0.1


def test_rotated_down_inputs_hide_large_channels_from_int8(calibrated, fresh_pool, tmp_path):
    """Dense layers at W8A8, where the activations' step is the larger error: two huge channels of 160 set it for all others."""
    tiny = make_qwen3_vl_moe(tmp_path / "model", seed=2, mlp_only_layers=[0, 1])
    tensors = load_file(tiny / "model.safetensors")
    for name in [name for name in tensors if name.endswith("mlp.up_proj.weight")]:
        tensors[name][[5, 99]] *= 256
    save_file(tensors, tiny / "model.safetensors", metadata={"format": "pt"})
    for config in (RTN, replace(SETTINGS, weighting="none")):
        plain, rotated = (
            quantize(tiny, calibrated, None, tmp_path / f"{config.method}-{rotate}", replace(config, rotate=rotate), Silent())
            for rotate in ("none", "residual_online"))
        assert open_model(plain).quantization.blocks == {}
        assert open_model(rotated).quantization.blocks == {f"layers.{i}.mlp.down_proj.weight": 32 for i in range(2)}
        # With GPTQ the figure is a draw: it halves or doubles with a hundredth more damping, plain or rotated.
        most = 0.8 if config.method == "rtn" else 1.5
        assert divergence(tiny, rotated, fresh_pool) < most * divergence(tiny, plain, fresh_pool)


@pytest.mark.parametrize("config", [RTN, replace(SETTINGS, weighting="none")], ids=lambda config: config.method)
def test_rotated_down_inputs_of_experts(tiny, calibrated, fresh_pool, tmp_path, config):
    plain, rotated = (
        quantize(tiny, calibrated, None, tmp_path / rotate, replace(config, rotate=rotate), Silent())
        for rotate in ("none", "residual_online"))
    assert divergence(tiny, rotated, fresh_pool) < 1.5 * divergence(tiny, plain, fresh_pool), "flat channels: neither gain nor loss"
    if config.method == "rtn":
        weight = block_hadamard(96).apply(open_model(tiny).tensor("layers.0.mlp.experts.down_proj").double()).float()
        q = open_model(rotated).qtensor("layers.0.mlp.experts.down_proj")
        assert torch.equal(q.qvalue, quantize_rtn(weight, 4).qvalue)


def test_a_dense_mlp_in_floating_point_is_not_rotated(tmp_path):
    tiny = make_qwen3_vl_moe(tmp_path / "model", seed=2, mlp_only_layers=[0])
    out = quantize(tiny, None, None, tmp_path / "q", replace(RTN, rotate="residual_online", attention="fp16"), Silent())
    model = open_model(out)
    assert list(model.quantization.blocks) == ["layers.1.mlp.experts.down_proj"]
    assert torch.equal(model.tensor("layers.0.mlp.down_proj.weight"), open_model(tiny).tensor("layers.0.mlp.down_proj.weight"))


def test_what_cannot_be_done_is_refused_by_name(tiny, calibrated, quantized, tmp_path):
    with pytest.raises(UnsupportedError, match="128 does not divide 96"):
        quantize(tiny, None, None, tmp_path / "a", replace(RTN, group_size=128), Silent())
    with pytest.raises(UserError, match="needs a calibration directory"):
        quantize(tiny, None, None, tmp_path / "a", SETTINGS, Silent())
    with pytest.raises(UnsupportedError, match="quantized already"):
        quantize(quantized, None, None, tmp_path / "a", RTN, Silent())
    tied = make_qwen3_vl_moe(tmp_path / "tied", tie_word_embeddings=True)
    with pytest.raises(UnsupportedError, match="tied"):
        quantize(tied, None, None, tmp_path / "a", replace(RTN, lm_head="w8a8"), Silent())
    assert not (tmp_path / "a").exists()


def test_nan_weights_end_in_a_message_and_nothing_is_left_as_a_result(tmp_path):
    tiny = make_qwen3_vl_moe(tmp_path / "model")
    file = tiny / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("layers.1.mlp.experts.down_proj"))
    tensors[name][0, 0, 0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts\.down_proj"):
        quantize(tiny, None, None, tmp_path / "q", RTN, Silent())
    assert not (tmp_path / "q").exists()
