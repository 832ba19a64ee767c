"""A run that is killed at any moment and started again ends with the bytes of an undisturbed one, and keeps finished layers."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from ecmfq_export import bundle, workflow
from ecmfq_export.config import QuantConfig
from ecmfq_export.progress import Silent
from tests.killing import run_in_child
from tests.stages.common import SETTINGS, file_hashes, plant_outliers
from tests.tiny_models import make_qwen3_vl_moe

# Two stages that go layer by layer with activations, and one that scores a pool; no search, to be quick.
QUICK = replace(SETTINGS, smoothing="smoothquant", weighting="rho_g_phi", num_samples=6)
STAGES = ("calibration", "smoothing", "quantized")


class Notes(Silent):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_qwen3_vl_moe(tmp_path_factory.mktemp("model"), seed=1, num_hidden_layers=3)
    plant_outliers(directory)
    return directory


def run(model: Path, pool: Path, out: Path, config: QuantConfig = QUICK, progress: Silent | None = None) -> None:
    workflow.quantize_model(model, pool, out / "quantized", config, progress or Silent())


def results(out: Path) -> dict[str, dict[str, str]]:
    return {stage: file_hashes(out / stage) for stage in STAGES}


@pytest.fixture(scope="module")
def whole(model: Path, pool: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, dict[str, str]], int]:
    """Hashes of an undisturbed run, and how often it changes the file system."""
    out = tmp_path_factory.mktemp("whole")
    code, changes = run_in_child(partial(run, model, pool, out))
    assert code == 0
    return results(out), changes


def test_ten_random_kills_and_the_same_bytes(model: Path, pool: Path, whole: tuple, tmp_path: Path) -> None:
    expected, changes = whole
    moments = sorted(random.Random(5).sample(range(2, changes), 10))
    stages_killed = set()
    for number, moment in enumerate(moments):
        out = tmp_path / str(number)
        assert run_in_child(partial(run, model, pool, out), moment) == (-9, 0)
        stages_killed.update(stage for stage in STAGES if bundle.partial_dir(out / stage).is_dir())
        code, _ = run_in_child(partial(run, model, pool, out))
        assert code == 0, f"after a kill at change {moment} of {changes}"
        assert results(out) == expected, f"after a kill at change {moment} of {changes}"
        # A key may stay in a finished stage, where the kill came between its last rename and its removal.
        left = [path.name for path in out.rglob(".*") if path.name not in (workflow.HASHES, ".key.json")]
        assert left == [], f"after a kill at change {moment} of {changes}"
        shutil.rmtree(out)
    assert stages_killed == set(STAGES), "the moments fall into every stage"


@pytest.mark.parametrize("stage", STAGES)
def test_finished_layers_are_not_computed_again(stage: str, model: Path, pool: Path, whole: tuple, tmp_path: Path) -> None:
    """Killed before the state behind the third layer comes."""
    expected, _ = whole
    out = tmp_path / "out"
    work = bundle.partial_dir(out / stage)
    assert run_in_child(partial(run, model, pool, out), kill_before=str(work / ".state.3")) == (-9, 0)
    assert (work / ".state.2").is_dir()
    notes = Notes()
    run(model, pool, out, progress=notes)
    assert any("continuing after layer 2 of 3" in text for text in notes.texts), notes.texts
    assert results(out) == expected


def test_a_kill_while_the_result_is_hashed_costs_no_layer(model: Path, pool: Path, whole: tuple, tmp_path: Path) -> None:
    out = tmp_path / "out"
    work = bundle.partial_dir(out / "quantized")
    assert run_in_child(partial(run, model, pool, out), kill_before=str(out / "quantized")) == (-9, 0)
    shards = {path.name: path.stat().st_mtime_ns for path in work.glob("model-0000[123]*")}
    run(model, pool, out)
    assert results(out) == whole[0]
    assert {name: (out / "quantized" / name).stat().st_mtime_ns for name in shards} == shards and len(shards) == 3


@pytest.mark.parametrize("change", ["config", "input"])
def test_other_settings_or_samples_start_the_stage_again(
    change: str, model: Path, pool: Path, tmp_path: Path
) -> None:
    out, data = tmp_path / "out", tmp_path / "pool"
    shutil.copytree(pool, data)
    run_in_child(partial(run, model, data, out), kill_before=str(out / "quantized"))
    assert (bundle.partial_dir(out / "quantized") / "manifest.json").is_file()
    if change == "input":
        lines = (data / "samples.jsonl").read_text().splitlines()
        (data / "samples.jsonl").write_text("\n".join(lines[:-2]) + "\n")
    config = replace(QUICK, percdamp=0.02) if change == "config" else QUICK
    notes = Notes()
    run(model, data, out, config, notes)
    assert not any("continuing" in text for text in notes.texts)
    kept = [f"{out / stage}: up to date" in notes.texts for stage in STAGES]
    assert kept == ([True, True, False] if change == "config" else [False, False, False])
    fresh = tmp_path / "fresh"
    run(model, data, fresh, config)
    assert results(out) == results(fresh)


@pytest.mark.slow
def test_ten_random_kills_of_a_whole_export(model: Path, pool: Path, tmp_path: Path) -> None:
    """Graphs and validation too; no engine, whose log tells the time. The report holds seconds: all but those are compared."""
    from ecmfq_export.config import ExportConfig
    from ecmfq_export.target import load_target

    def export(out: Path) -> None:
        workflow.export(model, pool, out, load_target("rtx"), QUICK, ExportConfig(max_seq_len=192), Silent(), build=False)

    def outcome(out: Path) -> dict[str, object]:
        stages = {path.parent.relative_to(out).as_posix(): file_hashes(path.parent) for path in sorted(out.rglob("manifest.json"))}
        report = json.loads((out / "report" / "report.json").read_text())
        return {name: hashes for name, hashes in stages.items() if name not in ("report", ".")} | {
            "report": {key: value for key, value in report.items() if key != "seconds"}}

    code, changes = run_in_child(partial(export, tmp_path / "whole"))
    assert code == 0
    expected = outcome(tmp_path / "whole")
    for number, moment in enumerate(sorted(random.Random(6).sample(range(2, changes), 10))):
        out = tmp_path / str(number)
        assert run_in_child(partial(export, out), moment)[0] == -9
        assert run_in_child(partial(export, out))[0] == 0, f"after a kill at change {moment} of {changes}"
        assert outcome(out) == expected, f"after a kill at change {moment} of {changes}"
        shutil.rmtree(out)
