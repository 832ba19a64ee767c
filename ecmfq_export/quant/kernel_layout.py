"""The prepacked weight layout ``mma_s8``: how packed int4 expert weights are reordered for ``mma.sync.m16n8k32``.

This is the layout's definition; ``plugins/include/ecmfq/layout.cuh`` is the same in index math, and a test compares the two.

A tile is 32 rows by 32 columns, 512 bytes, one contiguous 16-byte load for each lane of a warp. Lane ``4 * g + t`` holds four
32-bit words; word ``w`` is row ``8 * w + g``, columns ``8 * t`` to ``8 * t + 7``, exactly as in the canonical layout (low nibble = even
column). So prepacking moves whole words:

    [E, N / 32, w=4, g=8, K / 32, t=4, 4 bytes]  ->  [E, N / 32, K / 32, g, t, w, 4 bytes]

Words 0 and 1 feed one 16-row instruction, words 2 and 3 a second. With ``interleave_gate_up`` the first 16 rows of tile ``n`` are gate
rows ``16 n .. 16 n + 15`` and the last 16 the matching up rows, so that the same lane ends with both halves of ``silu(gate) * up``.
Scales and group multipliers stay in canonical order. The result keeps the shape [E, N, K / 2], so both layouts pass the same shape checks.
"""

from __future__ import annotations

import numpy as np

from ecmfq_export.errors import UserError

TILE_ROWS = 32
TILE_COLS = 32
_WORD_BYTES = 4
_WORDS = 4
_LANE_ROWS = 8
_LANE_WORDS = 4


def check_tiles(rows: int, cols: int) -> None:
    """Raise UserError unless [rows, cols] weights can be prepacked: both must be positive multiples of 32."""
    if rows < 1 or cols < 1 or rows % TILE_ROWS or cols % TILE_COLS:
        raise UserError(f"weights of {rows} rows x {cols} columns cannot be prepacked as mma_s8",
                        f"rows must be a multiple of {TILE_ROWS} and columns of {TILE_COLS}; no kernel takes other sizes")


def prepack_mma_s8(qweight: np.ndarray, interleave_gate_up: bool) -> np.ndarray:
    """Reorder canonical packed int4 weights into the layout ``mma_s8``.

    Args:
        qweight: int8 [E, N, K / 2], two int4 a byte, low nibble = even column. For gate_up rows 0..N/2-1 are gate, the others up.
        interleave_gate_up: True for gate_up_proj, False for down_proj.

    Returns:
        int8 [E, N, K / 2], contiguous; the same bytes in another order.

    Raises:
        UserError: another dtype or rank, or N or K not a multiple of 32.
    """
    experts, rows, bytes_a_row = _checked(qweight)
    words = np.ascontiguousarray(qweight).view(np.uint8)
    if interleave_gate_up:
        # [E, gate/up, tile, row in half, bytes] -> [E, tile, gate/up, row in half, bytes]
        words = words.reshape(experts, 2, rows // TILE_ROWS, TILE_ROWS // 2, bytes_a_row).swapaxes(1, 2)
    words = words.reshape(experts, rows // TILE_ROWS, _WORDS, _LANE_ROWS, bytes_a_row * 2 // TILE_COLS, _LANE_WORDS, _WORD_BYTES)
    packed = words.transpose(0, 1, 4, 3, 5, 2, 6)
    return np.ascontiguousarray(packed).reshape(experts, rows, bytes_a_row).view(np.int8)


def unprepack_mma_s8(packed: np.ndarray, interleave_gate_up: bool) -> np.ndarray:
    """Inverse of :func:`prepack_mma_s8`: int8 [E, N, K / 2] in the layout ``mma_s8`` to canonical order.

    Raises:
        UserError: as there.
    """
    experts, rows, bytes_a_row = _checked(packed)
    words = np.ascontiguousarray(packed).view(np.uint8)
    words = words.reshape(experts, rows // TILE_ROWS, bytes_a_row * 2 // TILE_COLS, _LANE_ROWS, _LANE_WORDS, _WORDS, _WORD_BYTES)
    words = np.ascontiguousarray(words.transpose(0, 1, 5, 3, 2, 4, 6))
    if interleave_gate_up:
        words = words.reshape(experts, rows // TILE_ROWS, 2, TILE_ROWS // 2, bytes_a_row).swapaxes(1, 2)
    return np.ascontiguousarray(words).reshape(experts, rows, bytes_a_row).view(np.int8)


def _checked(qweight: np.ndarray) -> tuple[int, int, int]:
    if qweight.ndim != 3 or qweight.dtype != np.int8:
        raise UserError(f"qweight is {qweight.dtype} {list(qweight.shape)}, expected int8 [experts, rows, columns / 2]")
    experts, rows, bytes_a_row = qweight.shape
    check_tiles(rows, bytes_a_row * 2)
    return experts, rows, bytes_a_row
