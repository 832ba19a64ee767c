"""Aria's images: patches of a canvas as transformers' processor and model take them, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.models.aria.image_processing_pil_aria import AriaImageProcessorPil
from transformers.models.idefics3 import Idefics3VisionConfig
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionEmbeddings

from ecmfq_export.errors import CheckpointError, UnsupportedError, UserError
from ecmfq_export.models.inputs import prepare_inputs
from ecmfq_export.models.moe_vlm import open_model
from ecmfq_export.models.torch_decoder import run_decoder
from ecmfq_export.runtime import host_inputs as host
from ecmfq_export.runtime.processor import Processor
from tests.tiny_aria import QUERIES, TOKENS, aria_config, build_aria, make_aria


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_aria(tmp_path_factory.mktemp("aria"), seed=4)


def images() -> list[np.ndarray]:
    """A wide one, a tall one whose short side is made longer, and a square one; patches are cut through by two of the edges."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((201, 300), (400, 60), (33, 33))]


@torch.no_grad()
def test_images_from_pixels_to_logits_equal_transformers(directory: Path) -> None:
    sample = Processor(directory).sample("What?", images())
    assert sample.image_grid_thw.tolist() == [[1, 5, 7], [1, 7, 2], [1, 7, 7]]
    assert int((sample.input_ids == TOKENS["<|img|>"]).sum()) == 3 * 8
    settings = json.loads((directory / "preprocessor_config.json").read_text())
    whole = AriaImageProcessorPil(**{name: settings[name] for name in ("max_image_size", "min_image_size")})(images(), return_tensors="pt")
    theirs = build_aria(aria_config(), seed=4)(input_ids=torch.from_numpy(sample.input_ids)[None], pixel_values=whole["pixel_values"],
                                               pixel_mask=whole["pixel_mask"]).logits
    model = open_model(directory)
    ours = run_decoder(model, prepare_inputs(model, [sample]))
    torch.testing.assert_close(ours, theirs, atol=2e-5 * float(theirs.abs().max()), rtol=0)


@pytest.mark.parametrize(("rows", "columns"), [(70, 70), (70, 24), (53, 70), (35, 35), (35, 24), (35, 1), (1, 35)])
def test_table_entries_equal_transformers(rows: int, columns: int) -> None:
    """Of the published table of 70 x 70, through the numbers that the embedding adds."""
    embeddings = Idefics3VisionEmbeddings(Idefics3VisionConfig(hidden_size=1, image_size=980, patch_size=14))
    embeddings.patch_embedding.weight.data.zero_()
    embeddings.patch_embedding.bias.data.zero_()
    embeddings.position_embedding.weight.data = torch.arange(4900.0)[:, None]
    side = max(rows, columns)
    mask = torch.zeros(1, side, side, dtype=torch.bool)
    mask[:, :rows, :columns] = True
    expected = embeddings(torch.zeros(1, 3, 14 * side, 14 * side), mask)[mask.view(1, -1)][:, 0].detach().numpy()
    vision = host.HostVision(1, 4900, 588, "bucket", queries=((1225, 128), (4900, 256)))
    inputs = host.vision_inputs(np.array([[1, rows, columns]]), vision)
    np.testing.assert_array_equal(inputs["interp_indices"][:, 0], expected)
    assert set(inputs) == {"interp_indices", "interp_weights", "segment_ids", "query_indices", "query_segments"}
    assert len(inputs["query_indices"]) == (256 if side == 70 else 128) and (inputs["interp_weights"] == 1).all()


def test_queries_of_several_images() -> None:
    inputs = host.vision_inputs(np.array([[1, 2, 4], [1, 2, 1]]), host.HostVision(1, 49, 588, "bucket", queries=QUERIES))
    assert inputs["query_indices"].tolist() == [0, 1, 2, 0, 1] and inputs["query_segments"].tolist() == [0, 0, 0, 1, 1]
    assert inputs["segment_ids"].tolist() == [0] * 8 + [1] * 2
    with pytest.raises(UserError, match="5 x 3 patches fills no canvas"):
        host.image_tokens([1, 5, 3], 1, QUERIES)


@pytest.mark.parametrize(("settings", "error", "message"), [
    ({"split_image": True}, UnsupportedError, "split_image = True"),
    ({"resample": 2}, UnsupportedError, "resample = 2"),
    ({"max_image_size": 700}, CheckpointError, "max_image_size = 700"),
    ({"min_image_size": 600}, CheckpointError, "min_image_size = 600"),
    ({"image_std": [0.5, 0.0, 0.5]}, CheckpointError, "image_std"),
    ({"max_image_size": 980}, UserError, "fills no canvas"),
    ({"sharpen": True}, UnsupportedError, "sharpen"),
])  # fmt: skip
def test_settings(directory: Path, tmp_path: Path, settings: dict, error: type, message: str) -> None:
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    given = json.loads((directory / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(given | settings))
    with pytest.raises(error, match=message):
        Processor(tmp_path)


def test_the_model_s_facts_are_needed(directory: Path, tmp_path: Path) -> None:
    for file in directory.iterdir():
        if file.name != "config.json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match="neither runtime.json nor config.json"):
        Processor(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="vision_config"):
        Processor(tmp_path)
    (tmp_path / "runtime.json").write_text(json.dumps({"vision": {"patch_size": 70, "queries": [[49, 8]]}}))
    assert Processor(tmp_path).sample("What?", images()[:1]).length > 8
