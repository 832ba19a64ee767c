"""InternVL's tiles as transformers' processor and model take them, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from ecmfq_export.errors import CheckpointError, UnsupportedError, UserError
from ecmfq_export.models.inputs import prepare_inputs
from ecmfq_export.models.moe_vlm import open_model
from ecmfq_export.models.torch_decoder import run_decoder
from ecmfq_export.runtime import host_inputs as host
from ecmfq_export.runtime.processor import Processor
from tests.tiny_internvl import TOKENS, build_internvl, internvl_config, make_internvl


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_internvl(tmp_path_factory.mktemp("internvl"), seed=4)


def images() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((40, 75), (60, 21), (12, 12))]


@torch.no_grad()
def test_images_from_pixels_to_logits_equal_transformers(directory: Path) -> None:
    """Three wide tiles or so with a small picture of all, a tall image, and one that is a single tile."""
    sample = Processor(directory).sample("What?", images())
    tiles = sample.image_grid_thw[:, 0].tolist()
    assert tiles[2] == 1 and min(tiles[:2]) >= 3 and (sample.image_grid_thw[:, 1:] == 4).all()
    places = [np.flatnonzero(sample.input_ids == TOKENS[name]) for name in ("<img>", "</img>")]
    assert (places[1] - places[0] - 1).tolist() == [4 * count for count in tiles]
    settings = json.loads((directory / "preprocessor_config.json").read_text())
    passed = {name: settings[name] for name in ("size", "min_patches", "max_patches", "image_mean", "image_std")}
    whole = GotOcr2ImageProcessorPil(**passed)(images(), crop_to_patches=True, return_tensors="pt")
    assert whole["num_patches"].tolist() == tiles
    ids = torch.from_numpy(sample.input_ids)[None]
    theirs = build_internvl(internvl_config(), seed=4)(input_ids=ids, pixel_values=whole["pixel_values"]).logits
    model = open_model(directory)
    torch.testing.assert_close(run_decoder(model, prepare_inputs(model, [sample])), theirs, atol=2e-5 * float(theirs.abs().max()), rtol=0)


@pytest.mark.parametrize("side", [4, 16, 32, 50])
def test_a_patch_of_a_tile_takes_its_own_entry(side: int) -> None:
    vision = host.HostVision(2, side * side, 588, "own", "raster", class_token=True)
    inputs = host.vision_inputs(np.array([[2, side, side], [1, side, side]]), vision)
    assert set(inputs) == {"interp_indices", "interp_weights", "segment_ids", "frame_ids"}
    own = host.merge_block_order(np.tile(np.arange(side * side), 3), np.array([[3, side, side]]), vision)
    np.testing.assert_array_equal(inputs["interp_indices"][:, 0], own)
    with pytest.raises(UserError, match="a tile is 2 patches long"):
        host.vision_inputs(np.array([[1, 2, side]]), vision)
    assert inputs["frame_ids"].tolist() == [0, 1, 2] and inputs["segment_ids"].tolist() == [n for n in range(3) for _ in range(side * side)]


@pytest.mark.parametrize(("settings", "error", "message"), [
    ({"resample": 2}, UnsupportedError, "resample = 2"),
    ({"size": {"height": 16, "width": 32}}, CheckpointError, "which are the same|size ="),
    ({"size": {"shortest_edge": 16}}, CheckpointError, "size ="),
    ({"size": {"height": 20, "width": 20}}, CheckpointError, "size ="),
    ({"max_patches": 1000}, CheckpointError, "max_patches = 1000"),
    ({"min_patches": 5}, CheckpointError, "min_patches = 5"),
    ({"image_mean": [0.5]}, CheckpointError, "image_mean"),
    ({"sharpen": True}, UnsupportedError, "sharpen"),
])  # fmt: skip
def test_settings(directory: Path, tmp_path: Path, settings: dict, error: type, message: str) -> None:
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    given = json.loads((directory / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(given | settings))
    with pytest.raises(error, match=message):
        Processor(tmp_path)
