"""Rotations are orthogonal to rounding, reproducible, and what they are said to be, for any size."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ecmfq_export.quant.hadamard import Rotation, block_hadamard, online_block, randomized_hadamard

EPS = torch.finfo(torch.float64).eps


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 300), seed=st.integers(0, 2**31))
def test_orthogonal_for_any_size(size, seed):
    matrix = randomized_hadamard(size, seed).matrix()
    assert (matrix @ matrix.t() - torch.eye(size, dtype=torch.float64)).abs().max() < 8 * EPS * math.sqrt(size)


@pytest.mark.parametrize(("size", "block"), [
    (2048, 2048), (4096, 4096), (768, 768), (1408, 1408), (96, 96), (128, 128), (64, 64), (160, 160), (12, 12), (20, 20), (28, 28),
    (36, 36), (44, 44), (5120, 5120), (7168, 7168), (11264, 11264), (6, 2), (92, 4), (7, 1), (1, 1), (2, 2),
])  # fmt: skip
def test_models_sizes_are_one_block_and_the_others_their_power_of_two(size, block):
    assert randomized_hadamard(size, 0).block == block


@pytest.mark.parametrize("size", [12, 20, 28, 36, 44, 60, 76, 96, 768])
def test_every_entry_has_the_same_magnitude(size):
    matrix = randomized_hadamard(size, 1).matrix()
    assert (matrix.abs() - size**-0.5).abs().max() < 4 * EPS


@pytest.mark.parametrize("size", [1, 7, 12, 96, 92, 128, 256, 1408])
def test_apply_is_the_matrix_and_invert_its_transpose(size):
    rotation = randomized_hadamard(size, 3)
    x = torch.randn(2, 3, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix = rotation.matrix()
    assert torch.allclose(rotation.apply(x), x @ matrix, rtol=0, atol=1e-13)
    assert torch.allclose(rotation.invert(x), x @ matrix.t(), rtol=0, atol=1e-13)
    assert rotation.apply(x.float()).dtype == torch.float32
    assert torch.allclose(rotation.invert(rotation.apply(x.float())), x.float(), atol=1e-5)
    assert rotation.apply(x[:0]).shape == (0, 3, size)


def test_a_seed_decides_the_signs():
    one, same, other = (randomized_hadamard(96, seed).signs for seed in (5, 5, 6))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert set(one.tolist()) == {-1.0, 1.0}


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 2048), limit=st.integers(1, 256))
def test_online_blocks_are_powers_of_two_that_divide(size, limit):
    block = online_block(size, limit)
    assert block & (block - 1) == 0 and block <= limit and size % block == 0
    assert 2 * block > limit or size % (2 * block)
    assert block_hadamard(size, limit).block == block


@pytest.mark.parametrize(("size", "block"), [(768, 128), (1408, 128), (96, 32), (11264, 128), (7, 1)])
def test_online_transform_undoes_itself_within_its_blocks(size, block):
    rotation = block_hadamard(size)
    x = torch.randn(4, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = rotation.apply(x)
    assert torch.allclose(rotation.apply(y), x, rtol=0, atol=1e-13) and torch.allclose(rotation.invert(x), y, rtol=0, atol=1e-13)
    assert torch.allclose(y.view(4, -1, block).norm(dim=-1), x.view(4, -1, block).norm(dim=-1))


def test_a_head_at_a_time():
    one = randomized_hadamard(12, 2)
    three = one.repeated(3)
    x = torch.randn(5, 36, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert torch.equal(three.apply(x), one.apply(x.view(5, 3, 12)).view(5, 36))


def test_one_large_channel_is_spread_over_all():
    x = torch.zeros(1, 768)
    x[0, 17] = 100.0
    assert torch.allclose(randomized_hadamard(768, 0).apply(x).abs(), torch.full((1, 768), 100 / 768**0.5), rtol=1e-5)


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="size 8 on"):
        randomized_hadamard(8, 0).apply(torch.zeros(3, 9))
    with pytest.raises(ValueError, match="size 0"):
        randomized_hadamard(0, 0)
    with pytest.raises(ValueError, match="blocks of 2"):
        Rotation(3, block_hadamard(2).factors)
    with pytest.raises(ValueError, match="at most 0"):
        online_block(4, 0)
