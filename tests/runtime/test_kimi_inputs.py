"""Kimi's images, prompts and positions, against transformers' own functions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding
from transformers.vision_utils import get_vision_interpolation_indices_and_weights

from ecmfq_export.errors import CheckpointError, UnsupportedError, UserError
from ecmfq_export.runtime import host_inputs as host
from ecmfq_export.runtime.preprocessors import NavitPreprocessor, load_preprocessor
from ecmfq_export.runtime.processor import Processor
from tests.tiny_kimi import MEDIA_END, MEDIA_PAD, MEDIA_START, kimi_config, write_processor_files

VISION = host.HostVision(2, 36, 48, "bicubic", "raster")
ROPE = host.HostRope("rope", 10000.0, (), 8)
PUBLISHED = {
    "image_processor_type": "KimiVLImageProcessor", "in_token_limit": 4096, "patch_size": 14, "pad_input": True,
    "merge_kernel_size": [2, 2], "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
}  # fmt: skip


def preprocessor(tmp_path: Path, **settings) -> NavitPreprocessor:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    return load_preprocessor(tmp_path)


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_patches_are_the_padded_image_in_raster_order(tmp_path: Path) -> None:
    image = noise(30, 50)
    patches, grids = preprocessor(tmp_path, **PUBLISHED)([image])
    assert grids.tolist() == [[1, 4, 4]] and patches.shape == (16, 588) and patches.dtype == np.float32
    whole = patches.reshape(4, 4, 3, 14, 14).transpose(0, 3, 1, 4, 2).reshape(56, 56, 3)
    expected = np.asarray(image, np.float32) / 127.5 - 1
    np.testing.assert_allclose(whole[:50, :30], expected, atol=1e-6)
    assert (whole[50:] == -1).all() and (whole[:, 30:] == -1).all()


# What transformers' navit_resize gives for images of that size, a limit of patches, and at most 100 patches a side: width and height
# before padding, rows and columns of patches after it.
NAVIT = [
    ((14, 14), 64, (14, 14), (2, 2)),
    ((14, 14), 4096, (14, 14), (2, 2)),
    ((27, 29), 64, (27, 29), (4, 2)),
    ((27, 29), 4096, (27, 29), (4, 2)),
    ((1000, 700), 64, (134, 93), (8, 10)),
    ((1000, 700), 4096, (1000, 700), (50, 72)),
    ((3000, 200), 64, (438, 29), (4, 32)),
    ((3000, 200), 4096, (1400, 93), (8, 100)),
    ((1, 900), 64, (1, 900), (66, 2)),
    ((1, 900), 4096, (1, 900), (66, 2)),
    ((4032, 3024), 64, (129, 96), (8, 10)),
    ((4032, 3024), 4096, (1034, 775), (56, 74)),
]


@pytest.mark.parametrize(("size", "limit", "resized", "grid"), NAVIT)
def test_sizes_of_transformers_processor(tmp_path: Path, size: tuple[int, int], limit: int, resized: tuple, grid: tuple) -> None:
    ours = preprocessor(tmp_path, image_processor_type="Kimi_K25ImageProcessor", max_patches=limit,
                        size={"max_height": 100, "max_width": 100})
    assert ours.resized(*size) == resized
    _, grids = ours([noise(*size)])
    assert grids.tolist() == [[1, *grid]]


@pytest.mark.parametrize("size", [(1000, 700), (640, 480), (4032, 3024)])
def test_published_shrinking(tmp_path: Path, size: tuple[int, int]) -> None:
    """The published rule: scale by the square root of the excess of whole patches, round sides down."""
    width, height = size
    found = preprocessor(tmp_path, **PUBLISHED).resized(width, height)
    count = (width // 14) * (height // 14)
    scale = (4096 / count) ** 0.5 if count > 4096 else 1.0
    assert found == (int(width * scale), int(height * scale))


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"pad_input": False}, UnsupportedError, "pad_input = False"),
    ({"do_resize": False}, UnsupportedError, "do_resize"),
    ({"merge_kernel_size": [2, 1]}, CheckpointError, "merge"),
    ({"image_std": [0.5, 0.0, 0.5]}, CheckpointError, "std"),
    ({"in_token_limit": "many"}, CheckpointError, "many"),
    ({"sharpness": 2}, UnsupportedError, "sharpness"),
    ({"image_processor_type": "SiglipImageProcessor"}, UnsupportedError, "(?s)Siglip.*KimiVLImageProcessor"),
])  # fmt: skip
def test_other_settings_are_refused(tmp_path: Path, change: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        preprocessor(tmp_path, **PUBLISHED | change)


def test_cropping_by_default_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="cropping"):
        preprocessor(tmp_path, **{key: value for key, value in PUBLISHED.items() if key != "pad_input"})


def test_an_image_without_rotary_angles_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="511 a side"):
        preprocessor(tmp_path, **PUBLISHED)([noise(14 * 520, 20)])


def test_prompts(tmp_path: Path) -> None:
    write_processor_files(tmp_path, kimi_config())
    processor = Processor(tmp_path)
    sample = processor.sample("What?", [noise(8, 8), noise(20, 9)], answer="A.")
    ids = sample.input_ids.tolist()
    assert processor.image_token_id == MEDIA_PAD
    assert sample.image_grid_thw.tolist() == [[1, 2, 2], [1, 4, 6]] and sample.pixel_values.shape == (28, 48)
    runs = [i for i, token in enumerate(ids) if token == MEDIA_PAD]
    assert len(runs) == 1 + 6 and ids.count(MEDIA_START) == ids.count(MEDIA_END) == 2
    assert processor.decode(sample.input_ids[sample.answer_mask]) == "A."
    with pytest.raises(UserError, match="media_pad"):
        processor.sample("an <|media_pad|>")


def test_positions_and_tables_are_deepseek_s() -> None:
    config = kimi_config().text_config
    types = np.array([[0, 0, 1, 1, 1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0, 0, 0]])
    positions, deltas = host.decoder_positions(types, [10, 3], np.array([[1, 4, 6], [1, 2, 2]]), 2, "rope")
    assert (positions[:, 0] == np.arange(10)).all() and (positions[:, 1, :3] == np.arange(3)).all() and (deltas == 0).all()
    assert (host.decode_positions([10, 3], deltas)[:, :, 0] == [10, 3]).all()
    cos, sin = host.rope_tables(ROPE, positions)
    theirs = DeepseekV3RotaryEmbedding(config)(torch.zeros(1), torch.from_numpy(positions[0]))
    for ours, expected in zip((cos, sin), theirs, strict=True):
        np.testing.assert_allclose(ours, expected[..., :4].numpy(), atol=1e-6)
    with pytest.raises(UserError, match="needs 6 tokens"):
        host.decoder_positions(types[:, :5], [5, 3], np.array([[1, 4, 6], [1, 2, 2]]), 2, "rope")


def test_vision_inputs_are_transformers_in_merge_block_order() -> None:
    grids = np.array([[1, 4, 6], [1, 2, 8], [1, 6, 6], [1, 10, 2]])
    ours = host.vision_inputs(grids, VISION)
    indices, weights = get_vision_interpolation_indices_and_weights(
        torch.from_numpy(grids), 6, mode="bicubic", align_corners=False, spatial_merge_size=2)
    np.testing.assert_array_equal(ours["interp_indices"], indices.numpy())
    np.testing.assert_allclose(ours["interp_weights"], weights.numpy(), atol=1e-6)
    # Patches reordered as the inputs are: number each patch, and see that its place is its number.
    start = 0
    for frames, rows, columns in grids.tolist():
        count = frames * rows * columns
        numbers = host.merge_block_order(np.arange(count)[:, None], np.array([[frames, rows, columns]]), VISION)[:, 0]
        places = ours["rope_positions"][start : start + count]
        np.testing.assert_array_equal(places[:, 0] * columns + places[:, 1], numbers)
        start += count
    several = host.merge_block_order(np.arange(start)[:, None], grids, VISION)[:, 0]
    assert sorted(several) == list(range(start)) and several[24] == 24
    assert host.merge_block_order(several, grids, host.HostVision(2, 36, 48)) is several
    with pytest.raises(UserError, match="nearest"):
        host.vision_inputs(grids, host.HostVision(2, 36, 48, "nearest"))
