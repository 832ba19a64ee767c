"""The whole way on the trained example: what README's first command promises, read back from what it wrote."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from ecmfq_export import bundle
from ecmfq_export.engine.engine_file import read_engine_file
from ecmfq_export.engine.ort_runner import OrtRunner
from ecmfq_export.models.inputs import prepare_inputs
from ecmfq_export.models.moe_vlm import MoEVLM, open_model
from ecmfq_export.models.torch_decoder import load_layer, run_decoder
from ecmfq_export.runtime.generate import Generator
from ecmfq_export.runtime.sample import ProcessedSample
from ecmfq_export.stages.fold import LayerScales, fold_layer
from ecmfq_export.stages.smooth import load_scales
from ecmfq_export.stages.streams import ActivationStore, add_deepstack, prepare_batches
from tests.e2e.conftest import CHECKPOINT, QUESTIONS, command_line, export_arguments

pytestmark = pytest.mark.tensorrt

NEW_TOKENS = 24


@pytest.fixture(scope="module")
def questions() -> list[dict]:
    return [json.loads(line) for line in QUESTIONS.read_text().splitlines()]


@pytest.fixture(scope="module")
def generator(bundle_dir: Path) -> Generator:
    return Generator(bundle_dir / "onnx", lambda path: OrtRunner(path))


@pytest.fixture(scope="module")
def quantized(bundle_dir: Path) -> MoEVLM:
    return open_model(bundle_dir / "stages" / "quantized")


def test_the_bundle_is_complete_and_its_hashes_hold(bundle_dir: Path) -> None:
    manifest = bundle.read_manifest(bundle_dir, "bundle")
    bundle.verify(bundle_dir, manifest)
    assert {"onnx/decoder/model.onnx", "onnx/vision/model.onnx", "engines/rtx/decoder.engine", "engines/rtx/vision.engine",
            "engines/rtx/libecmfq_plugin.so", "report/report.html", "report/report.json"} <= set(manifest.files)
    assert not [p for p in bundle_dir.rglob("*.partial")]


def test_the_engine_holds_one_plugin_node_for_each_moe_layer(bundle_dir: Path, quantized: MoEVLM) -> None:
    """From the engine file's own bytes and from the build log, not from what the exporter says."""
    decoder = read_engine_file(bundle_dir / "engines" / "rtx" / "decoder.engine")
    layers = quantized.spec.moe_layers
    assert len(layers) == 4
    assert [node.plugin for node in decoder.plugin_nodes] == ["EcmfqRoutedMoE"] * len(layers)
    assert len({node.layer for node in decoder.plugin_nodes}) == len(layers)
    assert decoder.num_custom_layers == len(layers)
    assert decoder.compute_capabilities == (86, 89, 120)
    assert decoder.plugin_library_sha256 == bundle.sha256_file(bundle_dir / "engines" / "rtx" / "libecmfq_plugin.so")
    log = (bundle_dir / "engines" / "rtx" / "decoder.build.log").read_text()
    assert "EcmfqRoutedMoE" in log
    assert read_engine_file(bundle_dir / "engines" / "rtx" / "vision.engine").num_custom_layers == 0


def test_model_onnx_has_plugin_nodes_and_no_function(bundle_dir: Path) -> None:
    model = onnx.load(bundle_dir / "onnx" / "decoder" / "model.onnx", load_external_data=False)
    assert sum(node.op_type == "EcmfqRoutedMoE" for node in model.graph.node) == 4
    assert not model.functions
    reference = onnx.load(bundle_dir / "onnx" / "decoder" / "model.ref.onnx", load_external_data=False)
    assert "EcmfqRoutedMoE" in {function.name for function in reference.functions}


def test_the_report_passes_and_keeps_its_promises(exported: tuple[Path, str]) -> None:
    directory, printed = exported
    report = json.loads((directory / "report" / "report.json").read_text())
    assert report["passed"]
    assert report["accuracy"]["float"]["all"]["total"] >= 500
    assert report["accuracy"]["float"]["all"]["correct"] >= 0.95 * report["accuracy"]["float"]["all"]["total"]
    assert report["retention"]["quantized"] >= 0.97
    assert report["retention"]["onnx"] >= 0.97
    assert report["bytes"]["layers"]["w4a8"]["ratio"] <= 0.26
    assert report["bytes"]["artifacts"], "the whole-artifact figure is there too"
    page = (directory / "report" / "report.html").read_text()
    assert not re.search(r'(?:src|href)="(?!data:|#)', page), "the page is self-contained"
    assert "accuracy" in printed.lower()


def test_the_strict_setting_keeps_the_promises_too(tmp_path: Path) -> None:
    """With attention at W4A8 every quantized layer counts: all of them below 26% of float16, and accuracy is kept."""
    done = command_line(*export_arguments(tmp_path / "bundle"), "--attention", "w4a8", "--no-build")
    assert done.returncode == 0, done.stderr + done.stdout
    report = json.loads((tmp_path / "bundle" / "report" / "report.json").read_text())
    assert set(report["bytes"]["layers"]) == {"w4a8", "quantized"}
    assert report["bytes"]["layers"]["quantized"]["ratio"] <= 0.26
    assert report["retention"]["quantized"] >= 0.97
    assert report["retention"]["onnx"] >= 0.97
    model = open_model(tmp_path / "bundle" / "stages" / "quantized")
    weights = [model.qtensor(name) for name in model.names() if model.recipe(name) != "float"]
    assert {weight.num_bits for weight in weights} == {4}
    # Counted again from the tensors: two integers a byte, and a float16 scale for each output channel.
    stored = sum(weight.qvalue.numel() // 2 + 2 * weight.scale.numel() for weight in weights)
    assert stored == report["bytes"]["layers"]["quantized"]["stored"]


def _samples(generator: Generator, questions: list[dict], with_answer: bool = False) -> list[ProcessedSample]:
    return [generator.processor.sample(q["question"], [QUESTIONS.parent / q["image"]] if q.get("image") else [],
                                       q["answer"] if with_answer else None) for q in questions]


@pytest.mark.parametrize("source", ["found by ECS", "drawn at random"])
def test_folding_keeps_every_token_with_its_experts(
    source: str, bundle_dir: Path, generator: Generator, questions: list[dict]
) -> None:
    """After smoothing, before quantization: the same top-k ids in every layer for every token of 100 held-out prompts.

    The example has no outlier channels, so ECS's held-out gate may accept few scales or none; random powers of two make sure
    that every kind of fold is seen on trained weights.
    """
    model = open_model(CHECKPOINT)
    original = [load_layer(model, index) for index in range(model.spec.num_layers)]
    if source == "found by ECS":
        scales = load_scales(bundle_dir / "stages" / "smoothing")
    else:
        draw = torch.Generator().manual_seed(0)
        scales = {index: LayerScales(attention_input=_powers(draw, 128), value=_powers(draw, 64), moe_input=_powers(draw, 128),
                                     down=_powers(draw, 16, 96)) for index in range(len(original))}
    folded = [fold_layer(layer, scales.get(index, LayerScales())) for index, layer in enumerate(original)]

    def routes(layers) -> list[torch.Tensor]:
        found = []
        with torch.no_grad(), ActivationStore() as store:
            for batch in list(prepare_batches(model, _samples(generator, questions[:100]), store)):
                hidden = store.get(f"hidden/{batch.index}")
                for index, layer in enumerate(layers):
                    attended, _ = layer.attend(layer.attention_input(hidden), batch.cos, batch.sin, batch.mask)
                    x = layer.moe_input(hidden + attended)
                    found.append(layer.route(x.flatten(0, 1)).topk_ids)
                    hidden = add_deepstack(hidden + attended + layer.mlp(x), index, batch, store)
        return found

    for before, after in zip(routes(original), routes(folded), strict=True):
        assert torch.equal(before, after)


def _powers(draw: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.exp2(torch.randint(-5, 6, shape, generator=draw).float())


def _greedy(model: MoEVLM, sample: ProcessedSample, eos: tuple[int, ...]) -> list[int]:
    """Greedy tokens of the PyTorch reference, every step from the start: slow, and without a cache to be wrong about."""
    tokens: list[int] = []
    ids = sample.input_ids
    while len(tokens) < NEW_TOKENS and (not tokens or tokens[-1] not in eos):
        grown = ProcessedSample(np.concatenate([ids, np.array(tokens, ids.dtype)]), sample.pixel_values, sample.image_grid_thw,
                                np.zeros(len(ids) + len(tokens), bool))
        with torch.no_grad():
            logits = run_decoder(model, prepare_inputs(model, [grown]))
        tokens.append(int(logits[0, -1].argmax()))
    return tokens


def test_onnx_runtime_writes_the_same_text_as_pytorch(quantized: MoEVLM, generator: Generator, questions: list[dict]) -> None:
    """Twenty prompts, ten of them captions of many tokens; at least nineteen texts are equal token for token.

    The graphs compute in float16 and the reference in float32. That moves an int8 activation by one step here and there, which
    shows in a token only where two logits are almost level: one such prompt in twenty is allowed.
    """
    asked = questions[:10] + [q | {"question": "Describe the image."} for q in questions[10:20]]
    samples = _samples(generator, asked)
    eos = generator.processor.eos_token_ids
    reference = [_greedy(quantized, sample, eos) for sample in samples]
    # In batches of two, so that rows of different lengths and image sizes share a call.
    written = [list(one.token_ids) for i in range(0, 20, 2) for one in generator.generate_batch(samples[i : i + 2], NEW_TOKENS)]
    equal = sum(a == b for a, b in zip(reference, written, strict=True))
    assert equal >= 19, [(a, b) for a, b in zip(reference, written, strict=True) if a != b]


def test_run_answers_on_the_command_line(bundle_dir: Path, generator: Generator, questions: list[dict]) -> None:
    question = questions[0]
    image = QUESTIONS.parent / question["image"]
    done = command_line("run", str(bundle_dir), "--image", str(image), "--prompt", question["question"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == generator.generate(question["question"], [image]).strip()
    figures = re.search(r"prompt (\d+) tokens, first token after ([\d.]+) s; (\d+) tokens, .*; memory: (\d+) MiB peak$", done.stderr, re.M)
    assert figures, done.stderr
    sample = generator.processor.sample(question["question"], [image])
    assert int(figures[1]) == sample.length and float(figures[2]) > 0 and int(figures[4]) > 50
    assert int(figures[3]) == len(generator.generate_batch([sample])[0].token_ids)


def test_inspect_shows_bundle_and_engine(bundle_dir: Path) -> None:
    done = command_line("inspect", str(bundle_dir), "--verify", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["verified"]
    done = command_line("inspect", str(bundle_dir / "engines" / "rtx" / "decoder.engine"), "--json")
    assert len(json.loads(done.stdout)["plugin_nodes"]) == 4


def test_pages_of_the_bundle(bundle_dir: Path, tmp_path: Path) -> None:
    """Inspected and compared with itself: every layer has bytes and errors, nothing differs, pages need nothing from outside."""
    done = command_line("inspect", str(bundle_dir), "--json", "--html", str(tmp_path / "a.html"))
    assert done.returncode == 0, done.stderr
    layers = json.loads(done.stdout)["contents"]["layers"]
    assert [row["mlp"] for row in layers] == ["int4"] * 4
    assert all(row["sqnr_db"] > 10 and row["errors"] for row in layers)
    done = command_line("compare", str(bundle_dir), str(bundle_dir), "--json", "--html", str(tmp_path / "b.html"))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["settings"] == []
    assert [engine["plugin nodes"] for engine in found["first"]["engines"]] == [4, 0]
    for name in ("a", "b"):
        page = (tmp_path / f"{name}.html").read_text()
        assert not re.search(r'(?:src|href)="(?!data:|#)', page)
        assert "Errors by layer" in page


def test_exporting_again_does_nothing(bundle_dir: Path) -> None:
    """Every stage is skipped, and no byte changes."""
    before = {p: p.stat().st_mtime_ns for p in bundle_dir.rglob("*") if p.is_file() and p.name != bundle.MANIFEST}
    done = command_line(*export_arguments(bundle_dir))
    assert done.returncode == 0, done.stderr
    after = {p: p.stat().st_mtime_ns for p in bundle_dir.rglob("*") if p.is_file() and p.name != bundle.MANIFEST}
    assert after == before


def test_a_changed_engine_is_not_taken(bundle_dir: Path) -> None:
    engine = bundle_dir / "engines" / "rtx" / "vision.engine"
    original = engine.read_bytes()
    try:
        engine.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
        done = command_line("inspect", str(bundle_dir), "--verify")
        assert done.returncode == 2
        assert "vision.engine" in done.stderr
    finally:
        engine.write_bytes(original)
