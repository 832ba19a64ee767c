"""The GPU check's engine step with ONNX Runtime in the GPU's place: everything but the device itself is exercised."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ecmfq_export.engine.ort_runner import OrtRunner
from ecmfq_export.errors import BuildError

pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx builds the engine: pip install '.[rtx]'")
from benchmarks.kernels import engine_check

pytestmark = pytest.mark.tensorrt


def _reference(engine: Path) -> OrtRunner:
    assert engine.is_file()
    return OrtRunner(engine.parents[2] / "onnx" / "decoder" / "model.ref.onnx")


def test_equal_logits_pass(tmp_path: Path) -> None:
    facts = engine_check.run(tmp_path, 89, lambda path, _target: _reference(path))
    assert facts["target"] == "l4"
    assert facts["largest_difference"] == 0
    assert facts["logit_spread"] > 0.1


class _Off:
    """The reference with one token's logits moved."""

    def __init__(self, path: Path) -> None:
        self._inner = _reference(path)

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        logits = self._inner.run(feeds)["logits"].copy()
        logits[0, 3] += 5
        return {"logits": logits}


def test_other_logits_fail(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="not ONNX Runtime's"):
        engine_check.run(tmp_path, 89, lambda path, _target: _Off(path))


def test_a_gpu_without_engines_of_its_own_gets_one_for_sm_80_and_the_answer_is_kept(tmp_path: Path) -> None:
    def refuse(path: Path, target) -> OrtRunner:
        assert path.is_file() and 95 in target.compute_capabilities
        raise BuildError("refused by the runtime")

    facts = engine_check.run(tmp_path, 95, refuse)
    assert facts["built_for"] == (80,) and not facts["runs_on_this_gpu"]
    assert "refused by the runtime" in facts["evidence"]
