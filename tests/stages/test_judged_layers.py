"""weighting = auto in a model with more layers than are judged: what the others take, what is computed for it, and after a kill."""

import json
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest

from ecmfq_export import bundle
from ecmfq_export.progress import Silent
from ecmfq_export.stages import judge
from ecmfq_export.stages import quantize as stage
from ecmfq_export.stages.calibrate import calibrate
from ecmfq_export.stages.layer_quantizer import LayerQuantizer
from tests.killing import run_in_child
from tests.stages.common import SETTINGS, file_hashes
from tests.tiny_models import make_qwen3_vl_moe

CONFIG = replace(SETTINGS, num_samples=6, selection="random", judged_layers=2)


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    return make_qwen3_vl_moe(tmp_path_factory.mktemp("deep"), seed=2, num_hidden_layers=4)


@pytest.fixture(scope="module")
def deep_calibration(deep, pool, tmp_path_factory):
    return calibrate(deep, pool, tmp_path_factory.mktemp("stages") / "calibration", CONFIG, Silent())


@pytest.fixture
def chosen(monkeypatch):
    """The first judgement among several is for rho_g, the others are for rho."""
    verdicts = ["rho", "rho_g"]

    def verdict(kl):
        if len(kl) == 1:
            return next(iter(kl))
        return verdicts.pop() if len(verdicts) > 1 else verdicts[0]

    monkeypatch.setattr(stage, "clearly_best", verdict)


def read_log(directory):
    return json.loads((directory / stage.LAYERS).read_text())


def test_layers_between_take_the_last_choice_and_are_quantized_once(deep, deep_calibration, chosen, tmp_path, monkeypatch):
    quantized, steps = Counter(), []
    original = LayerQuantizer.quantize

    def counted(self, weighting):
        quantized[self._index] += 1
        return original(self, weighting)

    class Steps(Silent):
        def track(self, items, description, total=None):
            for item in items:
                steps.append((item, total))
                yield item

    monkeypatch.setattr(LayerQuantizer, "quantize", counted)
    out = stage.quantize(deep, deep_calibration, None, tmp_path / "q", CONFIG, Steps())
    log = read_log(out)
    assert [entry["weighting"] for entry in log] == ["rho_g", "rho_g", "rho", "rho"]
    assert [len(entry["kl"]) for entry in log] == [4, 0, 4, 1], "behind the last layer the one weighting is judged"
    assert quantized == {0: 5, 1: 1, 2: 5, 3: 1}
    assert [item for item, _ in steps] == [0] * 5 + [1] + [2] * 5 + [3] and {total for _, total in steps} == {12}
    # No layer keeps held-out samples out of its final Hessians.
    assert len({sum(map(sum, entry["tokens"])) for entry in log}) == 1
    assert bundle.read_manifest(out).info["heldout_kl"] == log[-1]["kl"]["rho"]


@pytest.mark.parametrize("layer", [1, 3])
def test_a_killed_run_takes_the_same_choice(deep, deep_calibration, chosen, tmp_path, monkeypatch, layer):
    """Killed before the state behind an unjudged layer is kept."""
    run = partial(stage.quantize, deep, deep_calibration, None, config=CONFIG, progress=Silent())
    assert run_in_child(partial(run, tmp_path / "whole"))[0] == 0
    out = tmp_path / "out"
    killed = bundle.partial_dir(out) / f".state.{layer + 1}"
    assert run_in_child(partial(run, out), kill_before=str(killed))[0] == -9
    assert (killed.parent / f".state.{layer}").is_dir()
    if layer == 3:
        # Both judgements are behind it: another one would be another choice.
        monkeypatch.setattr(stage, "clearly_best", lambda kl: next(iter(kl)) if len(kl) == 1 else pytest.fail("judged again"))
    else:
        # The first judgement is in the state that is kept.
        stage.clearly_best(dict.fromkeys(("none", "rho")))
    run(out)
    assert file_hashes(out) == file_hashes(tmp_path / "whole")
    assert [entry["weighting"] for entry in read_log(out)] == ["rho_g", "rho_g", "rho", "rho"]


def test_all_layers_judged_are_steps_of_one(deep, deep_calibration, tmp_path):
    totals = []

    class Steps(Silent):
        def track(self, items, description, total=None):
            totals.append(total)
            yield from items

    config = replace(CONFIG, judged_layers=8)
    out = stage.quantize(deep, deep_calibration, None, tmp_path / "q", config, Steps())
    assert totals == [4] and [len(entry["kl"]) for entry in read_log(out)] == [4] * 4


def test_a_single_weighting_is_judged_without_another_pass_over_the_model(deep, deep_calibration, tmp_path, monkeypatch):
    """The same figure as by running the floating-point model ahead, from the activations that come out of the last layer anyway."""
    read = Counter()
    original = judge.load_layer

    def counted(model, index, *rest):
        read[index] += 1
        return original(model, index, *rest)

    monkeypatch.setattr(judge, "load_layer", counted)
    config, found = replace(CONFIG, weighting="rho_g"), {}
    found["anyway"] = read_log(stage.quantize(deep, deep_calibration, None, tmp_path / "anyway", config, Silent()))[-1]["kl"]["rho_g"]
    assert not read
    monkeypatch.setattr(stage, "Judge", lambda *args, ahead: judge.Judge(*args))
    monkeypatch.setattr(judge.Judge, "refer_to", lambda self, stream: None)
    found["ahead"] = read_log(stage.quantize(deep, deep_calibration, None, tmp_path / "ahead", config, Silent()))[-1]["kl"]["rho_g"]
    assert read == dict.fromkeys(range(4), 1)
    assert found["anyway"] == pytest.approx(found["ahead"], rel=1e-4) and found["ahead"] > 0
