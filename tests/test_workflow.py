"""The way from a checkpoint to a report where the model is rotated first: everything compares with the original."""

import types
from pathlib import Path

import pytest

from ecmfq_export import bundle, workflow
from ecmfq_export.config import ExportConfig, QuantConfig
from ecmfq_export.errors import BuildError, BundleError, UnsupportedError, UserError
from ecmfq_export.graph.pipeline import export_onnx
from ecmfq_export.models.moe_vlm import open_model
from ecmfq_export.models.rotated import RotatedModel
from ecmfq_export.progress import Silent
from ecmfq_export.runtime.processor import Processor
from ecmfq_export.target import load_target
from ecmfq_export.validate import html_report
from ecmfq_export.validate.pipeline import validate
from ecmfq_export.validate.prompts import load_prompts
from ecmfq_export.validate.report import failures, verdict
from ecmfq_export.validate.torch_lockstep import Lockstep
from tests.stages.common import plant_outliers
from tests.tiny_models import make_qwen3_vl_moe

RTN = QuantConfig(method="rtn", rotate="residual", seed=4)


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Path:
    directory = make_qwen3_vl_moe(tmp_path_factory.mktemp("tied"), seed=3, tie_word_embeddings=True)
    plant_outliers(directory)
    return directory


@pytest.fixture(scope="module")
def quantized(tied, tmp_path_factory) -> Path:
    return workflow.quantize_model(tied, None, tmp_path_factory.mktemp("out") / "quantized", RTN, Silent())


def test_the_rotated_checkpoint_lies_beside_and_is_what_was_quantized(tied, quantized):
    rotated = quantized.with_name("rotated")
    assert bundle.read_manifest(rotated, "rotate").inputs == {"model": bundle.fingerprint(tied)}
    assert bundle.read_manifest(quantized, "quantize").inputs == {"model": bundle.fingerprint(rotated)}
    stamp = (rotated / "manifest.json").stat().st_mtime_ns
    workflow.quantize_model(tied, None, quantized, RTN, Silent())
    assert (rotated / "manifest.json").stat().st_mtime_ns == stamp, "nothing changed, so nothing is run again"


def test_hidden_states_are_compared_in_the_original_basis(tied, quantized):
    """Rotating alone changes rounding only; quantizing keeps hidden states near the original's, which another basis would not."""
    original = open_model(tied)
    prompts = load_prompts(Processor(tied), None, 0, 0).samples
    lockstep = Lockstep(original, open_model(quantized.with_name("rotated")))
    lockstep.answer_logits(prompts, record=True)
    assert all(record.hidden.sqnr_db > 90 and record.same == record.picks for record in lockstep.layers)
    lockstep = Lockstep(original, open_model(quantized))
    lockstep.answer_logits(prompts, record=True)
    assert all(10 < record.hidden.sqnr_db < 60 for record in lockstep.layers)


def test_export_and_validation_against_the_original(tied, quantized, tmp_path, monkeypatch):
    monkeypatch.setattr(html_report, "render", lambda report, images: "")
    onnx = export_onnx(quantized, tmp_path / "onnx", load_target("rtx"), ExportConfig(max_seq_len=192), Silent(), dtype="float32")
    report = validate(tied, quantized, onnx, tmp_path / "report", data=None, progress=Silent())
    assert verdict(report), failures(report)
    assert report["logits"]["quantized_vs_onnx"]["kl_mean"] < 1e-3 < 10 * report["logits"]["float_vs_quantized"]["kl_mean"]
    assert all(10 < layer["float_vs_quantized"]["sqnr_db"] < 60 for layer in report["layers"])


def test_lm_head_of_a_tied_model_can_be_quantized_once_rotated(tied, tmp_path):
    config = QuantConfig(method="rtn", lm_head="w8a8")
    with pytest.raises(UnsupportedError, match="tied embeddings"):
        workflow.quantize_model(tied, None, tmp_path / "a" / "quantized", config, Silent())
    config = QuantConfig(method="rtn", lm_head="w8a8", rotate="residual")
    out = workflow.quantize_model(tied, None, tmp_path / "b" / "quantized", config, Silent())
    assert open_model(out).recipe("lm_head.weight") == "w8a8"
    assert RotatedModel(open_model(tied), 0).recipe("lm_head.weight") == "float"


def test_what_kernels_do_not_do_is_refused_before_any_work(tied, tmp_path):
    config = QuantConfig(method="rtn", rotate="residual_online")
    with pytest.raises(UserError, match="the plugin has no such step"):
        workflow.export(tied, None, tmp_path / "bundle", load_target("rtx"), config, ExportConfig(), Silent())
    assert not (tmp_path / "bundle").exists()
    quantized = workflow.quantize_model(tied, None, tmp_path / "stages" / "quantized", config, Silent())
    for run in (lambda: export_onnx(quantized, tmp_path / "onnx", load_target("rtx"), ExportConfig(), Silent()),
                lambda: workflow.export(quantized, None, tmp_path / "bundle", load_target("rtx"), RTN, ExportConfig(), Silent())):
        with pytest.raises(UnsupportedError, match=r"layers\.0\.mlp\.experts\.down_proj.*blocks of 32; the plugin has no such step"):
            run()
    assert not (tmp_path / "onnx").exists() and not (tmp_path / "bundle").exists()


def test_engines_answer_behind_the_same_interface(quantized, tmp_path, monkeypatch):
    """Which engine is opened for which graph; ONNX Runtime computes in the engines' place, since this machine has no GPU."""
    from ecmfq_export.engine import device, trt_module, trt_runner
    from ecmfq_export.engine.graph_file import load_graph
    from ecmfq_export.engine.ort_runner import OrtRunner
    from ecmfq_export.engine.plugin_library import ABI_VERSION

    monkeypatch.setattr(trt_module, "load_module", lambda engine: types.SimpleNamespace(__version__="1.7.1"))
    target, opened = load_target("rtx"), []
    root = tmp_path / "bundle"
    export_onnx(quantized, root / "onnx", target, ExportConfig(max_seq_len=64), Silent())
    prompt = "What is this?"
    plain = workflow.open_generator(root).generate(prompt, max_new_tokens=4)
    packed = [tensor.name for tensor in load_graph(root / "onnx" / "decoder" / "model.onnx").graph.initializer
              if tensor.name.endswith(".qweight") and tensor.external_data]
    with pytest.raises(BundleError, match=r"no engine at .*rtx/decoder\.engine\n.*build"):
        workflow.open_generator(root, target=target)
    for graphs in ("of another model", bundle.fingerprint(root / "onnx")):
        with bundle.write_stage(root / "engines" / "rtx", "build", {}, {"onnx": graphs}) as (work, info):
            info["plugin_abi"] = ABI_VERSION
            for part in ("decoder", "vision"):
                (work / f"{part}.engine").write_text(part)
                info[part] = {"runtime": "tensorrt_rtx", "runtime_version": "1.7.1.116", "compute_capabilities": [86, 89, 120],
                              "plugin_nodes": [], "plugin_library_sha256": "", "sha256": bundle.sha256_file(work / f"{part}.engine"),
                              "build": {"weight_inputs": dict.fromkeys(packed, {})} if part == "decoder" else {}}
        if graphs == "of another model":
            with pytest.raises(BundleError, match="built from other graphs"):
                workflow.open_generator(root, target=target)

    class InPlace(OrtRunner):
        device_bytes = 5

        def __init__(self, path, for_target, weights):
            opened.append((path.read_text(), for_target.name))
            assert sorted(weights) == sorted(packed) and {array.dtype.name for array in weights.values()} == {"int8"}
            super().__init__(root / "onnx" / path.stem / "model.ref.onnx")

    monkeypatch.setattr(trt_runner, "TrtRunner", InPlace)
    with pytest.raises(BuildError, match="needs a GPU of compute capability"):
        workflow.open_generator(root, target=target)
    monkeypatch.setattr(device, "current_device", lambda: device.Device("L4", 89, 58, 24 << 30, "13.0"))
    generator = workflow.open_generator(root, target=target)
    assert generator.generate(prompt, max_new_tokens=4) == plain
    assert packed and opened == [("decoder", "rtx")] and generator.session.device_bytes == 5
    (root / "engines" / "rtx" / "vision.engine").write_text("changed")
    with pytest.raises(BundleError, match="sha256"):
        workflow.open_generator(root, target=target)


def test_missing_data_is_said_before_rotating(tied, tmp_path):
    with pytest.raises(UserError, match="needs calibration samples"):
        workflow.quantize_model(tied, None, tmp_path / "quantized", QuantConfig(rotate="residual"), Silent())
    assert not (tmp_path / "rotated").exists()
