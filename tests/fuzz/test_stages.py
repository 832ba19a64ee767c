"""Damaged files of the stages before the graphs, their hashes made to fit: what was searched, what was chosen, what was written down."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from ecmfq_export import bundle
from ecmfq_export.models.safetensors_writer import TensorToWrite, write_safetensors
from ecmfq_export.runtime.sample import ProcessedSample
from ecmfq_export.stages.calibration import SAMPLES, SELECTION, load_calibration, save_calibration
from ecmfq_export.stages.smooth import load_scales
from ecmfq_export.validate.facts_page import quantization_sections
from ecmfq_export.validate.quantization_record import LAYERS, SCALES, read_record
from tests.fuzz.mutations import mutate_json, mutate_safetensors
from tests.fuzz.sandbox import outcome


def _rehash(directory: Path, name: str, data: bytes) -> None:
    (directory / name).write_bytes(data)
    manifest = json.loads((directory / bundle.MANIFEST).read_text())
    manifest["files"][name] = hashlib.sha256(data).hexdigest()
    (directory / bundle.MANIFEST).write_text(json.dumps(manifest))


@pytest.fixture
def stages(tmp_path: Path) -> Path:
    """calibration/, smoothing/ and quantized/ with one file each that a reader opens."""
    samples = [ProcessedSample(np.arange(5), None, None, np.array([False] * 3 + [True] * 2)) for _ in range(3)]
    with bundle.write_stage(tmp_path / "calibration", "calibrate", {}, {}) as (work, _):
        save_calibration(work, samples, ["a", "b", "c"], [False, True, False], 1.0, {"pool": 3})
    scales = {f"layers.{i}.moe_input": TensorToWrite.of(torch.rand(8) + 0.5) for i in range(2)}
    with bundle.write_stage(tmp_path / "smoothing", "smooth", {}, {}) as (work, _):
        write_safetensors(work / "scales.safetensors", scales)
    layers = [{"layer": i, "weighting": "rho", "kl": {"rho": 1e-5, "none": None}, "errors": {"down": [0.1, 0.2], "value": [0.1]},
               "tokens": [[3, 4], [0, 0]]} for i in range(2)]  # fmt: skip
    with bundle.write_stage(tmp_path / "quantized", "quantize", {}, {}) as (work, _):
        (work / LAYERS).write_text(json.dumps(layers))
        write_safetensors(work / SCALES, scales)
    return tmp_path


def _read_record(root: Path) -> None:
    record = read_record(root / "quantized")
    if record is not None:
        quantization_sections(record)


@pytest.mark.parametrize(("name", "read", "cases"), [
    (f"calibration/{SAMPLES}", lambda root: load_calibration(root / "calibration"), 150),
    (f"calibration/{SELECTION}", lambda root: load_calibration(root / "calibration"), 150),
    ("smoothing/scales.safetensors", lambda root: load_scales(root / "smoothing"), 150),
    (f"quantized/{LAYERS}", _read_record, 20), (f"quantized/{SCALES}", _read_record, 15),
], ids=["samples", "selection", "scales", "record", "record's scales"])  # fmt: skip
def test_files_of_stages(name: str, read, cases: int, stages: Path) -> None:
    directory, file = stages / name.split("/")[0], name.split("/")[1]
    original = (directory / file).read_bytes()
    read(stages)  # once unwatched: it imports
    refused = 0
    for case in range(cases):
        draw = random.Random(f"{name}/{case}")
        data, done = mutate_safetensors(draw, original) if file.endswith(".safetensors") else mutate_json(draw, json.loads(original))
        _rehash(directory, file, data)
        try:
            refused += outcome(stages, lambda: read(stages)) is not None
        except AssertionError as failure:
            raise AssertionError(f"case {case}: {done}: {failure}") from failure
    assert refused > cases // 5
