"""Packing of other quantizers, against packers written word by word from their formats' descriptions, and compressed-tensors' own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from hypothesis import given
from hypothesis import strategies as st

from ecmfq_export.quant import int4_words


def word(values: list[int]) -> int:
    """Eight nibbles, the first one lowest, as a signed 32-bit integer."""
    total = sum(int(value) << (4 * i) for i, value in enumerate(values))
    return total - 2**32 if total >= 2**31 else total


def pack_gptq(values: np.ndarray) -> torch.Tensor:
    """[N, K] as ``qweight`` [K / 8, N]: word (i, n) holds inputs 8 i to 8 i + 7 of output n."""
    n, k = values.shape
    return torch.tensor([[word(values[row, 8 * i : 8 * i + 8]) for row in range(n)] for i in range(k // 8)], dtype=torch.int32)


def pack_gptq_zeros(zeros: np.ndarray, minus_one: bool) -> torch.Tensor:
    """[N, G] as ``qzeros`` [G, N / 8]; v1 subtracts one from each nibble of the word as from one 32-bit number."""
    words = [[word(zeros[8 * i : 8 * i + 8, g]) for i in range(zeros.shape[0] // 8)] for g in range(zeros.shape[1])]
    numbers = np.array(words, dtype=np.int64) - (0x11111111 if minus_one else 0)
    return torch.from_numpy(numbers.astype(np.uint32).view(np.int32).copy())


def pack_awq(values: np.ndarray) -> torch.Tensor:
    """[N, K] as ``qweight`` [K, N / 8]: the nibbles of a word are its outputs 0, 2, 4, 6, 1, 3, 5, 7."""
    n, k = values.shape
    return torch.tensor([[word([values[8 * i + o, column] for o in (0, 2, 4, 6, 1, 3, 5, 7)]) for i in range(n // 8)]
                         for column in range(k)], dtype=torch.int32)  # fmt: skip


shapes = st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(0, 2**31))


def integers(rows: int, columns: int, seed: int, high: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, high, (rows, columns)).astype(np.uint8)


@given(shapes)
def test_gptq(shape: tuple[int, int, int]) -> None:
    values = integers(8 * shape[0], 8 * shape[1], shape[2])
    assert np.array_equal(int4_words.unpack_gptq_weight(pack_gptq(values)).numpy(), values)


@given(shapes, st.booleans())
def test_gptq_zeros(shape: tuple[int, int, int], minus_one: bool) -> None:
    """Zero points of 0 too, which borrow from their neighbours where they are stored less one."""
    zeros = integers(8 * shape[0], shape[1], shape[2])
    assert np.array_equal(int4_words.unpack_gptq_zeros(pack_gptq_zeros(zeros, minus_one), minus_one).numpy(), zeros)


def test_symmetric_zeros_are_sevens() -> None:
    assert pack_gptq_zeros(np.full((8, 1), 8, np.uint8), True).item() == 0x77777777


@given(shapes)
def test_awq(shape: tuple[int, int, int]) -> None:
    values = integers(8 * shape[0], 3 * shape[1], shape[2])
    assert np.array_equal(int4_words.unpack_awq(pack_awq(values)).numpy(), values)


@pytest.mark.parametrize("columns", [8, 96, 100, 129])
def test_compressed_tensors(columns: int) -> None:
    values = integers(13, columns, columns)
    signed = torch.from_numpy(values.astype(np.int8) - 8)
    assert np.array_equal(int4_words.unpack_rows(pack_to_int32(signed, 4), columns).numpy(), values)
    assert np.array_equal(int4_words.unpack_columns(pack_to_int32(signed, 4, packed_dim=0), 13).numpy(), values)
