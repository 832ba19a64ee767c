"""The record of a quantization, read from what the stages really wrote, and its figures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ecmfq_export.config import QuantConfig
from ecmfq_export.errors import BundleError
from ecmfq_export.progress import Silent
from ecmfq_export.stages import quantize as stage
from ecmfq_export.validate import quantization_plots, quantization_record
from ecmfq_export.validate.html_report import render
from ecmfq_export.validate.quantization_record import SELECTION_FIGURES, read_record
from ecmfq_export.workflow import quantize_model
from tests.tiny_models import make_qwen3_vl_moe
from tests.validate.example_report import example_report


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with calibration, smoothing and quantized, made of 16 samples of a pool of 24."""
    root = tmp_path_factory.mktemp("record")
    model = make_qwen3_vl_moe(root / "model", seed=1)
    (root / "data").mkdir()
    rows = []
    for i in range(24):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8)).save(root / f"data/{i}.png")
        rows.append({"image": f"{i}.png", "text": f"what is {i}?", "answer": f"it is {i}"})
    (root / "data/samples.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = QuantConfig(method="smoothquant", num_samples=16, selection="macs")
    quantize_model(model, root / "data", root / "stages" / "quantized", config, Silent())
    return root / "stages"


def test_record_of_real_stages(stages: Path) -> None:
    record = read_record(stages / "quantized")
    assert record is not None and record["method"] == "smoothquant"
    assert [row["layer"] for row in record["layers"]] == [0, 1]
    for row in record["layers"]:
        assert {name for name, errors in row["errors"].items() if len(errors) == 8} >= {"gate_up", "down"}
        assert np.shape(row["tokens"]) == (8, 2)
    assert record["scales"], "smoothing folds scales in"
    for rows in record["scales"].values():
        assert all(np.all(np.diff(row["quantiles"]) >= 0) and row["quantiles"][0] > 0 for row in rows)
    selection = record["selection"]
    assert selection["selected"] == 16 and selection["pool"] == 24
    assert set(selection["figures"]) == set(SELECTION_FIGURES)
    json.dumps(record)


def test_names_are_the_stages_own() -> None:
    assert (quantization_record.LAYERS, quantization_record.SCALES) == (stage.LAYERS, stage.SMOOTHING)


def test_samples_of_another_run_are_not_shown(stages: Path, tmp_path: Path) -> None:
    shutil.copytree(stages, tmp_path / "stages")
    manifest = tmp_path / "stages/calibration/manifest.json"
    manifest.write_text(manifest.read_text().replace('"pool": 24', '"pool": 25'))
    record = read_record(tmp_path / "stages/quantized")
    assert record is not None and record["selection"] is None and record["scales"]
    shutil.rmtree(tmp_path / "stages/calibration")
    assert read_record(tmp_path / "stages/quantized")["selection"] is None


def test_rounding_leaves_no_record_and_the_page_says_so(stages: Path, tmp_path: Path) -> None:
    quantize_model(stages.parent / "model", None, tmp_path / "quantized", QuantConfig(method="rtn"), Silent())
    record = read_record(tmp_path / "quantized")
    assert record == {"method": "rtn", "layers": [], "scales": {}, "selection": None}
    page = render(example_report(quantization=record))
    assert "No record of errors by layer and expert, of smoothing scales, of the calibration samples' selection" in page
    assert read_record(stages.parent / "model") is None
    assert "has no record of how it was quantized" in render(example_report(quantization=None))


@pytest.mark.parametrize(("name", "text"), [("quantization.json", '{"a": 1}'), ("smoothing_scales.safetensors", "no tensors")])
def test_damage_is_named(stages: Path, tmp_path: Path, name: str, text: str) -> None:
    shutil.copytree(stages / "quantized", tmp_path / "quantized")
    (tmp_path / "quantized" / name).write_text(text)
    with pytest.raises(BundleError, match=f"{name} is damaged"):
        read_record(tmp_path / "quantized")


def test_figures_of_what_is_odd() -> None:
    """One layer, experts without a token, errors of nothing, no expert at all, a figure that is 0 at random."""
    layers = [{"layer": 3, "errors": {"down": [None, 0.0, 1e-3], "value": [0.0]}, "tokens": [[0, 0], [1, 0], [2, 3]]}]
    assert quantization_plots.expert_groups(layers) == ["down"]
    grid = quantization_plots._grid(layers, "down")
    assert np.isnan(grid[0, :2]).all() and grid[0, 2] == pytest.approx(-3)
    for figure in (quantization_plots.error_plot(layers), quantization_plots.error_lines(layers),
                   quantization_plots.scale_plot({"down": [{"layer": 3, "quantiles": [1.0] * 5}]}),
                   quantization_plots.selection_plot({"figures": {"objective": [1.0, 2.0], "coverage": [0.0, 0.0]}})):  # fmt: skip
        assert figure.startswith("<svg") and figure.rstrip().endswith("</svg>")
    nothing = [{"layer": 0, "errors": {"down": [None, None]}, "tokens": []}]
    assert quantization_plots.error_plot(nothing).startswith("<svg")
    assert quantization_plots.error_lines(nothing).startswith("<svg")
    assert render(example_report(quantization={"method": "gptq", "layers": [{"layer": 0, "errors": {"value": [1e-5]}}], "scales": {},
                                               "selection": None}))  # fmt: skip
