"""Every computation of the stages on a second device that tells its tensors from the host's, as CUDA does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ecmfq_export import workflow
from ecmfq_export.models.moe_vlm import open_model
from ecmfq_export.progress import Silent
from tests.stages.common import SETTINGS
from tests.tiny_ernie import make_ernie

ROOT = Path(__file__).parents[2]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Without images: transformers' tower is not what is tested here."""
    rows = [{"text": f"What is {i}?", "answer": "ab"[: 1 + i % 2] + str(i)} for i in range(6)]
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool" / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "pool"


def slow(*values: str) -> object:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("family", "smoothing"), [("qwen3_vl_moe", "smoothquant"), slow("qwen3_vl_moe", "ecs"), slow("ernie4_5_vl_moe", "ecs")])
def test_all_stages_on_another_device_find_what_the_cpu_finds(
    family: str, smoothing: str, tiny: Path, texts: Path, tmp_path: Path
) -> None:
    # ERNIE routes text and image tokens by routers of their own, each of them every token.
    tiny = tiny if family == "qwen3_vl_moe" else make_ernie(tmp_path / "model", seed=1)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    command = [sys.executable, "-m", "tests.stages.other_device", str(tiny), str(texts), str(tmp_path / "other"), smoothing]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    # Few tokens leave directions in which integers do not matter; damping makes them matter, so that they can be compared.
    config = replace(SETTINGS, num_samples=4, weighting="rho_g_phi", smoothing=smoothing, percdamp=1.0)
    here = open_model(workflow.quantize_model(tiny, texts, tmp_path / "here" / "quantized", config, Silent()))
    there = open_model(tmp_path / "other" / "quantized")
    selections = [json.loads((tmp_path / place / "calibration" / "selection.json").read_text()) for place in ("here", "other")]
    assert selections[0] == selections[1]
    for name in ("layers.1.mlp.experts.gate_up_proj", "layers.1.mlp.experts.down_proj", "layers.1.self_attn.o_proj.weight"):
        own, other = here.qtensor(name).qvalue, there.qtensor(name).qvalue
        # Sums in another order move values that lie between two grid points, and with them what the next layer sees: 0.5 to 4%.
        assert float((own != other).float().mean()) < 0.08, name
        assert int((own.int() - other.int()).abs().max()) <= 3, name
