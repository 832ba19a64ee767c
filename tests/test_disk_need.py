"""What a run needs of the disk: computed before it starts, near what it takes, and refused with the numbers."""

from __future__ import annotations

import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest

from ecmfq_export import disk_need, workflow
from ecmfq_export.config import ExportConfig, QuantConfig
from ecmfq_export.errors import UserError
from ecmfq_export.graph.pipeline import export_onnx
from ecmfq_export.models.moe_vlm import open_model
from ecmfq_export.progress import Silent
from ecmfq_export.target import load_target
from tests.stages.common import SETTINGS, make_pool
from tests.tiny_models import make_qwen3_vl_moe

RTN = QuantConfig(method="rtn")
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Wide enough that weights outweigh file headers and JSON.
    return make_qwen3_vl_moe(tmp_path_factory.mktemp("model"), hidden_size=256, moe_intermediate_size=384, mlp_only_layers=[0])


def _bytes(directory: Path, pattern: str = "*") -> int:
    return sum(path.stat().st_size for path in directory.rglob(pattern) if path.is_file())


@pytest.mark.parametrize("config", [RTN, replace(RTN, attention="w4a8"), replace(RTN, group_size=128, lm_head="w8a8", attention="fp16")])
def test_the_quantized_checkpoint_takes_what_was_computed(config: QuantConfig, model: Path, tmp_path: Path) -> None:
    (need,) = disk_need.quantize_needs(open_model(model), config, None, tmp_path / "quantized", 0)
    out = workflow.quantize_model(model, None, tmp_path / "quantized", config, Silent())
    assert need.result == pytest.approx(_bytes(out, "*.safetensors"), rel=0.03)


def test_graphs_take_what_was_computed(model: Path, tmp_path: Path) -> None:
    quantized = workflow.quantize_model(model, None, tmp_path / "quantized", RTN, Silent())
    target = load_target("rtx")
    before, after = (disk_need.export_needs(open_model(path), RTN, target, tmp_path, True)[0] for path in (model, quantized))
    assert before == after, "the same is computed before and after quantizing"
    out = export_onnx(quantized, tmp_path / "onnx", target, ExportConfig(max_seq_len=64), Silent())
    weights = sum(_bytes(out, pattern) for pattern in ("*.data", "embed_tokens.safetensors"))
    assert before.result - disk_need._SMALL == pytest.approx(weights, rel=0.03)


def test_activations_grow_with_the_pool_and_stay_in_memory_where_they_fit(model: Path, tmp_path: Path) -> None:
    opened, prompts = open_model(model), disk_need.Prompts(1000, 500.0, 1e5)
    small, large = (disk_need.quantize_needs(opened, SETTINGS, replace_count(prompts, count), tmp_path / "q", 0) for count in (1000, 4000))
    assert [need.name for need in small] == ["calibrate", "smooth", "quantize"]
    assert large[0].scratch == pytest.approx(4 * small[0].scratch, rel=0.01)
    assert [need.scratch for need in large[1:]] == [need.scratch for need in small[1:]], "the chosen samples are as many"
    held = disk_need.quantize_needs(opened, SETTINGS, prompts, tmp_path / "q", 1 << 40)
    assert all(0 < a.scratch < b.scratch for a, b in zip(held, small, strict=True)), "states to resume from are always written"


def replace_count(prompts: disk_need.Prompts, count: int) -> disk_need.Prompts:
    return replace(prompts, count=count)


def test_too_little_space_is_said_with_the_numbers_before_anything_is_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, bundle = make_pool(tmp_path / "pool"), tmp_path / "deep" / "bundle"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - 10**6, 10**6))
    for run in (lambda: workflow.quantize_model(model, pool, bundle / "quantized", SETTINGS, Silent()),
                lambda: workflow.export(model, pool, bundle, load_target("rtx"), SETTINGS, ExportConfig(), Silent())):
        with pytest.raises(UserError, match=r"needs about [\d.]+ GB of disk .* 0\.00 GB are free: .*quantize [\d.]+ GB") as caught:
            run()
        assert "num_samples" in caught.value.fix
        assert not bundle.parent.exists()


def test_what_is_written_already_is_not_asked_for_again(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = workflow.quantize_model(model, None, tmp_path / "quantized", RTN, Silent())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 0))
    workflow.quantize_model(model, None, out, RTN, Silent())
    with pytest.raises(UserError, match="GB are free"):
        workflow.quantize_model(model, None, tmp_path / "elsewhere", RTN, Silent())
