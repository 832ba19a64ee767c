"""A whole evaluation on tiny random models: what must hold whatever they say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ecmfq_export.errors import UserError
from ecmfq_export.models.moe_vlm import open_model
from ecmfq_export.models.torch_decoder import load_layer
from ecmfq_export.validate.evaluation.compare import compare
from ecmfq_export.validate.evaluation.evalset import EvalSet, prepare
from ecmfq_export.validate.evaluation.result import EvalResult
from ecmfq_export.validate.evaluation.run import evaluate
from tests.validate.evaluation.conftest import YES_NO


@pytest.fixture(scope="module")
def evalset(checkpoint: Path, data: Path) -> EvalSet:
    return prepare(checkpoint, data, yes_no=YES_NO, distractors=True)


@pytest.fixture(scope="module")
def floating(checkpoint: Path, evalset: EvalSet) -> EvalResult:
    return evaluate(open_model(checkpoint), evalset, resamples=500)


@pytest.fixture(scope="module")
def rounded(quantized: Path, evalset: EvalSet, floating: EvalResult) -> EvalResult:
    return evaluate(open_model(quantized), evalset, floating, resamples=500)


def test_metrics_follow_from_the_items(floating: EvalResult, evalset: EvalSet) -> None:
    answers, metrics = floating.items["answers"], floating.metrics
    assert metrics["vqa"]["all"]["total"] == 8 and metrics["vqa"]["odd"]["total"] == 3
    assert metrics["vqa"]["all"]["correct"] == answers["correct"].sum()
    assert answers["tokens"].tolist() == [2, 3, 4, 2, 3, 4, 2, 3], "the answer's bytes and the end of the turn"
    expected = np.exp(answers["nll"].sum() / answers["tokens"].sum())
    assert metrics["perplexity"]["answers"]["perplexity"] == pytest.approx(expected)
    assert metrics["perplexity"]["answers"]["low"] < expected < metrics["perplexity"]["answers"]["high"]
    embedding = metrics["embedding"]
    assert (embedding["images"], embedding["texts"], embedding["true_texts"]) == (5, 9, 5)
    assert set(embedding["recalls"]) == {"image_to_text_r@1", "image_to_text_r@5", "text_to_image_r@1"}
    for task in ("embedding", "p_yes"):
        mean = np.mean([row["recall"] for row in metrics[task]["recalls"].values()])
        assert metrics[task]["mean"]["value"] == pytest.approx(mean)
    assert metrics["p_yes"]["near_duplicate"]["total"] == 3, "images with distractors"
    assert floating.items["p_yes"]["scores"].shape == (5, 5)


def test_a_model_against_itself(checkpoint: Path, evalset: EvalSet, floating: EvalResult) -> None:
    again = evaluate(open_model(checkpoint), evalset, floating, resamples=500)
    assert again.comparison is not None
    for task in ("embedding", "p_yes"):
        assert again.comparison["retention"][task]["value"] == 1.0
        difference = again.comparison["difference"][task]
        assert (difference["difference"], difference["low"], difference["high"], difference["p_value"]) == (0, 0, 0, 1)
    for span in ("answers", "captions"):
        assert again.comparison["kl"][span]["max"] < 1e-9
        assert again.comparison["flips"][span]["decisive_flips"] == 0 and again.comparison["flips"][span]["agreement"] == 1.0
        ratio = again.comparison["perplexity_ratio"][span]
        assert (ratio["value"], ratio["low"], ratio["high"]) == pytest.approx((1, 1, 1), abs=1e-6)
    assert again.comparison["answers"] == {"lost": 0, "gained": 0}


def test_a_quantized_model_against_floating_point(rounded: EvalResult) -> None:
    assert rounded.comparison is not None
    for span in ("answers", "captions"):
        kl = rounded.comparison["kl"][span]
        assert 1e-6 < kl["median"] <= kl["max"] and kl["low"] <= kl["mean"] <= kl["high"]
    headlines = rounded.headlines()
    assert headlines["kl.answers"] == rounded.comparison["kl"]["answers"]["mean"]
    assert {"vqa.accuracy", "perplexity.captions", "embedding.mean", "p_yes.near_duplicate", "retention.p_yes"} <= set(headlines)


def test_json_round_trip(rounded: EvalResult, floating: EvalResult, quantized: Path, evalset: EvalSet, tmp_path: Path) -> None:
    floating.write(tmp_path / "new/fp.json")
    saved = EvalResult.read(tmp_path / "new/fp.json")
    assert saved.headlines() == pytest.approx({k: v for k, v in floating.headlines().items() if np.isfinite(v)}, nan_ok=True)
    against = evaluate(open_model(quantized), evalset, saved, resamples=500)
    assert against.comparison is not None and rounded.comparison is not None
    for kind in ("difference", "flips", "answers"):
        assert json.dumps(against.comparison[kind]) == json.dumps(rounded.comparison[kind])
    for span in ("answers", "captions"):
        whole, coarse = rounded.comparison["kl"][span]["mean"], against.comparison["kl_top"][span]["mean"]
        assert 0 < coarse <= whole * (1 + 1e-4), "20 tokens and the rest tell less than all 288"
    rounded.write(tmp_path / "q.json")
    later = compare(saved, EvalResult.read(tmp_path / "q.json"), 500)
    assert later["difference"] == against.comparison["difference"] and later["flips"] == against.comparison["flips"]


def test_damage_shows(checkpoint: Path, evalset: EvalSet, floating: EvalResult) -> None:
    """Layers that are not on disk: one expert projection negated."""

    def damaged(model, index):
        layer = load_layer(model, index)
        layer.tensors["mlp.experts.down_proj"] = -layer.tensors["mlp.experts.down_proj"]
        return layer

    result = evaluate(open_model(checkpoint), evalset, floating, resamples=100, load_layer=damaged)
    assert result.comparison is not None and result.comparison["kl"]["answers"]["mean"] > 0.5


def test_tasks_alone(checkpoint: Path, data: Path, floating: EvalResult) -> None:
    for task, spans in (("vqa", {"answers"}), ("perplexity", {"answers", "captions"}), ("embedding", {"images", "texts"}),
                        ("p_yes", {"matches"})):  # fmt: skip
        evalset = prepare(checkpoint, data, tasks=[task], yes_no=YES_NO, distractors=True)
        assert set(evalset.spans) == spans
        result = evaluate(open_model(checkpoint), evalset, floating, resamples=100)
        assert set(result.metrics) == {task}
        assert result.comparison is not None, "what both measured is compared"


def test_results_that_do_not_belong_together(checkpoint: Path, data: Path, floating: EvalResult, tmp_path: Path) -> None:
    other = evaluate(open_model(checkpoint), prepare(checkpoint, data, limit=3, tasks=["vqa"]), resamples=10)
    with pytest.raises(UserError, match="measured with different data"):
        compare(floating, other)
    few = evaluate(open_model(checkpoint), prepare(checkpoint, data, tasks=["p_yes"], candidates=3, yes_no=YES_NO), resamples=10)
    with pytest.raises(UserError, match=r"different candidates \(5 and 3\)"):
        compare(floating, few)
    vqa = evaluate(open_model(checkpoint), prepare(checkpoint, data, tasks=["vqa"]), resamples=10)
    with pytest.raises(UserError, match="nothing in common"):
        compare(vqa, few)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "cannot be read"), ("[1]", "no evaluation result"), ('{"schema": "ecmfq-evaluation", "schema_version": 9}', "schema version 9"),
     ('{"schema": "ecmfq-evaluation", "schema_version": 1}', "is damaged")],
)  # fmt: skip
def test_files_that_are_no_results(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(UserError, match=message):
        EvalResult.read(tmp_path / "r.json")


def test_a_folded_final_norm_is_the_same_model(checkpoint: Path, evalset: EvalSet, floating: EvalResult, tmp_path: Path) -> None:
    """The final norm's gain moved into the output projection, as rotations do before anything else."""
    shutil.copytree(checkpoint, tmp_path / "folded")
    file = tmp_path / "folded" / "model.safetensors"
    tensors = load_file(file)
    norm, head = "model.language_model.norm.weight", "lm_head.weight"
    tensors[head] = tensors[head] * tensors[norm]
    tensors[norm] = torch.ones_like(tensors[norm])
    save_file(tensors, file, metadata={"format": "pt"})
    folded = evaluate(open_model(tmp_path / "folded"), evalset, floating, resamples=50)
    assert folded.comparison is not None and folded.comparison["kl"]["answers"]["max"] < 1e-8
    for task in ("embedding", "p_yes"):
        assert np.array_equal(folded.items[task]["image_ranks"], floating.items[task]["image_ranks"])
        assert np.array_equal(folded.items[task]["text_ranks"], floating.items[task]["text_ranks"])
