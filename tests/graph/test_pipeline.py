"""The stage "onnx": files, what is in them, and that they run."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file

from ecmfq_export import bundle
from ecmfq_export.config import ExportConfig
from ecmfq_export.errors import CheckpointError, UnsupportedError, UserError
from ecmfq_export.graph import pipeline, vision
from ecmfq_export.graph.passes.prepack_experts import PrepackExpertsPass
from ecmfq_export.graph.runtime_json import PROCESSOR_FILES
from ecmfq_export.graph.weights import files_of
from ecmfq_export.models.moe_vlm import MoEVLM, open_model
from ecmfq_export.models.torch_decoder import run_decoder
from ecmfq_export.progress import Silent
from ecmfq_export.quant.kernel_layout import unprepack_mma_s8
from ecmfq_export.runtime import host_inputs as host
from ecmfq_export.runtime import processor
from ecmfq_export.target import Target, load_target
from tests.graph.checkpoints import decoder_inputs, quantized_checkpoint
from tests.graph.helpers import Decoder, session

CONFIG = ExportConfig(max_seq_len=48, max_image_patches=256)


def prepacked_target() -> Target:
    target = load_target("rtx")
    return dataclasses.replace(target, kernel=dataclasses.replace(target.kernel, weight_layout="mma_s8"))


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[MoEVLM, MoEVLM]:
    return quantized_checkpoint(tmp_path_factory.mktemp("models"), num_hidden_layers=3, mlp_only_layers=[1])


@pytest.fixture(scope="module")
def exported(models, tmp_path_factory) -> Path:
    """float32 for exact comparison, weights prepacked, residual stream tapped."""
    out = tmp_path_factory.mktemp("out") / "onnx"
    return pipeline.export_onnx(models[1].path, out, prepacked_target(), CONFIG, Silent(), dtype="float32", taps=True)


@pytest.fixture
def no_trace(monkeypatch, exported):
    """Take the vision graph that was traced already; tracing takes seconds."""
    path = exported / "vision" / "model.onnx"
    monkeypatch.setattr(vision, "trace_vision", lambda *_: ir.external_data.load_to_model(ir.load(path)))


def test_files_and_manifest(exported):
    manifest = bundle.read_manifest(exported, "onnx")
    bundle.verify(exported, manifest)
    assert set(manifest.files) >= {
        "decoder/model.onnx", "decoder/model.ref.onnx", "decoder/weights.data", "decoder/experts.row_major.data",
        "decoder/experts.mma_s8.data", "vision/model.onnx", "vision/weights.data", "embed_tokens.safetensors",
        "runtime.json", "tokenizer.json", "preprocessor_config.json",
    }  # fmt: skip
    assert manifest.info["num_plugin_nodes"] == 2
    assert manifest.info["dim_ranges"] == {"batch": [1, 1, 4], "seq": [1, 48, 48], "num_patches": [4, 256, 256]}
    assert set(processor.PROCESSOR_FILES) <= set(PROCESSOR_FILES)


def test_graphs(exported):
    decoder = exported / "decoder"
    for path in (decoder / "model.onnx", decoder / "model.ref.onnx", exported / "vision" / "model.onnx"):
        onnx.checker.check_model(str(path))
    plain, reference = ir.load(decoder / "model.onnx"), ir.load(decoder / "model.ref.onnx")
    assert not plain.functions and [f.name for f in reference.functions.values()] == ["EcmfqRoutedMoE"]
    assert [n.op_type for n in plain.graph].count("EcmfqRoutedMoE") == 2
    assert files_of(plain) == {"weights.data", "experts.mma_s8.data"}
    assert files_of(reference) == {"weights.data", "experts.row_major.data"}
    assert {n.attributes["weight_layout"].as_string() for n in plain.graph if n.op_type == "EcmfqRoutedMoE"} == {"mma_s8"}
    name = "layers.2.mlp.experts.gate_up_proj.qweight"
    packed, canonical = (m.graph.initializers[name].const_value.numpy() for m in (plain, reference))
    assert not np.array_equal(packed, canonical)
    np.testing.assert_array_equal(unprepack_mma_s8(packed, True), canonical)
    used = {str(d) for v in plain.graph.inputs for d in v.shape if not isinstance(d, int)}
    assert used == {"batch", "seq"}


def test_prepacking_leaves_no_file_mapped(exported):
    """A layer's file pages would count as resident until the last layer is written."""
    graph = ir.load(exported / "decoder" / "model.ref.onnx")
    weights = [v.const_value for v in graph.graph.initializers.values() if v.name.endswith("experts.gate_up_proj.qweight")]
    before = [weight.numpy().copy() for weight in weights]
    assert all(weight.raw is not None for weight in weights)
    PrepackExpertsPass("mma_s8")(graph)
    for weight, canonical in zip(weights, before, strict=True):
        packed = graph.graph.initializers[weight.name].const_value.numpy()
        np.testing.assert_array_equal(unprepack_mma_s8(packed, True), canonical)
        assert weight.raw is None
        np.testing.assert_array_equal(weight.numpy(), canonical)  # and can be read again


def test_reference_graph_equals_pytorch(exported, models):
    model = models[1]
    runner = session(exported / "decoder" / "model.ref.onnx")
    inputs, positions = decoder_inputs(model, 2, 1, 12)
    deepstack = [d.numpy() for d in inputs.deepstack]
    out = Decoder(runner, model.spec, 48, 1).step(inputs.inputs_embeds.numpy(), positions, [0], deepstack)
    hidden: dict[int, torch.Tensor] = {}
    expected = run_decoder(model, inputs, on_layer=hidden.__setitem__).numpy()
    # The flip tolerance that tests/graph/test_quantized.py argues.
    assert np.sqrt(np.mean((out["logits"] - expected) ** 2)) < 0.02 * np.sqrt(np.mean(expected**2))
    np.testing.assert_allclose(out["hidden_0"], hidden[0].numpy(), atol=0.05)


def test_vision_graph_equals_the_tower(exported, models):
    tower = models[0].vision_module()
    grid = np.array([[1, 4, 6], [1, 2, 4]])
    spec = host.HostSpec.from_runtime_json(json.loads((exported / "runtime.json").read_text()))
    patches = torch.randn(32, spec.vision.patch_features, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = tower(patches, torch.from_numpy(grid))
    feeds = {"patches": patches.numpy(), **host.vision_inputs(grid, spec.vision)}
    out = session(exported / "vision" / "model.onnx").run(None, feeds)
    for got, want in zip(out, [expected.pooler_output, *expected.deepstack_features], strict=True):
        np.testing.assert_allclose(got, want.numpy(), atol=1e-5)


def test_runtime_json(exported, models):
    facts = json.loads((exported / "runtime.json").read_text())
    spec = host.HostSpec.from_runtime_json(facts)
    assert spec.dtype == np.float32 and spec.max_seq_len == 48 and spec.num_deepstack == models[1].spec.num_deepstack
    assert spec.rope.sections == models[1].spec.rope.sections
    assert facts["eos_token_ids"] == [258] and facts["moe"]["weight_layout"] == "mma_s8" and facts["moe"]["group_size"] == -1
    for file in facts["files"].values():
        assert (exported / file).is_file()
    assert str(exported) not in json.dumps(facts)


def test_same_again_gives_the_same_bytes_and_current_is_left_alone(exported, models, tmp_path, no_trace):
    again = pipeline.export_onnx(models[1].path, tmp_path / "onnx", prepacked_target(), CONFIG, Silent(), dtype="float32", taps=True)
    first, second = (bundle.read_manifest(d, "onnx") for d in (exported, again))
    assert first.files == second.files
    stamp = (again / "manifest.json").stat().st_mtime_ns
    pipeline.export_onnx(models[1].path, again, prepacked_target(), CONFIG, Silent(), dtype="float32", taps=True)
    assert (again / "manifest.json").stat().st_mtime_ns == stamp


def test_floating_point_checkpoint(models, tmp_path, no_trace):
    out = pipeline.export_onnx(models[0].path, tmp_path / "onnx", prepacked_target(), CONFIG, Silent(), dtype="float32")
    plain, reference = (ir.load(out / "decoder" / f"model.{n}") for n in ("onnx", "ref.onnx"))
    assert [n.op_type for n in plain.graph].count("EcmfqMoE") == 2 and not plain.functions
    assert files_of(plain) == files_of(reference) == {"weights.data"}
    assert json.loads((out / "runtime.json").read_text())["moe"]["op"] == "EcmfqMoE"
    inputs, positions = decoder_inputs(models[0], 3, 1, 5)
    runner = session(out / "decoder" / "model.ref.onnx")
    step = Decoder(runner, models[0].spec, 48, 1).step(inputs.inputs_embeds.numpy(), positions, [0], [d.numpy() for d in inputs.deepstack])
    np.testing.assert_allclose(step["logits"], run_decoder(models[0], inputs).numpy(), atol=1e-5)


def test_older_parsers_get_the_decomposed_form(models, tmp_path, no_trace):
    target = load_target("jetson-orin")
    assert target.attention == "decomposed"
    out = pipeline.export_onnx(models[1].path, tmp_path / "onnx", target, CONFIG, Silent())
    for part in ("decoder", "vision"):
        kinds = {n.op_type for n in ir.load(out / part / "model.onnx").graph}
        assert not kinds & {"Attention", "TensorScatter", "RotaryEmbedding", "RMSNormalization"}
        onnx.checker.check_model(str(out / part / "model.onnx"))
    reference = out / "decoder" / "model.ref.onnx"
    onnx.checker.check_model(str(reference))
    session(reference)
    assert ir.load(reference).opset_imports[""] == 21


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ExportConfig(max_seq_len=4096), "max_seq_len = 4096"),
        (ExportConfig(max_batch=10**6), "max_batch = 1000000"),
    ],
)
def test_sizes_beyond_the_target_or_the_model(models, tmp_path, config, message):
    with pytest.raises(UserError, match=message):
        pipeline.export_onnx(models[1].path, tmp_path / "onnx", load_target("rtx"), config, Silent())
    assert not (tmp_path / "onnx").exists()


def test_refusals_leave_nothing(models, tmp_path, no_trace):
    with pytest.raises(UnsupportedError, match="bfloat16"):
        pipeline.export_onnx(models[1].path, tmp_path / "onnx", load_target("rtx"), CONFIG, Silent(), dtype="bfloat16")
    model, _ = quantized_checkpoint(tmp_path, num_hidden_layers=1)
    file = model.path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.language_model.norm.weight"][3] = 1e6
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match="norm.weight holds values up to 1e"):
        pipeline.export_onnx(open_model(model.path).path, tmp_path / "onnx", load_target("rtx"), CONFIG, Silent())
    assert not (tmp_path / "onnx").exists()
