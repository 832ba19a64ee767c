"""Stage rotate: a valid checkpoint with the original's function, resumable, skipped when current, and refused by name."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3VLMoeForConditionalGeneration

from ecmfq_export import bundle
from ecmfq_export.config import QuantConfig
from ecmfq_export.errors import BundleError, CheckpointError, UnsupportedError, UserError
from ecmfq_export.models.inputs import prepare_inputs
from ecmfq_export.models.moe_vlm import open_model
from ecmfq_export.models.quantized_format import QuantizedWriter
from ecmfq_export.models.rotated import RotatedModel, residual_rotation
from ecmfq_export.models.torch_decoder import load_layer, run_decoder
from ecmfq_export.progress import Silent
from ecmfq_export.runtime.processor import Processor
from ecmfq_export.stages.quantize import quantize
from ecmfq_export.stages.rotate import rotate
from ecmfq_export.stages.samples import load_pool
from tests.stages.common import file_hashes
from tests.tiny_ernie import make_ernie
from tests.tiny_kimi import kimi_sample, make_kimi_k25, make_kimi_vl
from tests.tiny_models import make_qwen3_vl_moe, random_sample
from tests.tiny_omni import make_qwen3_omni

CONFIG = QuantConfig(method="rtn", rotate="residual", seed=2)
EXAMPLE = Path(__file__).parents[2] / "examples/tiny_vlm"


@pytest.fixture(scope="session")
def rotated(tiny, tmp_path_factory) -> Path:
    return rotate(tiny, tmp_path_factory.mktemp("rotate") / "rotated", CONFIG, Silent())


def hf_logits(directory: Path) -> torch.Tensor:
    model = Qwen3VLMoeForConditionalGeneration.from_pretrained(directory, attn_implementation="eager").eval()
    assert model.dtype == torch.float32
    sample = random_sample(3, [(1, 4, 8)])
    types = torch.from_numpy(sample.input_ids == model.config.image_token_id).long()
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(sample.input_ids)[None], pixel_values=torch.from_numpy(sample.pixel_values),
                     image_grid_thw=torch.from_numpy(sample.image_grid_thw), mm_token_type_ids=types[None]).logits  # fmt: skip


def test_transformers_loads_it_and_computes_the_same(tiny, rotated):
    before, after = hf_logits(tiny), hf_logits(rotated)
    assert float((before - after).abs().max()) < 1e-4 * float(before.pow(2).mean().sqrt())
    assert set(load_file(tiny / "model.safetensors")) == set(open_model(rotated).checkpoint.names())
    assert Processor(rotated).image_token_id == Processor(tiny).image_token_id


def test_files_are_the_view(tiny, rotated):
    model, view = open_model(rotated), RotatedModel(open_model(tiny), CONFIG.seed)
    assert all(torch.equal(model.tensor(name), view.tensor(name)) for name in view.names())
    assert torch.equal(residual_rotation(model).matrix(), view.rotation.matrix())
    info = bundle.read_manifest(rotated, "rotate").info
    assert info == {"block": 128, "untied": False}


def test_what_changes_in_a_bfloat16_checkpoint_becomes_float32(tmp_path):
    """Rounding rotated weights back to 8 bits of mantissa would lose what the original held."""
    tiny = make_qwen3_vl_moe(tmp_path / "model", dtype=torch.bfloat16)
    out = rotate(tiny, tmp_path / "rotated", CONFIG, Silent())
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == "float32" and json.loads((tiny / "config.json").read_text())["dtype"] == "bfloat16"
    before, after = open_model(tiny), open_model(out)
    kept = {name for name in after.names() if after.stored_dtype(name) == torch.bfloat16}
    assert all(torch.equal(before.tensor(name), after.tensor(name)) for name in kept)
    assert {after.stored_dtype(name) for name in set(after.names()) - kept} == {torch.float32}
    assert {name for name in after.names() if "vision" not in name} & kept == {
        f"layers.{i}.self_attn.{part}_norm.weight" for i in range(2) for part in "qk"}
    assert "vision.merger.linear_fc1.weight" in kept and "vision.merger.linear_fc2.bias" not in kept


def test_tied_embeddings_are_untied(tmp_path):
    tiny = make_qwen3_vl_moe(tmp_path / "model", tie_word_embeddings=True)
    out = rotate(tiny, tmp_path / "rotated", CONFIG, Silent())
    assert not open_model(out).spec.tie_word_embeddings and bundle.read_manifest(out).info["untied"]
    before, after = hf_logits(tiny), hf_logits(out)
    assert float((before - after).abs().max()) < 1e-4 * float(before.pow(2).mean().sqrt())


@pytest.mark.parametrize("make", [make_kimi_vl, make_kimi_k25])
def test_every_form_on_disk_is_written_as_it_was(tmp_path, make):
    """Experts one by one, shared ones as one MLP, latent attention: the same names as before, the rotated view behind them."""
    tiny = make(tmp_path / "model")
    out = rotate(tiny, tmp_path / "rotated", replace(CONFIG, rotate_values=True), Silent())
    before, after = open_model(tiny), open_model(out)
    assert set(after.checkpoint.names()) == set(before.checkpoint.names())
    view = RotatedModel(before, CONFIG.seed, values=True)
    assert all(torch.equal(after.tensor(name), view.tensor(name)) for name in view.names())
    samples = [kimi_sample(1, [(1, 4, 4)]), kimi_sample(2)]
    with torch.no_grad():
        sides = [run_decoder(m, prepare_inputs(m, samples)) for m in (before, after)]
    assert float((sides[0] - sides[1]).abs().max()) < 1e-4 * float(sides[0].pow(2).mean().sqrt())
    quantized = quantize(out, None, None, tmp_path / "q", QuantConfig(method="rtn", rotate="residual_online"), Silent())
    assert set(open_model(quantized).quantization.blocks.values()) == {32}


def test_what_is_not_run_is_left_out_and_named(tmp_path):
    """An audio tower or a talker would write into, or read, the other basis."""
    tiny, told = make_qwen3_omni(tmp_path / "model", speech=True), Silent()
    lines: list[str] = []
    told.note = lines.append
    after, before = open_model(rotate(tiny, tmp_path / "rotated", CONFIG, told)), open_model(tiny)
    assert len(before.unused) > 40 and after.unused == ()
    assert [all(prefix in line for prefix in before.unused_parts()) for line in lines if "left out" in line] == [True]


def test_a_tower_that_ends_in_a_norm_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be rotated"):
        rotate(make_ernie(tmp_path / "model"), tmp_path / "rotated", CONFIG, Silent())
    assert not (tmp_path / "rotated").exists()


def test_killed_and_run_again_gives_the_same_bytes(tiny, rotated, tmp_path, monkeypatch):
    out = tmp_path / "rotated"
    write, written = QuantizedWriter.write_layer, []

    def write_once(self, index, tensors):
        if written:
            raise KeyboardInterrupt
        written.append(index)
        write(self, index, tensors)

    monkeypatch.setattr(QuantizedWriter, "write_layer", write_once)
    with pytest.raises(KeyboardInterrupt):
        rotate(tiny, out, CONFIG, Silent())
    assert not out.exists() and bundle.partial_dir(out).is_dir()
    monkeypatch.setattr(QuantizedWriter, "write_layer", lambda self, index, tensors: (written.append(index), write(self, index, tensors)))
    rotate(tiny, out, CONFIG, Silent())
    assert written == [0, 1] and file_hashes(out) == file_hashes(rotated)


def test_up_to_date_is_skipped_and_other_settings_are_not(tiny, rotated):
    stamp = (rotated / "manifest.json").stat().st_mtime_ns
    for config in (CONFIG, replace(CONFIG, rotate="residual_online", attention="w4a8")):
        rotate(tiny, rotated, config, Silent())
        assert (rotated / "manifest.json").stat().st_mtime_ns == stamp
    inputs = {"model": bundle.fingerprint(tiny)}
    for change in ({"seed": 3}, {"rotate_values": True}):
        settings = {"seed": CONFIG.seed, "rotate_values": False, **change}
        assert not bundle.is_current(rotated, "rotate", settings, inputs)


@torch.no_grad()
def test_the_example_picks_the_same_experts(tmp_path):
    """Of tokens whose last picked and first passed-over expert are further apart than rounding, all; that is nearly all."""
    out = rotate(EXAMPLE / "checkpoint", tmp_path / "rotated", replace(CONFIG, rotate_values=True), Silent())
    processor = Processor(out)
    samples = [sample.process(processor) for sample in load_pool(EXAMPLE.parents[1] / "calib_data")[:12]]
    models = [open_model(path) for path in (EXAMPLE / "checkpoint", out)]
    inputs = [prepare_inputs(m, samples) for m in models]
    hidden = [i.inputs_embeds for i in inputs]
    valid = (torch.arange(hidden[0].shape[1]) < inputs[0].lengths[:, None]).flatten()
    different = slots = 0
    for index in range(models[0].spec.num_layers):
        picked = []
        for side, model in enumerate(models):
            layer, given = load_layer(model, index), inputs[side]
            out_, _ = layer.attend(layer.attention_input(hidden[side]), given.cos, given.sin, given.mask)
            x = layer.moe_input(hidden[side] + out_)
            picked.append(layer.route(x.flatten(0, 1)[valid]).topk_ids.sort(-1).values)
            hidden[side] = hidden[side] + out_ + layer.mlp(x)
            if index < len(given.deepstack):
                hidden[side] = hidden[side] + given.deepstack[index]
        different += int((picked[0] != picked[1]).sum())
        slots += picked[0].numel()
    assert slots > 5000 and different <= slots // 5000


def test_what_cannot_be_done_is_refused_by_name(tiny, rotated, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="rotate = 'none'"):
        rotate(tiny, out, replace(CONFIG, rotate="none"), Silent())
    with pytest.raises(UnsupportedError, match=r"rotated already: it has a residual_rotation\.json"):
        rotate(rotated, out, CONFIG, Silent())
    quantized = quantize(tiny, None, None, tmp_path / "quantized", QuantConfig(method="rtn"), Silent())
    with pytest.raises(UnsupportedError, match="quantized already"):
        rotate(quantized, out, CONFIG, Silent())
    assert not out.exists()


def test_a_full_disk_is_said_before_any_work(tiny, tmp_path, monkeypatch):
    size = sum(tensor.numel() * 4 for tensor in load_file(tiny / "model.safetensors").values())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=size - 1))
    with pytest.raises(BundleError, match=r"takes 0\.00 GB, .* has 0\.00 GB free"):
        rotate(tiny, tmp_path / "out", CONFIG, Silent())
    assert not (tmp_path / "out").exists() and not bundle.partial_dir(tmp_path / "out").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=size))
    rotate(tiny, tmp_path / "out", CONFIG, Silent())


def test_nan_weights_end_in_a_message_and_nothing_is_left_as_a_result(tmp_path):
    tiny = make_qwen3_vl_moe(tmp_path / "model")
    tensors = load_file(tiny / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.1.self_attn.k_proj.weight"))
    tensors[name][3, 5] = float("inf")
    save_file(tensors, tiny / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.k_proj"):
        rotate(tiny, tmp_path / "out", CONFIG, Silent())
    assert not (tmp_path / "out").exists()
