"""Answers and scores of a checkpoint in PyTorch against plain forward passes, and of its graphs against PyTorch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ecmfq_export.config import ExportConfig
from ecmfq_export.errors import UserError
from ecmfq_export.graph.pipeline import export_onnx
from ecmfq_export.integrations.answering import Answerer, Query
from ecmfq_export.models.inputs import prepare_inputs
from ecmfq_export.models.moe_vlm import open_model
from ecmfq_export.models.torch_decoder import run_decoder
from ecmfq_export.progress import Silent
from ecmfq_export.target import load_target
from tests.tiny_models import make_qwen3_vl_moe


def _image(seed: int, width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


QUERIES = [Query("what?", (_image(0, 16, 24),)), Query("and why is that so?"), Query("both", (_image(1, 16, 16), _image(2, 32, 16)))]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen3_vl_moe(tmp_path_factory.mktemp("model"), seed=5)


@pytest.fixture(scope="module")
def answerer(checkpoint: Path) -> Answerer:
    return Answerer(checkpoint, batch_size=2)


def test_scores_are_log_probabilities(answerer: Answerer, checkpoint: Path) -> None:
    answers = ["ab", "c", "no"]
    model = open_model(checkpoint)
    for query, answer, found in zip(QUERIES, answers, answerer.score(QUERIES, answers), strict=True):
        sample = answerer.processor.sample(query.text, query.images, answer)
        with torch.no_grad():
            log_probs = run_decoder(model, prepare_inputs(model, [sample]))[0].double().log_softmax(-1)
        start = sample.length - int(sample.answer_mask.sum())
        targets = torch.from_numpy(sample.input_ids[start:-1])
        rows = log_probs[start - 1 : -2]
        assert found.tokens == len(answer) == len(targets)
        assert found.log_prob == pytest.approx(float(rows.gather(1, targets[:, None]).sum()), abs=1e-4)
        assert found.greedy == bool((rows.argmax(-1) == targets).all())


EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny_vlm"
"""A trained model, whose answers are text; a random one answers with bytes of no character."""


def test_generated_answers_are_the_greedy_ones() -> None:
    example = Answerer(EXAMPLE / "checkpoint", batch_size=3)
    queries = [Query("Describe the image.", (EXAMPLE / f"heldout/images/00{i}.png",)) for i in range(3)]
    queries.append(Query("What is at top left?", (EXAMPLE / "heldout/images/004.png",)))
    texts = example.generate(queries, 60)
    assert [example.generate([query], 60)[0] for query in queries] == texts, "a batch changes nothing"
    assert all(found.greedy for found in example.score(queries, texts))
    wrong = example.score(queries, ["an elephant"] * 4)
    assert not any(found.greedy for found in wrong)
    commas = [text.split(",")[0] for text in texts]
    assert commas != texts and example.generate(queries, 60, stop=[",", "", "no such text"]) == commas


def test_graphs_answer_as_the_checkpoint(checkpoint: Path, answerer: Answerer, tmp_path: Path) -> None:
    export_onnx(checkpoint, tmp_path / "bundle" / "onnx", load_target("rtx"), ExportConfig(max_seq_len=160), Silent(), dtype="float32")
    graphs = Answerer(tmp_path / "bundle", batch_size=3, threads=1)
    assert graphs.generate(QUERIES, 4) == answerer.generate(QUERIES, 4)
    for a, b in zip(graphs.score(QUERIES, ["x", "yy", "z"]), answerer.score(QUERIES, ["x", "yy", "z"]), strict=True):
        assert a.log_prob == pytest.approx(b.log_prob, abs=1e-3) and a.greedy == b.greedy


def test_what_cannot_be_answered(answerer: Answerer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no token to score"):
        answerer.score([Query("q")], [""])
    with pytest.raises(UserError, match="no model at"):
        Answerer(tmp_path / "none")
    with pytest.raises(UserError, match="batch size 0"):
        Answerer(tmp_path, batch_size=0)
    with pytest.raises(UserError, match="exceed the context of 512"):
        answerer.generate([Query("long " * 200)], 4)
