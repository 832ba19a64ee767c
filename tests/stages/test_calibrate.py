"""Stage calibrate."""

import json
from dataclasses import replace

import pytest
import torch

from ecmfq_export import bundle
from ecmfq_export.errors import BundleError, UserError
from ecmfq_export.models.inputs import prepare_inputs
from ecmfq_export.models.moe_vlm import open_model
from ecmfq_export.models.torch_decoder import decoder_logits, load_layer
from ecmfq_export.progress import Silent
from ecmfq_export.stages.calibrate import calibrate
from ecmfq_export.stages.calibration import load_calibration, split_heldout
from ecmfq_export.stages.samples import load_pool
from ecmfq_export.stages.sensitivity import measure_gamma
from tests.stages.common import SETTINGS, file_hashes


def test_result_is_complete_and_the_held_out_images_are_apart(calibrated, pool):
    calibration = load_calibration(calibrated)
    rows = json.loads((calibrated / "selection.json").read_text())["samples"]
    images = {sample.name: sample.image for sample in load_pool(pool)}
    assert len(calibration.samples) == len(rows) >= 10
    assert 1 <= sum(calibration.heldout) < len(rows)
    held, kept = ({images[r["name"]] for r in rows if r["heldout"] == side and images[r["name"]]} for side in (True, False))
    assert not held & kept
    assert any(s.pixel_values is not None for s in calibration.samples)
    info = bundle.read_manifest(calibrated, "calibrate").info
    assert info["selected_objective"] >= info["random_objective"] and info["pool"] == 16


def test_same_seed_same_bytes_and_up_to_date_is_skipped(calibrated, tiny, pool, tmp_path):
    again = calibrate(tiny, pool, tmp_path / "calibration", SETTINGS, Silent())
    assert file_hashes(again) == file_hashes(calibrated)
    stamp = (again / "manifest.json").stat().st_mtime_ns
    calibrate(tiny, pool, again, SETTINGS, Silent())
    assert (again / "manifest.json").stat().st_mtime_ns == stamp


def test_random_selection_has_exactly_the_number_asked_for(tiny, pool, tmp_path):
    out = calibrate(tiny, pool, tmp_path / "c", replace(SETTINGS, selection="random", num_samples=5), Silent())
    assert len(load_calibration(out).samples) == 5


def test_gamma_equals_whole_model_gradients(tiny, calibrated):
    model = open_model(tiny)
    samples = [s for s in load_calibration(calibrated).samples if s.pixel_values is not None][:2]
    gamma, report = measure_gamma(model, samples, Silent())
    total = torch.zeros(2, 2, dtype=torch.float64)
    for sample in samples:
        inputs = prepare_inputs(model, [sample])
        hidden, outputs = inputs.inputs_embeds, []
        for index in range(2):
            hidden = load_layer(model, index).forward(hidden.requires_grad_(), inputs.cos, inputs.sin, inputs.mask)
            hidden = hidden + inputs.deepstack[index] if index < len(inputs.deepstack) else hidden
            hidden.retain_grad()
            outputs.append(hidden)
        answers = torch.from_numpy(sample.answer_mask)[1:]
        logits = decoder_logits(model, hidden)[0, :-1][answers]
        torch.nn.functional.cross_entropy(logits, torch.from_numpy(sample.input_ids)[1:][answers], reduction="sum").backward()
        for index, out in enumerate(outputs):
            for modality in (0, 1):
                total[index, modality] += out.grad[inputs.token_types == modality].abs().mean(-1).double().sum()
    vision = sum(int((s.input_ids == model.spec.image_token_id).sum()) for s in samples)
    counts = torch.tensor([sum(s.length for s in samples) - vision, vision]).double()
    ratios = (total[:, 0] / counts[0]) / (total[:, 1] / counts[1])
    # No answer depends on what the last layer gives out at vision tokens.
    assert ratios[1] == float("inf") and report["gamma_by_layer"][1] is None
    assert gamma == report["gamma_by_layer"][0] == pytest.approx(float(ratios[0]), rel=1e-3)


def test_gamma_is_measured_where_asked_and_needs_answers(tiny, pool, tmp_path):
    out = calibrate(tiny, pool, tmp_path / "c", replace(SETTINGS, gamma_text=0.0), Silent())
    assert load_calibration(out).gamma > 0
    lines = [json.loads(line) for line in (pool / "samples.jsonl").read_text().splitlines()]
    for line in lines:
        del line["answer"]
        if "image" in line:
            line["image"] = str(pool / line["image"])
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match="no calibration sample has both"):
        calibrate(tiny, tmp_path / "s.jsonl", tmp_path / "d", replace(SETTINGS, gamma_text=0.0), Silent())
    assert not (tmp_path / "d").exists()


def test_a_broken_image_is_named_with_its_sample(tiny, tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    (tmp_path / "s.jsonl").write_text('{"text": "x"}\n{"text": "y", "image": "a.png"}\n')
    with pytest.raises(UserError, match="s.jsonl:2: "):
        calibrate(tiny, tmp_path / "s.jsonl", tmp_path / "c", SETTINGS, Silent())
    assert not (tmp_path / "c").exists()


def test_damaged_calibration_is_refused(calibrated, tmp_path):
    import shutil

    copy = tmp_path / "calibration"
    shutil.copytree(calibrated, copy)
    file = copy / "samples.safetensors"
    file.write_bytes(file.read_bytes()[:-7] + b"1234567")
    with pytest.raises(BundleError, match="sha256"):
        load_calibration(copy)


def test_split_holds_out_whole_groups():
    groups = ["a", "a", "b", "c", "c", "c", "d", "e"]
    held = split_heldout(groups, 0.25, 0)
    assert 0 < sum(held) < 8
    assert all(len({h for g, h in zip(groups, held, strict=True) if g == name}) == 1 for name in groups)
    assert split_heldout(["a", "a"], 0.5, 0).count(True) == 1


def test_text_only_pool(tiny, tmp_path):
    (tmp_path / "s.jsonl").write_text("".join(json.dumps({"text": f"Say {i}"}) + "\n" for i in range(4)))
    out = calibrate(tiny, tmp_path / "s.jsonl", tmp_path / "c", SETTINGS, Silent())
    calibration = load_calibration(out)
    assert len(calibration.samples) == 4 and sum(calibration.heldout) == 1
    assert all(sample.pixel_values is None and not sample.answer_mask.any() for sample in calibration.samples)
