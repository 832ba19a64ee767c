"""The exported graphs give what PyTorch gives, whether they show every position or the last one only."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ecmfq_export.config import ExportConfig
from ecmfq_export.engine.ort_runner import OrtRunner
from ecmfq_export.errors import UnsupportedError, UserError
from ecmfq_export.graph.pipeline import export_onnx
from ecmfq_export.models.moe_vlm import open_model
from ecmfq_export.progress import Silent
from ecmfq_export.runtime.decoder_session import read_runtime
from ecmfq_export.target import load_target
from ecmfq_export.validate.evaluation import onnx_model
from ecmfq_export.validate.evaluation.evalset import prepare
from ecmfq_export.validate.evaluation.onnx_model import OnnxModel
from ecmfq_export.validate.evaluation.run import evaluate
from tests.validate.evaluation.conftest import YES_NO


@pytest.fixture(scope="module", params=["all", "last"])
def onnx_dir(request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = ExportConfig(max_seq_len=160, logits=request.param)
    return export_onnx(checkpoint, tmp_path_factory.mktemp("out") / "onnx", load_target("rtx"), config, Silent(), dtype="float32")


def test_graphs_equal_pytorch(onnx_dir: Path, checkpoint: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evalset = prepare(onnx_dir, data, yes_no=YES_NO, distractors=True)
    expected = evaluate(open_model(checkpoint), evalset, resamples=50)
    if read_runtime(onnx_dir)["logits"] == "last":
        monkeypatch.setattr(onnx_model, "_HELD_BYTES", 0)  # logits go through a file, and must come out the same
    model = OnnxModel(onnx_dir, threads=1)
    assert model.describe()["vocab_size"] == 288
    found = evaluate(model, evalset, expected, resamples=50)
    assert found.comparison is not None
    for span in ("answers", "captions"):
        assert found.comparison["kl"][span]["max"] < 1e-6
        np.testing.assert_allclose(found.items[span]["nll"], expected.items[span]["nll"], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(found.items["p_yes"]["scores"], expected.items["p_yes"]["scores"], atol=1e-3)
    for task in ("embedding", "p_yes"):
        for ranks in ("image_ranks", "text_ranks"):
            assert np.array_equal(found.items[task][ranks], expected.items[task][ranks])


def test_what_does_not_fit_is_refused(onnx_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "questions.jsonl").write_text(json.dumps({"question": "why " * 50, "answer": "no"}))
    with pytest.raises(UserError, match="context of 160"):
        evaluate(OnnxModel(onnx_dir), prepare(onnx_dir, tmp_path, tasks=["vqa"]))
    with pytest.raises(UnsupportedError, match="has no value hidden_9"):
        OrtRunner(onnx_dir / "decoder" / "model.ref.onnx", extra_outputs=["hidden_9"])
