"""The whole stage on a tiny random model: PyTorch twice, ONNX Runtime once, and what is said where they differ."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ecmfq_export.config import ExportConfig
from ecmfq_export.engine.ort_runner import OrtRunner
from ecmfq_export.errors import UserError
from ecmfq_export.graph.pipeline import export_onnx
from ecmfq_export.models.inputs import prepare_inputs
from ecmfq_export.models.moe_vlm import MoEVLM
from ecmfq_export.models.torch_decoder import load_layer, run_decoder
from ecmfq_export.progress import Silent
from ecmfq_export.runtime.generate import Generator
from ecmfq_export.runtime.processor import Processor
from ecmfq_export.runtime.sample import ProcessedSample
from ecmfq_export.target import load_target
from ecmfq_export.validate import html_report
from ecmfq_export.validate.artifact_bytes import artifact_bytes, checkpoint_bytes
from ecmfq_export.validate.pipeline import validate
from ecmfq_export.validate.prompts import load_prompts
from ecmfq_export.validate.report import failures, verdict
from ecmfq_export.validate.torch_lockstep import Lockstep, batch_rows
from tests.graph.checkpoints import quantized_checkpoint
from tests.tiny_models import make_qwen3_vl_moe, random_sample


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[MoEVLM, MoEVLM]:
    return quantized_checkpoint(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def exported(models, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("out") / "onnx"
    return export_onnx(models[1].path, out, load_target("rtx"), ExportConfig(max_seq_len=192), Silent(), dtype="float32")


@pytest.fixture
def no_page(monkeypatch):
    """Drawing takes seconds; tests of numbers do without."""
    monkeypatch.setattr(html_report, "render", lambda report, images: "")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Questions and captions about noise; a random model gets all of them wrong."""
    directory = tmp_path_factory.mktemp("data")
    names = [f"{i}.png" for i in range(4)]
    for i, name in enumerate(names):
        pixels = np.random.default_rng(i).integers(0, 256, (12 + 8 * i, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(directory / name)
    questions = [{"image": n, "question": f"What <{n}>?", "answer": "a & b", "type": t} for n, t in zip(names, "aabb", strict=True)]
    questions.append({"question": "no image", "answer": "none", "type": "text"})
    captions = [{"image": n, "text": f"noise {n}", "distractors": ["nothing"] * i} for i, n in enumerate(names)]
    for name, rows in (("questions.jsonl", questions), ("captions.jsonl", captions)):
        (directory / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def _validate(models, exported, out, data=None, **options):
    return validate(models[0].path, models[1].path, exported, out, data=data, progress=Silent(), **options)


@pytest.fixture(scope="module")
def report(models, exported, data, tmp_path_factory):
    return _validate(models, exported, tmp_path_factory.mktemp("report") / "report", data, limit=0)


def test_report_of_a_faithful_export_passes(report):
    assert verdict(report) and report["passed"], failures(report)
    logits = report["logits"]["quantized_vs_onnx"]
    assert logits["kl_mean"] < 1e-3 and logits["positions"] == 4 * 6 + 5
    # A token whose integers all round alike differs by float32 rounding alone; most do.
    assert all(layer["quantized_vs_onnx"]["median_error"] < 1e-5 for layer in report["layers"])
    assert all(row["median_error"] < 1e-4 for row in report["vision"]) and len(report["vision"]) == 2
    assert report["logits"]["prefill_vs_decode"]["kl_mean"] < 1e-3
    assert all(0 < layer["float_vs_quantized"]["sqnr_db"] < 60 for layer in report["layers"])
    assert set(report["accuracy"]["float"]) == {"all", "a", "b", "text"} and report["accuracy"]["float"]["all"]["total"] == 5


def test_experts_are_counted_by_modality(report, models):
    spec = models[0].spec
    processor = Processor(models[0].path)
    usage = report["layers"][0]["expert_usage"]
    assert len(usage["text"]) == spec.layers[0].mlp.num_experts
    image_tokens = sum(usage["vision"]) / spec.layers[0].mlp.top_k
    assert image_tokens == int(image_tokens) > 0
    assert sum(usage["text"]) > 0 and processor.image_token_id == spec.image_token_id
    assert 0.5 < report["layers"][0]["same_experts"] <= 1.0


def test_files_of_the_stage(report, models, exported, data, tmp_path):
    out = tmp_path / "report"
    first = _validate(models, exported, out, data, limit=3, candidates=0)
    assert {p.name for p in out.iterdir()} == {"report.json", "report.html", "manifest.json"}
    assert json.loads((out / "report.json").read_text()) == first
    assert first["retrieval"] is None and first["settings"]["items"] == 3
    page = (out / "report.html").read_text()
    assert "What &lt;0.png&gt;?" in page and "What <0.png>" not in page
    stamp = (out / "manifest.json").stat().st_mtime_ns
    assert _validate(models, exported, out, data, limit=3, candidates=0) == first
    assert (out / "manifest.json").stat().st_mtime_ns == stamp, "nothing changed, so nothing is run again"


def test_retrieval_needs_single_token_yes_and_no(report, models, data):
    # The byte tokenizer spells "yes" in three tokens.
    assert report["retrieval"] is None
    assert len(load_prompts(Processor(models[0].path), data, 0, 16).captions) == 4


def test_retrieval(models, exported, data, tmp_path, monkeypatch, no_page):
    monkeypatch.setattr("ecmfq_export.validate.pipeline.yes_no_ids", lambda processor: (88, 77))
    report = _validate(models, exported, tmp_path / "report", data, limit=1, candidates=3)
    recalls = report["retrieval"]["recalls"]
    assert report["retrieval"]["candidates"] == 3 and set(recalls) == {"float", "quantized", "onnx"}
    assert report["retrieval"]["prompts"] == 9 + sum(len(c.distractors) for c in load_prompts(
        Processor(models[0].path), data, 0, 3).captions)  # fmt: skip
    assert set(recalls["float"]) == {"image_to_text_r@1", "text_to_image_r@1", "mean", "near_duplicate"}


def test_without_data_made_up_prompts_are_compared(models, exported, tmp_path, no_page):
    report = _validate(models, exported, tmp_path / "report")
    assert verdict(report), failures(report)
    assert report["accuracy"] is None and report["settings"]["positions"] == "tokens of made-up answers"


def test_a_tampered_quantized_model_fails_by_name(models, exported, tmp_path):
    bad = shutil.copytree(models[1].path, tmp_path / "bad")
    changed = 0
    for file in bad.glob("*.safetensors"):
        tensors = load_file(file)
        for name in tensors:
            if ".layers.1." in name and name.endswith("down_proj.weight_scale"):
                tensors[name] *= 3
                changed += 1
        save_file(tensors, file, {"format": "pt"})
    assert changed == 8
    report = validate(models[0].path, bad, exported, tmp_path / "report", data=None, progress=Silent())
    assert not verdict(report) and not report["passed"]
    assert any(row.startswith("median KL, quantized PyTorch to ONNX Runtime") for row in failures(report))
    assert "Validation failed" in (tmp_path / "report" / "report.html").read_text()
    # The page shows where it starts: the layer before is equal, the damaged one is not.
    errors = [layer["quantized_vs_onnx"]["median_error"] for layer in report["layers"]]
    assert errors[0] < 1e-5 < 1e-2 < errors[1]


def test_directories_that_do_not_belong_together(models, exported, tmp_path):
    other = make_qwen3_vl_moe(tmp_path / "other", num_hidden_layers=1)
    with pytest.raises(UserError, match="different models"):
        validate(other, models[1].path, exported, tmp_path / "r", data=None, progress=Silent())
    with pytest.raises(UserError, match="no evaluation file"):
        _validate(models, exported, tmp_path / "r", tmp_path / "gone.jsonl")
    copy = shutil.copytree(exported, tmp_path / "onnx")
    (copy / "decoder" / "model.ref.onnx").unlink()
    (copy / "decoder" / "model.onnx").unlink()
    with pytest.raises(UserError, match=r"model\.onnx"):
        _validate(models, copy, tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_prompts_longer_than_the_graph_are_refused(models, exported, tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"question": "a" * 300, "answer": "b"}) + "\n")
    with pytest.raises(UserError, match="in a context of 192"):
        _validate(models, exported, tmp_path / "r", path)


def test_greedy_text_is_the_same_on_19_of_20_prompts(models, exported):
    """Rounding flips an int8 step where inputs differ by 1e-7, so one prompt in twenty may turn; more would be a mistake."""
    generator = Generator(exported, lambda path: OrtRunner(path, threads=1))
    sizes = [(8 + 4 * i, 40 - 2 * i) for i in range(10)]
    samples = [generator.processor.sample(f"What is number {i}?", [Image.new("RGB", size, (20 * i, 90, 255 - 20 * i))])
               for i, size in enumerate(sizes)]  # fmt: skip
    samples += [generator.processor.sample(f"{'very ' * i}short text?") for i in range(10)]
    ours = [list(r.token_ids) for r in generator.generate_batch(samples, 6)]
    theirs: list[list[int]] = [[] for _ in samples]
    layers = [load_layer(models[1], i) for i in range(models[1].spec.num_layers)]
    vision = models[1].vision_module()
    for _ in range(6):
        longer = [_append(s, tokens) for s, tokens in zip(samples, theirs, strict=True)]
        with torch.no_grad():
            logits = run_decoder(models[1], prepare_inputs(models[1], longer, vision=vision), layers)
        for row, sample in enumerate(longer):
            theirs[row].append(int(logits[row, sample.length - 1].argmax()))
    assert sum(a == b[: len(a)] for a, b in zip(ours, theirs, strict=True)) >= 19


def _append(sample: ProcessedSample, tokens: list[int]) -> ProcessedSample:
    ids = np.concatenate([sample.input_ids, np.array(tokens, np.int64)])
    return ProcessedSample(ids, sample.pixel_values, sample.image_grid_thw, np.zeros(len(ids), bool))


def test_lockstep_of_a_model_with_itself_is_equal(models):
    prompts = load_prompts(Processor(models[0].path), None, 0, 0).samples
    lockstep = Lockstep(models[0], models[0])
    first, second = lockstep.answer_logits(prompts, record=True)
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(r.hidden.sqnr_db == float("inf") and r.same == r.picks > 0 for r in lockstep.layers)
    alone, _ = lockstep.answer_logits(prompts[2:3])
    np.testing.assert_allclose(alone[0], first[2], atol=1e-4)


def test_batches_stay_within_their_budget():
    batches = batch_rows([5, 100, 7, 5, 300, 6], 40)
    assert sorted(sum(batches, [])) == list(range(6))
    assert all(len(b) == 1 or len(b) * max([5, 100, 7, 5, 300, 6][r] for r in b) <= 40 for b in batches)
    assert batches[0] == [0, 3, 5, 2]


def test_bytes_of_the_checkpoint_are_those_on_disk(models):
    sizes = checkpoint_bytes(models[1])
    on_disk = {n: t for file in models[1].path.glob("*.safetensors") for n, t in load_file(file).items()}
    assert sizes["whole"]["stored"] == sum(t.numel() * t.element_size() for t in on_disk.values())
    packed = sum(t.numel() * t.element_size() for n, t in on_disk.items() if n.endswith("weight_packed") and ".experts." in n)
    assert sizes["by_precision"]["int4"] == packed
    scales = sum(t.numel() * t.element_size() for n, t in on_disk.items() if n.endswith("weight_scale"))
    assert sizes["by_precision"]["scales"] == scales
    # Per expert: 192 x 128 and 128 x 96 values of half a byte, and 320 scales of two bytes.
    assert sizes["layers"]["w4a8"]["stored"] == 2 * 8 * ((192 * 128 + 128 * 96) // 2 + 2 * 320)
    assert sizes["layers"]["w4a8"]["ratio"] < 0.26
    assert checkpoint_bytes(models[0])["layers"] == {} and checkpoint_bytes(models[0])["whole"]["ratio"] == 2.0


def test_bytes_of_what_is_shipped(exported, tmp_path):
    copy = shutil.copytree(exported, tmp_path / "onnx")
    (copy / "decoder" / "experts.mma_s8.data").unlink(missing_ok=True)  # whichever layout the target has: first without it
    sizes = artifact_bytes(copy, None)
    skipped = sum((copy / name).stat().st_size for name in ("decoder/model.ref.onnx", "manifest.json"))
    assert sizes["onnx, all"] == sum(p.stat().st_size for p in copy.rglob("*") if p.is_file()) - skipped
    (copy / "decoder" / "experts.mma_s8.data").write_bytes(b"x" * 1000)
    row_major = (copy / "decoder" / "experts.row_major.data").stat().st_size
    assert artifact_bytes(copy, None)["onnx, all"] == sizes["onnx, all"] + 1000 - row_major
    engines = tmp_path / "engines" / "rtx"
    engines.mkdir(parents=True)
    (engines / "decoder.engine").write_bytes(b"x" * 77)
    assert artifact_bytes(exported, engines)["engines/rtx/decoder.engine"] == 77


def test_chunks_hold_bounded_tokens_and_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    from ecmfq_export.validate import pipeline

    samples = [random_sample(seed, text=4) for seed in range(10)]  # 4 tokens, two of them an answer's
    assert [int(s.answer_mask.sum()) for s in samples] == [2] * 10
    assert pipeline._chunks(samples, 100, 12) == [(0, 3), (3, 6), (6, 9), (9, 10)]
    monkeypatch.setattr(pipeline, "_LOGIT_BYTES", 4 * 3 * 100 * 5)  # five rows of three models
    assert pipeline._chunks(samples, 100) == [(0, 2), (2, 4), (4, 6), (6, 8), (8, 10)]
    assert pipeline._chunks(samples, 10**9)[:2] == [(0, 1), (1, 2)], "one prompt at least"
