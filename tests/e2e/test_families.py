"""The whole way on a small random model of every further family: calibrate, smooth, quantize, export, build, validate, generate."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch

from ecmfq_export import workflow
from ecmfq_export.config import ExportConfig, QuantConfig
from ecmfq_export.engine.engine_file import read_engine_file
from ecmfq_export.models.inputs import prepare_inputs
from ecmfq_export.models.moe_vlm import open_model
from ecmfq_export.models.torch_decoder import run_decoder
from ecmfq_export.progress import Silent
from ecmfq_export.runtime.processor import Processor
from ecmfq_export.target import Target, load_target
from tests.stages.common import make_pool
from tests.tiny_families import FAMILIES

pytestmark = pytest.mark.tensorrt


class Notes(Silent):
    """Keeps what a person would be told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def track(self, items: Iterable, description: str, total: int | None = None) -> Iterator:
        yield from items

    def note(self, text: str) -> None:
        self.lines.append(text)


def target() -> Target:
    """One capability of the rtx target: what is tested is the family's graphs."""
    return dataclasses.replace(load_target("rtx"), compute_capabilities=(86,))


@pytest.fixture(scope="module", params=[name for name in FAMILIES if not name.endswith("_thinker")])
def exported(request, tmp_path_factory) -> tuple[Path, list[str]]:
    """A bundle beside its model, and what was noted on the way."""
    root, progress = tmp_path_factory.mktemp("family-e2e"), Notes()
    options = {"speech": True} if request.param == "qwen3_omni_moe" else {}
    FAMILIES[request.param].make(root / "model", seed=1, **options)
    make_pool(root / "pool", size=8)
    report = workflow.export(
        root / "model", root / "pool", root / "bundle", target(), QuantConfig(num_samples=5, seed=3),
        ExportConfig(max_seq_len=128, max_image_patches=256), progress, evaluation=make_pool(root / "heldout", 4, 5) / "samples.jsonl",
    )
    assert report["passed"] and report["model"]["family"] == request.param
    return root / "bundle", progress.lines


def test_the_engine_holds_one_plugin_node_for_each_moe_layer(exported) -> None:
    bundle_dir, _ = exported
    engine = read_engine_file(bundle_dir / "engines" / "rtx" / "decoder.engine")
    spec = open_model(bundle_dir / "stages" / "quantized").spec
    assert [node.plugin for node in engine.plugin_nodes] == ["EcmfqRoutedMoE"] * len(spec.moe_layers) != []
    facts = json.loads((bundle_dir / "onnx" / "runtime.json").read_text())
    assert tuple(facts["eos_token_ids"]) == Processor(bundle_dir / "onnx").eos_token_ids != ()
    moe = facts["moe"]
    mlp = spec.layers[spec.moe_layers[0]].mlp
    assert (moe["num_experts"], moe["top_k"], moe["num_shared_experts"]) == (mlp.num_experts, mlp.top_k, mlp.num_shared_experts)


def test_what_is_not_run_is_named_and_kept(exported) -> None:
    """The parts that text and images do not need are told of at each stage that meets them, and quantization copies them."""
    bundle_dir, notes = exported
    original, quantized = open_model(bundle_dir.parent / "model"), open_model(bundle_dir / "stages" / "quantized")
    told = [line for line in notes if line.startswith("text and images do not need")]
    assert quantized.unused == original.unused and len(told) == (2 if original.unused else 0)
    for prefix in original.unused_parts():
        assert all(prefix in line for line in told)
    for name in original.unused:
        assert (quantized.checkpoint.load(name) == original.checkpoint.load(name)).all()


@torch.no_grad()
def test_onnx_runtime_answers_as_pytorch(exported) -> None:
    """The bundle's float16 graphs, from an image file to text: the first token is PyTorch's wherever that one is not a near tie."""
    bundle_dir, _ = exported
    generator, pool = workflow.open_generator(bundle_dir, threads=1), bundle_dir.parent / "pool"
    rows = [json.loads(line) for line in (pool / "samples.jsonl").read_text().splitlines()]
    samples = [generator.processor.sample(row["text"], [pool / row["image"]] if "image" in row else []) for row in rows]
    quantized = open_model(bundle_dir / "stages" / "quantized")
    inputs = prepare_inputs(quantized, samples)
    logits = run_decoder(quantized, inputs)[torch.arange(len(samples)), inputs.lengths - 1]
    best = logits.topk(2).values
    clear = ((best[:, 0] - best[:, 1]) / logits.std(-1) > 0.15).tolist()
    written = [one.token_ids for i in range(0, len(samples), 2) for one in generator.generate_batch(samples[i : i + 2], 3)]
    ends = generator.processor.eos_token_ids
    assert sum(clear) >= 3
    for tokens, expected, is_clear in zip(written, logits.argmax(-1).tolist(), clear, strict=True):
        assert not is_clear or list(tokens[:1]) == ([] if expected in ends else [expected])
