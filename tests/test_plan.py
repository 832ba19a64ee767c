"""`export --dry-run`: everything is checked, the plan names what the run will do, and nothing is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from ecmfq_export.cli import main
from ecmfq_export.config import ExportConfig, QuantConfig
from ecmfq_export.graph.pipeline import export_onnx
from ecmfq_export.plan import plan_export
from ecmfq_export.plan_estimate import active_weights
from ecmfq_export.progress import Silent
from ecmfq_export.target import load_target
from ecmfq_export.workflow import quantize_model
from tests.tiny_models import make_qwen3_vl_moe

CALIBRATION = Path(__file__).parents[1] / "calib_data"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen3_vl_moe(tmp_path_factory.mktemp("model"))


def _tree(root: Path) -> list[str]:
    return sorted(p.relative_to(root).as_posix() for p in root.rglob("*"))


def test_a_plan_of_every_stage(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = _tree(model)
    out = tmp_path / "bundle"
    assert main(["export", str(model), "--data", str(CALIBRATION), "--target", "rtx", "--no-build", "-o", str(out), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    for word in ("calibrate", "smooth", "quantize", "export graphs", "validate", "GFLOP/s", "Not checked", "samples"):
        assert word in printed
    assert _tree(tmp_path) == []
    assert _tree(model) == before


def test_all_that_is_wrong_is_said_at_once(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    code = main(["export", str(model), "--target", "rtx", "--no-build", "-o", str(tmp_path / "file"), "--dry-run",
                 "--evaluate", str(tmp_path / "nowhere.jsonl"), "--data", str(tmp_path / "none.jsonl"),
                 "--max-seq-len", "1000000"])  # fmt: skip
    error = capsys.readouterr().err
    assert code == 2
    for message in ("no evaluation file at", "is a file", "no calibration data at", "max_seq_len = 1000000"):
        assert message in error
    assert "Traceback" not in error


def test_a_damaged_checkpoint_is_found(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "model"
    copy.mkdir()
    for file in model.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    weights = next(copy.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    assert main(["export", str(copy), "--target", "rtx", "--method", "rtn", "-o", str(tmp_path / "out"), "--dry-run"]) == 2
    assert "truncated" in capsys.readouterr().err


def test_bytes_and_states_are_those_of_the_run(model: Path, tmp_path: Path) -> None:
    target, quant, config = load_target("rtx"), QuantConfig(method="rtn"), ExportConfig(max_seq_len=64, max_batch=1)
    out = tmp_path / "bundle"

    def rows() -> dict:
        plan = plan_export(model, None, out, target, quant, config, build=False)
        assert not plan.failed
        return {row.name: row for row in plan.stages}

    planned = rows()
    assert list(planned) == ["quantize", "export graphs", "validate"]
    assert {row.state for row in planned.values()} == {"to do"}
    quantized = quantize_model(model, None, out / "stages/quantized", quant, Silent())
    export_onnx(quantized, out / "onnx", target, config, Silent())
    written = sum(file.stat().st_size for file in quantized.glob("*.safetensors"))
    # Headers of small shards take their part; of a real model they are nothing.
    assert 0.9 < planned["quantize"].bytes_out / written < 1.0
    after = rows()
    assert after["quantize"].state == after["export graphs"].state == "there"
    assert after["validate"].state == "to do"


def test_a_quantized_checkpoint_needs_no_quantization(model: Path, tmp_path: Path) -> None:
    quantized = quantize_model(model, None, tmp_path / "quantized", QuantConfig(method="rtn"), Silent())
    plan = plan_export(quantized, None, tmp_path / "bundle", load_target("rtx"), QuantConfig(), ExportConfig(), build=False)
    assert not plan.failed
    assert [row.name for row in plan.stages] == ["export graphs", "validate"]


def test_a_device_that_is_too_small(model: Path, tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "targets" / "rtx.toml").read_text().replace('name = "rtx"', 'name = "small"')
    lines = [f"memory_bytes = {1 << 20}" if line.startswith("memory_bytes") else line for line in text.splitlines()]
    (tmp_path / "small.toml").write_text("\n".join(lines))
    plan = plan_export(model, None, tmp_path / "out", load_target(tmp_path / "small.toml"), QuantConfig(method="rtn"), ExportConfig(),
                       build=False)  # fmt: skip
    assert [check.name for check in plan.failed] == ["device memory"]


def test_active_weights_count_the_experts_a_token_takes(model: Path) -> None:
    from ecmfq_export.models.moe_vlm import open_model

    opened = open_model(model)
    attention = 128 * (6 * 32 + 2 * 2 * 32) + 6 * 32 * 128 + 2 * 32
    layer = attention + 2 * 128 + 8 * 128 + 2 * (3 * 128 * 96)
    assert active_weights(opened) == 2 * layer


def test_judged_layers_are_what_is_read_again_and_quantized_again(tmp_path: Path) -> None:
    from ecmfq_export.disk_need import Prompts
    from ecmfq_export.models.moe_vlm import open_model
    from ecmfq_export.plan_estimate import quantize_loads

    opened = open_model(make_qwen3_vl_moe(tmp_path / "model", num_hidden_layers=4))
    prompts = Prompts(count=8, tokens=20.0, patch_bytes=0.0)

    def load(**settings: object):
        return quantize_loads(opened, QuantConfig(**settings), prompts, 1 << 30)["quantize"]  # type: ignore[arg-type]

    one, two, all_of_them = load(weighting="rho_g"), load(judged_layers=2), load(judged_layers=8)
    # Layers 0 and 2 are judged: 3 + 1 layers behind them; all four: 3 + 2 + 1.
    assert one.read_again == 0 and 6 * two.read_again == 4 * all_of_them.read_again > 0
    assert "compared in 2 layers, for which 4 layers are read again" in two.basis
    assert one.flops < two.flops < all_of_them.flops
    # Two layers five times and two once, against four layers once.
    assert two.flops < 3.2 * one.flops and all_of_them.flops > 4 * one.flops


def test_searches_of_large_layers_are_bounded_in_the_estimate(tmp_path: Path) -> None:
    from ecmfq_export.disk_need import Prompts
    from ecmfq_export.models.moe_vlm import open_model
    from ecmfq_export.plan_estimate import quantize_loads

    opened = open_model(make_qwen3_vl_moe(tmp_path / "model", num_hidden_layers=2))
    few, many = (quantize_loads(opened, QuantConfig(num_samples=count), Prompts(count, 20.0, 0.0), 1 << 30)["smooth"]
                 for count in (8, 10_000_000))
    assert "20 evaluations" in few.basis and few.flops == 21 * 2 * active_weights(opened) * 8 * 20
    assert "looks" in many.basis and many.flops < 21 * 2 * active_weights(opened) * 10_000_000 * 20
