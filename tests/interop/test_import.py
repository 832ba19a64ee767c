"""Checkpoints that GPTQModel and llm-compressor made (data/, make_*.py): their logits are the library's, imported or refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ecmfq_export import workflow
from ecmfq_export.config import ExportConfig, QuantConfig
from ecmfq_export.errors import CheckpointError, UnsupportedError
from ecmfq_export.models.inputs import prepare_inputs
from ecmfq_export.models.moe_vlm import MoEVLM, open_model
from ecmfq_export.models.torch_decoder import load_layer, run_decoder
from ecmfq_export.progress import Silent
from ecmfq_export.stages.import_quantized import RECORD, import_layer, import_quantized
from ecmfq_export.target import load_target
from tests.interop.checkpoints import Fixture, make

NAMES = ("example_gptq", "gptq_groups", "gptq_group_aware", "gptq_act_order", "gptq_v2_zero_points", "awq", "awq_zero_points")
LLM_COMPRESSOR = ("llmcompressor_w4a16", "llmcompressor_w4a16_asym", "llmcompressor_w4a8")
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


@pytest.fixture(scope="module")
def fixtures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Fixture]:
    root = tmp_path_factory.mktemp("interop")
    return {name: make(name, root / name) for name in (*NAMES, *LLM_COMPRESSOR)}


@pytest.fixture(scope="module")
def imported(fixtures: dict[str, Fixture], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("imported")
    names = ("example_gptq", "gptq_groups", "gptq_group_aware", "awq", "llmcompressor_w4a16", "llmcompressor_w4a8")
    return {name: import_quantized(fixtures[name].path, root / name, QuantConfig(), Silent()) for name in names}


def half_logits(fixture: Fixture, model: MoEVLM) -> list[torch.Tensor]:
    """Logits with int4 weights rounded to float16, as the library's layers dequantize them."""
    layers = [load_layer(model, index) for index in range(model.spec.num_layers)]
    for index, layer in enumerate(layers):
        for suffix, tensor in layer.tensors.items():
            if model.has_int4(f"layers.{index}.{suffix}"):
                layer.tensors[suffix] = tensor.half().float()
    vision = model.vision_module()
    with torch.no_grad():
        return [run_decoder(model, prepare_inputs(model, [sample], vision=vision), layers)[0] for sample in fixture.samples]


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_the_library_s(fixtures: dict[str, Fixture], name: str) -> None:
    """Activation order, zero points and AWQ's packing included. The library rounds its dequantized weights to float16; rounded
    alike, ours give the same logits, and unrounded they differ by what a rounding of 2^-11 gives."""
    fixture = fixtures[name]
    model = open_model(fixture.path)
    assert model.weight_only is not None and model.quantization is None and "gptqmodel" in fixture.library
    for ours, theirs in zip(half_logits(fixture, model), fixture.logits, strict=True):
        assert float((ours[-len(theirs) :] - theirs).abs().max()) < 1e-4
    for ours, theirs in fixture.compare(model):
        assert float((ours - theirs).abs().max()) < 1e-3 * float(theirs.abs().max())


@pytest.mark.parametrize("name", LLM_COMPRESSOR)
def test_logits_are_llm_compressor_s(fixtures: dict[str, Fixture], name: str) -> None:
    """Which dequantizes in float32 if it is asked to: nothing is left but the order of sums."""
    fixture = fixtures[name]
    model = open_model(fixture.path)
    assert model.weight_only.method == "compressed-tensors" and "llmcompressor" in fixture.library
    for ours, theirs in fixture.compare(model):
        assert float((ours - theirs).abs().max()) < 1e-5 * float(theirs.abs().max())


def test_what_an_import_was_made_for_is_said(imported: dict[str, Path]) -> None:
    said = {name: json.loads((imported[name] / "manifest.json").read_text())["info"]["activations"] for name in imported}
    assert "made for floating-point ones (W4A16)" in said["llmcompressor_w4a16"]
    assert "as the checkpoint was made for (W4A8)" in said["llmcompressor_w4a8"]


def test_exact_import_of_the_example(fixtures: dict[str, Fixture], imported: dict[str, Path]) -> None:
    """One scale a channel: every integer and scale is carried over; only the activations' int8 is new."""
    source, model = open_model(fixtures["example_gptq"].path), open_model(imported["example_gptq"])
    for name in model.names():
        assert torch.equal(model.tensor(name), source.tensor(name)), name
    assert {model.recipe(f"layers.0.{name}") for name in EXPERTS} == {"w4a8"}
    assert model.recipe("layers.0.self_attn.q_proj.weight") == "w8a8"
    assert int(model.qtensor("layers.0.mlp.experts.down_proj").qvalue.min()) == -8
    manifest = json.loads((imported["example_gptq"] / "manifest.json").read_text())
    info = manifest["info"]
    assert manifest["stage"] == "import" and info["largest_error"] == 0 and info["exact_weights"] == info["weights"] == 24
    assert "W4A16" in info["activations"]
    for ours, theirs in fixtures["example_gptq"].compare(model):
        kl = (theirs.softmax(-1) * (theirs.log_softmax(-1) - ours.log_softmax(-1))).sum(-1)
        assert float(kl.mean()) < 0.01 and torch.equal(ours.argmax(-1), theirs.argmax(-1))


@pytest.mark.parametrize("checkpoint", ["gptq_groups", "gptq_group_aware", "awq", "llmcompressor_w4a16", "llmcompressor_w4a8"])
def test_groups_under_integer_multipliers(fixtures: dict[str, Fixture], imported: dict[str, Path], checkpoint: str) -> None:
    source, model = open_model(fixtures[checkpoint].path), open_model(imported[checkpoint])
    record = json.loads((imported[checkpoint] / RECORD).read_text())
    attention = ("self_attn.q_proj.weight", "self_attn.o_proj.weight")
    for suffix in (*EXPERTS, *(() if checkpoint == "awq" else attention)):
        name = f"layers.0.{suffix}"
        wanted, found = source.tensor(name), model.qtensor(name)
        error = float((found.dequantize() - wanted).norm() / wanted.norm())
        assert error == pytest.approx(record[0][suffix]["error"], rel=1e-3, abs=1e-7)
        assert error < (5e-3 if suffix in EXPERTS else 1e-2)
        if suffix in EXPERTS:
            assert found.group_size == 128 and torch.equal(found.qvalue, source.weight_only_tensor(name).integer())
    if checkpoint == "awq":  # left in floating point there
        assert all(model.recipe(f"layers.0.{suffix}") == "float" for suffix in attention)
        return
    # 128 columns are one group: its integers fit int8 as they are.
    assert record[0]["self_attn.o_proj.weight"]["error"] == 0 < record[0]["self_attn.q_proj.weight"]["error"]


def test_attention_recipes(fixtures: dict[str, Fixture], tmp_path: Path) -> None:
    example, groups = fixtures["example_gptq"].path, fixtures["gptq_groups"].path
    model = open_model(import_quantized(example, tmp_path / "a", QuantConfig(attention="w4a8"), Silent()))
    source, name = open_model(example), "layers.1.self_attn.v_proj.weight"
    assert model.recipe(name) == "w4a8" and torch.equal(model.tensor(name), source.tensor(name))
    model = open_model(import_quantized(groups, tmp_path / "b", QuantConfig(attention="fp16"), Silent()))
    source, name = open_model(groups), "layers.0.self_attn.v_proj.weight"
    assert model.recipe(name) == "float" and torch.equal(model.tensor(name), source.tensor(name))
    with pytest.raises(UnsupportedError, match="q_proj.weight' has groups of 128 columns") as refusal:
        import_quantized(groups, tmp_path / "c", QuantConfig(attention="w4a8"), Silent())
    assert "--attention w8a8" in refusal.value.fix and not (tmp_path / "c").exists()


@pytest.mark.parametrize(("name", "message"), [
    ("gptq_act_order", "'layers.0.mlp.experts.gate_up_proj' has columns in activation order"),
    ("gptq_v2_zero_points", "'layers.0.mlp.experts.gate_up_proj' has groups of 32"),
    ("llmcompressor_w4a16_asym", "'layers.0.mlp.experts.gate_up_proj' has zero points"),
    ("awq_zero_points", "'layers.0.mlp.experts.gate_up_proj' has zero points"),
])  # fmt: skip
def test_what_kernels_cannot_hold_is_refused_by_name(fixtures: dict[str, Fixture], tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message) as refusal:
        workflow.export(fixtures[name].path, None, tmp_path / "bundle", load_target("rtx"), QuantConfig(), ExportConfig(), Silent())
    assert "ecmfq-export quantize" in refusal.value.fix


def test_what_headers_tell_is_refused_in_a_dry_run(fixtures: dict[str, Fixture], tmp_path: Path) -> None:
    from ecmfq_export.plan import plan_export

    def refusals(name: str, target: str | None) -> list[str]:
        plan = plan_export(fixtures[name].path, None, tmp_path / "out", load_target(target) if target else None, QuantConfig(),
                           ExportConfig(), build=False)  # fmt: skip
        return [check.detail for check in plan.failed]

    assert refusals("gptq_groups", "rtx") == [] and refusals("gptq_v2_zero_points", None) == []
    assert ["groups of 32 among 256 columns" in text for text in refusals("gptq_v2_zero_points", "rtx")] == [True]
    path = change(fixtures["gptq_v2_zero_points"].path, tmp_path / "copy", lambda tensors: None)
    with pytest.raises(UnsupportedError, match="groups of 32 among 256 columns, and integer kernels take groups of 128"):
        workflow.export(path, None, tmp_path / "bundle", load_target("rtx"), QuantConfig(), ExportConfig(), Silent())
    assert not (tmp_path / "bundle").exists() and not (tmp_path / "out").exists()


def test_the_way_out_rounds_dequantized_weights_anew(fixtures: dict[str, Fixture], tmp_path: Path) -> None:
    out = workflow.quantize_model(fixtures["gptq_act_order"].path, None, tmp_path / "quantized", QuantConfig(method="rtn"), Silent())
    model, source = open_model(out), open_model(fixtures["gptq_act_order"].path)
    name = "layers.0.mlp.experts.gate_up_proj"
    assert model.recipe(name) == "w4a8" and model.config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert float((model.tensor(name) - source.tensor(name)).norm() / source.tensor(name).norm()) < 0.15


def test_down_projections_in_activation_order_are_folded(fixtures: dict[str, Fixture], tmp_path: Path) -> None:
    """Inputs of down are rows of gate and up: the same function, each expert with an order of its own."""
    path = change(fixtures["gptq_groups"].path, tmp_path / "changed", shuffled_down)
    source = open_model(path)
    assert source.weight_only_tensor("layers.0.mlp.experts.down_proj").group_index is not None
    folded = load_layer(open_model(import_quantized(path, tmp_path / "out", QuantConfig(attention="fp16"), Silent())), 0)
    plain = load_layer(source, 0)
    for suffix in EXPERTS:
        folded.tensors[suffix] = folded.quantized.pop(suffix).dequantize()
    x = torch.randn(40, 256, generator=torch.Generator().manual_seed(0))
    routing = plain.route(x)
    wanted = plain.experts(x, routing)
    assert float((folded.experts(x, routing) - wanted).norm() / wanted.norm()) < 2e-3  # the multipliers' part
    with torch.no_grad():
        plain.tensors[EXPERTS[1]] = plain.tensors[EXPERTS[1]].flip(-1)
    assert float((plain.experts(x, routing) - wanted).norm() / wanted.norm()) > 0.5


def test_an_interrupted_import_goes_on(fixtures: dict[str, Fixture], imported: dict[str, Path], tmp_path: Path, monkeypatch) -> None:
    done: list[int] = []

    def stopping(model: MoEVLM, index: int, config: QuantConfig):
        if index == 2 and not stopped:
            raise KeyboardInterrupt
        done.append(index)
        return import_layer(model, index, config)

    stopped: list[bool] = []
    monkeypatch.setattr("ecmfq_export.stages.import_quantized.import_layer", stopping)
    with pytest.raises(KeyboardInterrupt):
        import_quantized(fixtures["example_gptq"].path, tmp_path / "out", QuantConfig(), Silent())
    assert done == [0, 1] and not (tmp_path / "out").exists()
    stopped.append(True)
    out = import_quantized(fixtures["example_gptq"].path, tmp_path / "out", QuantConfig(), Silent())
    assert done == [0, 1, 2, 3]
    for file in sorted(imported["example_gptq"].iterdir()):
        assert (out / file.name).read_bytes() == file.read_bytes(), file.name
    import_quantized(fixtures["example_gptq"].path, out, QuantConfig(), Silent())
    assert done == [0, 1, 2, 3]


def shuffled_down(tensors: dict[str, torch.Tensor]) -> None:
    for index, name in enumerate(sorted(key for key in tensors if key.endswith("down_proj.g_idx"))):
        order = torch.randperm(len(tensors[name]), generator=torch.Generator().manual_seed(index))
        tensors[name] = (order // 128).to(torch.int32)


def change(source: Path, target: Path, edit) -> Path:
    """A copy with some tensors changed."""
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    tensors = load_file(target / "model.safetensors")
    edit(tensors)
    save_file(tensors, target / "model.safetensors")
    return target


GATE = "model.language_model.layers.0.mlp.experts.1.gate_proj"


@pytest.mark.parametrize(("edit", "error", "message"), [
    (lambda t: t.pop(f"{GATE}.g_idx"), CheckpointError, "lacks 1 of"),
    (lambda t: t.pop(f"{GATE}.qweight"), UnsupportedError, "all experts of a layer must be stored alike"),
    (lambda t: t.update({f"{GATE}.qweight": t[f"{GATE}.qweight"][:-1].contiguous()}), CheckpointError, "expected torch.int32"),
    (lambda t: t.update({f"{GATE}.bias": torch.zeros(256)}), CheckpointError, "no part of the model takes"),
])  # fmt: skip
def test_damaged_checkpoints(fixtures: dict[str, Fixture], tmp_path: Path, edit, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        open_model(change(fixtures["gptq_groups"].path, tmp_path / "bad", edit))


def test_damaged_group_indices(fixtures: dict[str, Fixture], tmp_path: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{GATE}.g_idx"][3] = 7

    model = open_model(change(fixtures["gptq_groups"].path, tmp_path / "bad", edit))
    with pytest.raises(CheckpointError, match=f"'{GATE}': group indices"):
        model.tensor("layers.0.mlp.experts.gate_up_proj")


def test_bytes_that_are_no_int4(fixtures: dict[str, Fixture], tmp_path: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{GATE}.weight"][0, 0] = 8

    model = open_model(change(fixtures["llmcompressor_w4a8"].path, tmp_path / "bad", edit))
    with pytest.raises(CheckpointError, match=f"'{GATE}.weight' spans .*, 8\\], outside"):
        model.tensor("layers.0.mlp.experts.gate_up_proj")


@pytest.mark.parametrize(("change_of", "message"), [
    ({"bits": 8}, "bits = 8"),
    ({"bits": 4.0}, "bits = 4.0"),
    ({"checkpoint_format": "marlin"}, "checkpoint_format = 'marlin'"),
    ({"dynamic": {"+:.*gate.*": {"bits": 8}}}, "settings of their own"),
    ({"rotation_in_kernel": True}, "not known: rotation_in_kernel"),
    ({"group_size": 0}, "group_size = 0"),
    ({"quant_method": "bitsandbytes"}, "'bitsandbytes' is not supported"),
    ({"quant_method": "awq", "version": "gemv"}, "version = 'gemv'"),
])  # fmt: skip
def test_settings_that_are_not_read(fixtures: dict[str, Fixture], tmp_path: Path, change_of: dict, message: str) -> None:
    path = change(fixtures["gptq_groups"].path, tmp_path / "changed", lambda tensors: None)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"].update(change_of)
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises((UnsupportedError, CheckpointError), match=message):
        open_model(path)
