"""A tiny random model and a folder of evaluation data."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ecmfq_export.config import QuantConfig
from ecmfq_export.progress import Silent
from ecmfq_export.stages.quantize import quantize
from tests.tiny_models import make_qwen3_vl_moe

SIZES = ((16, 16), (32, 16), (16, 32), (32, 32), (24, 16))
YES_NO = ("y", "n")
"""The tiny tokenizer has single bytes only."""


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen3_vl_moe(tmp_path_factory.mktemp("fp"), num_hidden_layers=3, vision={"deepstack_visual_indexes": [0, 1]})


@pytest.fixture(scope="session")
def quantized(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = QuantConfig(method="rtn", attention="w4a8", lm_head="w8a8")
    return quantize(checkpoint, None, None, tmp_path_factory.mktemp("rtn") / "quantized", config, Silent())


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five images of different sizes; 8 questions, one of them without an image; captions with distractors."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    for i, size in enumerate(SIZES):
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8)).save(folder / f"images/{i}.png")
    questions = [{"image": f"images/{i % 5}.png", "question": f"What is {'so ' * (i % 3)}{i}?", "answer": "abc"[: 1 + i % 3],
                  "type": "odd" if i % 2 else "even"} for i in range(7)]  # fmt: skip
    questions.append({"question": "Nothing to see?", "answer": "no", "type": "even"})
    captions = [{"image": f"images/{i}.png", "text": f"picture {'of a ' * i}{i}", "distractors": [f"picture of {i + 5}"] * (i % 3)}
                for i in range(5)]  # fmt: skip
    (folder / "questions.jsonl").write_text("\n".join(json.dumps(q) for q in questions))
    (folder / "captions.jsonl").write_text("\n".join(json.dumps(c) for c in captions))
    return folder
