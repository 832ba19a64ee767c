"""The whole way on a small random Kimi-VL in its published form: one command, and what it wrote is read back and run."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest

from ecmfq_export import bundle
from ecmfq_export.config import ExportConfig
from ecmfq_export.engine.engine_file import read_engine_file
from ecmfq_export.engine.ort_runner import OrtRunner
from ecmfq_export.graph.pipeline import export_onnx
from ecmfq_export.models.moe_vlm import open_model
from ecmfq_export.progress import Silent
from ecmfq_export.runtime.generate import Generator
from ecmfq_export.target import load_target
from tests.e2e.conftest import command_line
from tests.e2e.test_export import _greedy
from tests.stages.common import make_pool
from tests.tiny_kimi import make_kimi_vl

pytestmark = pytest.mark.tensorrt


@pytest.fixture(scope="module")
def bundle_dir(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("kimi-e2e")
    # float16's rounding moves a random model's logits by a KL of 0.01 to 0.06 (six seeds; 1e-5 in trained ones). With small logits
    # the report's limits mean what they mean for a trained model.
    make_kimi_vl(root / "model", seed=1, logit_gain=0.25)
    make_pool(root / "pool")
    make_pool(root / "heldout", size=8, seed=5)
    settings = [part for text in ("num_samples=10", "max_seq_len=128", "max_image_patches=256") for part in ("--set", text)]
    done = command_line("export", str(root / "model"), "--data", str(root / "pool"), "--target", "rtx", "-o", str(root / "bundle"),
                        "--evaluate", str(root / "heldout" / "samples.jsonl"), *settings)
    assert done.returncode == 0, done.stderr + done.stdout
    return root / "bundle"


def test_the_engine_holds_the_plugin_with_shared_experts(bundle_dir: Path) -> None:
    bundle.verify(bundle_dir, bundle.read_manifest(bundle_dir, "bundle"))
    engine = read_engine_file(bundle_dir / "engines" / "rtx" / "decoder.engine")
    assert [node.plugin for node in engine.plugin_nodes] == ["EcmfqRoutedMoE"] * 2 and engine.num_custom_layers == 2
    model = onnx.load(bundle_dir / "onnx" / "decoder" / "model.onnx", load_external_data=False)
    nodes = [node for node in model.graph.node if node.op_type == "EcmfqRoutedMoE"]
    attributes = [{a.name: a.i for a in node.attribute if a.name in ("num_experts", "top_k")} for node in nodes]
    assert attributes == [{"num_experts": 10, "top_k": 4}] * 2 and not model.functions
    moe = json.loads((bundle_dir / "onnx" / "runtime.json").read_text())["moe"]
    assert (moe["num_experts"], moe["top_k"], moe["num_shared_experts"]) == (8, 2, 2)


def test_the_report_passes(bundle_dir: Path) -> None:
    report = json.loads((bundle_dir / "report" / "report.json").read_text())
    assert report["passed"] and report["model"]["family"] == "kimi_vl"
    assert report["bytes"]["layers"]["w4a8"]["ratio"] <= 0.26


def test_onnx_runtime_writes_the_same_text_as_pytorch(bundle_dir: Path, tmp_path: Path) -> None:
    """Eight prompts in float32, since logits of a random model are too level for float16's rounding; one text may differ where an
    activation lies between two integers."""
    quantized = open_model(bundle_dir / "stages" / "quantized")
    graphs = export_onnx(quantized.path, tmp_path / "onnx", load_target("rtx"), ExportConfig(max_seq_len=128), Silent(), dtype="float32")
    generator = Generator(graphs, lambda path: OrtRunner(path))
    heldout = bundle_dir.parent / "heldout"
    rows = [json.loads(line) for line in (heldout / "samples.jsonl").read_text().splitlines()]
    samples = [generator.processor.sample(row["text"], [heldout / row["image"]] if "image" in row else []) for row in rows]
    # A random model may say the image placeholder, which no prompt that is run again may hold: it ends a text here.
    stop, tokens = (*generator.processor.eos_token_ids, generator.processor.image_token_id), 6
    reference = [_greedy(quantized, sample, stop)[:tokens] for sample in samples]
    written = [list(one.token_ids) for i in range(0, 8, 2) for one in generator.generate_batch(samples[i : i + 2], tokens)]
    assert sum(len(text) for text in reference) > 30
    assert sum(a == b[: len(a)] for a, b in zip(reference, written, strict=True)) >= 7


def test_run_answers_on_the_command_line(bundle_dir: Path) -> None:
    image = next((bundle_dir.parent / "heldout").glob("*.png"))
    done = command_line("run", str(bundle_dir), "--image", str(image), "--prompt", "What?", "--max-new-tokens", "4")
    assert done.returncode == 0, done.stderr
