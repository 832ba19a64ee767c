"""A whole engine on this machine's GPU, prompts and decode steps, against ONNX Runtime. Not run on this project's machines so far.

    pytest -m gpu tests/engine
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.kernels.engine_check import MAX_MEAN_DIFFERENCE, SIZES, pick_target
from ecmfq_export.config import QuantConfig
from ecmfq_export.engine.device import current_device
from ecmfq_export.engine.ort_runner import OrtRunner
from ecmfq_export.engine.trt_runner import TrtRunner
from ecmfq_export.graph.pipeline import export_onnx
from ecmfq_export.progress import Silent
from ecmfq_export.stages.quantize import quantize
from ecmfq_export.workflow import Paths, build_engines
from tests.engine.conversation import conversation
from tests.tiny_models import make_qwen3_vl_moe

pytestmark = [pytest.mark.gpu, pytest.mark.tensorrt]


@pytest.mark.parametrize("graphs", [False, True])
def test_prompts_and_steps_answer_as_onnx_runtime(tmp_path: Path, graphs: bool) -> None:
    device = current_device()
    if device is None:
        pytest.skip("no GPU with a driver on this machine")
    target, guess = pick_target(device.compute_capability)
    if guess:
        pytest.skip(f"no TensorRT here builds for SM {device.compute_capability}")
    paths = Paths(tmp_path / "bundle")
    quantized = quantize(make_qwen3_vl_moe(tmp_path / "model"), None, None, tmp_path / "quantized", QuantConfig(method="rtn"), Silent())
    export_onnx(quantized, paths.onnx, target, SIZES, Silent())
    engines = build_engines(paths.root, target, Silent())
    runners: list[TrtRunner] = []

    def open_engine(path: Path) -> TrtRunner:
        runners.append(TrtRunner(engines / f"{path.parent.name}.engine", target, graphs=graphs))
        return runners[-1]

    got, wanted = conversation(paths.onnx, open_engine), conversation(paths.onnx, lambda path: OrtRunner(path))
    assert np.abs(got - wanted).mean() <= MAX_MEAN_DIFFERENCE
    assert runners[0].device_bytes > 0
    replayed = runners[0].calls["replayed"]
    assert (replayed > 0) == (graphs and target.engine.decode_profile), runners[0].calls
