"""Host inputs against transformers' own functions."""

import numpy as np
import pytest
import torch
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeModel, Qwen3VLMoeTextRotaryEmbedding
from transformers.vision_utils import (
    get_vision_attention_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
)

from ecmfq_export.errors import UserError
from ecmfq_export.runtime import host_inputs as host
from tests.tiny_models import IMAGE_TOKEN_ID, build_qwen3_vl_moe, qwen3_vl_moe_config

ROPE = host.HostRope("mrope_interleaved", 10000.0, (6, 5, 5), 32)
VISION = host.HostVision(2, 36, 96)
GRIDS = [[1, 4, 6], [1, 8, 2], [1, 2, 2]]


@pytest.fixture(scope="module")
def model() -> Qwen3VLMoeModel:
    return build_qwen3_vl_moe(qwen3_vl_moe_config()).model


def prompt(*parts: int | list[int]) -> list[int]:
    """Numbers are runs of text, grids are images."""
    ids: list[int] = []
    for part in parts:
        ids += [7] * part if isinstance(part, int) else [IMAGE_TOKEN_ID] * (part[0] * part[1] * part[2] // 4)
    return ids


@pytest.mark.parametrize(
    ("prompts", "grids"),
    [
        ([prompt(5)], []),
        ([prompt(3, GRIDS[0], 4)], [GRIDS[0]]),
        ([prompt(2, GRIDS[0], 2, GRIDS[1], 3, GRIDS[2])], GRIDS),
        ([prompt(1, GRIDS[1], 2), prompt(9), prompt(GRIDS[0], 1, GRIDS[2], 30)], [GRIDS[1], GRIDS[0], GRIDS[2]]),
        ([prompt(2, [3, 4, 6], 5)], [[3, 4, 6]]),
    ],
    ids=["text", "one image", "three images", "ragged batch", "frames"],
)
def test_positions_equal_get_rope_index(model, prompts, grids):
    lengths = [len(p) for p in prompts]
    ids = np.zeros((len(prompts), max(lengths)), np.int64)
    for row, tokens in enumerate(prompts):
        ids[row, : len(tokens)] = tokens
    types = host.token_types(ids, IMAGE_TOKEN_ID)
    valid = np.arange(ids.shape[1]) < np.asarray(lengths)[:, None]
    expected, deltas = model.get_rope_index(
        torch.from_numpy(ids), torch.from_numpy(types), image_grid_thw=torch.tensor(grids) if grids else None,
        attention_mask=torch.from_numpy(valid.astype(np.int64)),
    )  # fmt: skip
    positions, ours = host.decoder_positions(types, lengths, np.array(grids).reshape(-1, 3), 2)
    np.testing.assert_array_equal(positions, expected.numpy())
    np.testing.assert_array_equal(ours, deltas.numpy()[:, 0])
    np.testing.assert_array_equal(host.decode_positions(lengths, ours)[1, :, 0], np.asarray(lengths) + ours)


@pytest.mark.parametrize("theta", [10000.0, 5_000_000.0])
def test_rope_tables_equal_the_rotary_embedding(theta):
    config = qwen3_vl_moe_config(head_dim=128, rope_parameters={
        "rope_type": "default", "rope_theta": theta, "mrope_interleaved": True, "mrope_section": [24, 20, 20]})  # fmt: skip
    rotary = Qwen3VLMoeTextRotaryEmbedding(config.text_config)
    positions = np.random.default_rng(0).integers(0, 4096, (3, 2, 50))
    cos, sin = rotary(torch.zeros(1), torch.from_numpy(positions))
    ours = host.rope_tables(host.HostRope("mrope_interleaved", theta, (24, 20, 20), 128), positions)
    assert ours[0].shape == (2, 50, 64) and ours[0].dtype == np.float32
    # One ulp of a float32 frequency at position 4096 is 2.4e-4 radians at most, and only where transformers' power is not
    # correctly rounded; most frequencies are equal bit for bit.
    for table, expected in zip(ours, (cos, sin), strict=True):
        np.testing.assert_allclose(table, expected[..., :64].numpy(), atol=3e-4)
    exact = np.mean([np.mean(t == e[..., :64].numpy()) for t, e in zip(ours, (cos, sin), strict=True)])
    assert exact > 0.6
    near = np.arange(60)[None, None].repeat(3, 0)
    cos, _ = rotary(torch.zeros(1), torch.from_numpy(near))
    np.testing.assert_allclose(
        host.rope_tables(host.HostRope("mrope_interleaved", theta, (24, 20, 20), 128), near)[0],
        cos[..., :64].numpy(),
        atol=5e-6,
    )


def test_rope_refusals():
    positions = np.zeros((3, 1, 1), np.int64)
    with pytest.raises(UserError, match="not supported"):
        host.rope_tables(host.HostRope("yarn", 1e4, (6, 5, 5), 32), positions)
    with pytest.raises(UserError, match="sum to 15"):
        host.rope_tables(host.HostRope("mrope_interleaved", 1e4, (5, 5, 5), 32), positions)


def test_mask_shows_each_query_its_past():
    mask = host.attention_mask([0, 3], 2, 6, np.float16)
    assert mask.shape == (2, 1, 2, 6) and mask.dtype == np.float16 and np.isfinite(mask).all()
    visible = mask[:, 0] == 0
    assert visible.sum(-1).tolist() == [[1, 2], [4, 5]]
    assert np.float16(mask.min()) + np.float16(-1000) > -np.inf
    with pytest.raises(UserError, match="cache of 6"):
        host.attention_mask([5], 2, 6)


@pytest.mark.parametrize("grids", [GRIDS, [[1, 12, 14]], [[2, 4, 4], [1, 2, 6]]])
def test_vision_inputs_equal_transformers(model, grids):
    tensor = torch.tensor(grids)
    visual = model.visual
    indices, weights = get_vision_interpolation_indices_and_weights(
        tensor, num_grid_per_side=visual.num_grid_per_side, mode=visual.interpolation_mode,
        align_corners=visual.interpolation_align_corners, spatial_merge_size=2,
    )  # fmt: skip
    ours = host.vision_inputs(np.array(grids), VISION)
    np.testing.assert_array_equal(ours["interp_indices"], indices.numpy())
    np.testing.assert_array_equal(ours["interp_weights"], weights.numpy())
    np.testing.assert_array_equal(ours["rope_positions"], get_vision_position_ids(tensor, 2).numpy())
    boundaries, _ = get_vision_attention_seqlens(tensor, visual.config)
    lengths = np.diff(boundaries.numpy())
    np.testing.assert_array_equal(ours["segment_ids"], np.repeat(np.arange(len(lengths)), lengths))


def test_vision_refusals():
    with pytest.raises(UserError, match="2 x 2"):
        host.vision_inputs(np.array([[1, 3, 4]]), VISION)
    with pytest.raises(UserError, match="no images"):
        host.vision_inputs(np.zeros((0, 3), np.int64), VISION)
    with pytest.raises(UserError, match="no square"):
        host.vision_inputs(np.array([[1, 2, 2]]), host.HostVision(2, 35, 96))


def test_features_land_on_their_tokens():
    types = np.array([[0, 1, 1, 0], [1, 0, 0, 0]])
    features = np.arange(6, dtype=np.float16).reshape(3, 2) + 1
    dense = host.scatter_features(types, features)
    assert dense[0, 1].tolist() == [1, 2] and dense[1, 0].tolist() == [5, 6] and dense[0, 0].tolist() == [0, 0]
    with pytest.raises(UserError, match="3 image tokens for 2"):
        host.scatter_features(types, features[:2])


def test_images_and_tokens_must_match():
    types = host.token_types(np.array([prompt(1, GRIDS[2], 1)]), IMAGE_TOKEN_ID)
    for grids, message in [(GRIDS[:1], "needs 6 tokens"), ([], "more than the 0"), ([GRIDS[2]] * 2, "2 images for 1")]:
        with pytest.raises(UserError, match=message):
            host.decoder_positions(types, [3], np.array(grids).reshape(-1, 3), 2)


def test_spec_from_runtime_json_names_what_is_missing():
    with pytest.raises(UserError, match="vision"):
        host.HostSpec.from_runtime_json({"rope": {}})
