"""The prepacked layout: Python's definition against its inverse, and against the kernels' own index math."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecmfq_export.errors import UserError
from ecmfq_export.quant.kernel_layout import prepack_mma_s8, unprepack_mma_s8
from tests.kernels import emulator as em

needs_compiler = pytest.mark.skipif(em.compiler() is None, reason="no C++ compiler: the kernels' index math cannot be built")


def random_weights(experts: int, row_tiles: int, col_tiles: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(-128, 128, (experts, 32 * row_tiles, 16 * col_tiles)).astype(np.int8)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 5), st.integers(1, 6), st.integers(1, 6), st.booleans(), st.integers(0, 1000))
def test_round_trip(experts: int, row_tiles: int, col_tiles: int, interleave: bool, seed: int) -> None:
    weights = random_weights(experts, row_tiles, col_tiles, seed)
    packed = prepack_mma_s8(weights, interleave)
    assert packed.shape == weights.shape and packed.dtype == np.int8 and packed.flags.c_contiguous
    assert np.array_equal(unprepack_mma_s8(packed, interleave), weights)
    assert np.array_equal(prepack_mma_s8(unprepack_mma_s8(weights, interleave), interleave), weights)


def test_a_strided_view_is_packed_like_its_copy() -> None:
    weights = random_weights(2, 2, 4, 0)
    view = weights[:, ::-1]
    assert np.array_equal(prepack_mma_s8(view, False), prepack_mma_s8(view.copy(), False))


def test_where_known_bytes_go() -> None:
    """By hand: lane 4 g + t, word w, holds row 8 w + g, columns 8 t ... of its 32 x 32 tile."""
    weights = np.zeros((1, 64, 32), np.int8)  # 64 rows x 64 columns: 2 x 2 tiles
    weights[0, 32 + 8 * 3 + 5, 16 + 4 * 2 + 1] = 77  # tile (1, 1), word 3, g = 5, t = 2, second byte
    assert int(np.flatnonzero(prepack_mma_s8(weights, False))[0]) == (1 * 2 + 1) * 512 + (4 * 5 + 2) * 16 + 3 * 4 + 1
    weights[:] = 0
    weights[0, 32 + 16 + 1, 0] = 9  # the second half of the rows is up: up row 17 joins gate row 17 in tile 1
    assert int(np.flatnonzero(prepack_mma_s8(weights, True))[0]) == (1 * 2 + 0) * 512 + (4 * 1) * 16 + 2 * 4


@pytest.mark.parametrize("shape", [(1, 48, 16), (1, 32, 24), (32, 16), (1, 0, 16), (1, 32, 0)])
def test_sizes_that_do_not_tile_are_refused(shape: tuple[int, ...]) -> None:
    for function in (prepack_mma_s8, unprepack_mma_s8):
        with pytest.raises(UserError, match="qweight is|cannot be prepacked"):
            function(np.zeros(shape, np.int8), False)


def test_another_dtype_is_refused() -> None:
    with pytest.raises(UserError, match="uint8"):
        prepack_mma_s8(np.zeros((1, 32, 16), np.uint8), False)


@pytest.fixture(scope="module")
def probe() -> ctypes.CDLL:
    return ctypes.CDLL(str(em.build("library")))


@needs_compiler
@pytest.mark.parametrize("rows,cols", [(32, 32), (96, 64), (64, 160), (192, 96)])
@pytest.mark.parametrize("gate_up", [False, True])
def test_index_math_of_the_kernels_is_the_same(probe: ctypes.CDLL, rows: int, cols: int, gate_up: bool) -> None:
    canonical = np.full(rows * cols // 2, -1, np.int64)
    probe.probe_canonical_bytes(int(gate_up), rows, cols, canonical.ctypes.data_as(ctypes.c_void_p))
    assert np.array_equal(np.sort(canonical), np.arange(canonical.size))  # a permutation: each byte once
    weights = random_weights(1, rows // 32, cols // 32, 3)
    assert np.array_equal(weights.reshape(-1)[canonical], prepack_mma_s8(weights, gate_up).reshape(-1))


@needs_compiler
def test_activation_order_matches_the_nibbles(probe: ctypes.CDLL) -> None:
    position = np.empty(32, np.int32)
    probe.probe_activation_positions(32, position.ctypes.data_as(ctypes.c_void_p))
    assert position[:8].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert np.array_equal(np.sort(position), np.arange(32))


@needs_compiler
def test_unpacking_gives_sixteen_times_each_nibble(probe: ctypes.CDLL) -> None:
    for word in np.random.default_rng(0).integers(0, 2**32, 500).tolist():
        nibbles = [(word >> 4 * i & 15) - 16 * (word >> 4 * i + 3 & 1) for i in range(8)]
        for name, wanted in (("probe_even_columns", nibbles[0::2]), ("probe_odd_columns", nibbles[1::2])):
            function = getattr(probe, name)
            function.restype = ctypes.c_uint32
            function.argtypes = [ctypes.c_uint32]
            assert np.array([function(word)], np.uint32).view(np.int8).tolist() == [16 * n for n in wanted]
