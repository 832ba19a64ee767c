"""Weight-only int4 against loops over single values, and its way to the integer kernels' form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ecmfq_export.errors import UnsupportedError, UserError
from ecmfq_export.quant.integer_scales import fit_multipliers, to_integer_scales
from ecmfq_export.quant.qtensor import QTensor
from ecmfq_export.quant.rtn import quantize_rtn
from ecmfq_export.quant.weight_only import WeightOnly, of_qtensor


def random_weight(
    lead: tuple[int, ...], rows: int, columns: int, group_size: int, seed: int, zeros: bool = False, order: bool = False,
) -> WeightOnly:  # fmt: skip
    rng = np.random.default_rng(seed)
    groups = -(-columns // group_size)
    index = np.stack([rng.permutation(np.arange(columns) // group_size) for _ in range(int(np.prod(lead)))]).reshape(*lead, columns)
    return WeightOnly(
        torch.from_numpy(rng.integers(0, 16, (*lead, rows, columns)).astype(np.uint8)),
        torch.from_numpy((2.0 ** rng.uniform(-9, -5, (*lead, rows, groups))).astype(np.float16).astype(np.float32)),
        torch.from_numpy(rng.integers(0, 16, (*lead, rows, groups)).astype(np.uint8)) if zeros else None,
        group_size,
        torch.from_numpy(index) if order else None,
    )


def values(weight: WeightOnly) -> np.ndarray:
    """Computed one by one."""
    q, s = weight.qvalue.numpy().astype(np.int64), weight.scale.numpy()
    out = np.empty(q.shape, np.float32)
    for place in np.ndindex(q.shape):
        *lead, row, column = place
        group = column // weight.group_size if weight.group_index is None else int(weight.group_index[(*lead, column)])
        zero = 8 if weight.zero_point is None else int(weight.zero_point[(*lead, row, group)])
        out[place] = np.float32(q[place] - zero) * s[(*lead, row, group)]
    return out


cases = given(st.sampled_from([8, 16, 24]), st.booleans(), st.booleans(), st.integers(0, 2**31))


@cases
def test_dequantizes(group_size: int, zeros: bool, order: bool, seed: int) -> None:
    weight = random_weight((2,), 5, 48, group_size, seed, zeros, order)
    assert np.array_equal(weight.dequantize().numpy(), values(weight))


@cases
def test_group_order_is_the_same_weight(group_size: int, zeros: bool, order: bool, seed: int) -> None:
    weight = random_weight((2,), 5, 48, group_size, seed, zeros, order)
    moved, where = weight.in_group_order()
    assert moved.group_index is None and (where is None) == (not order)
    if where is not None:
        expected = np.take_along_axis(values(weight), where.numpy()[:, None, :].repeat(5, 1), -1)
        assert np.array_equal(moved.dequantize().numpy(), expected)


def test_rows_in_another_order() -> None:
    weight = random_weight((3,), 6, 32, 16, 1, zeros=True)
    order = torch.stack([torch.randperm(6, generator=torch.Generator().manual_seed(i)) for i in range(3)])
    assert torch.equal(weight.take_rows(order).dequantize(), weight.dequantize().gather(1, order[..., None].expand(3, 6, 32)))


@pytest.mark.parametrize("group_size", [-1, 128])
def test_of_the_kernels_form(group_size: int) -> None:
    weight = quantize_rtn(torch.randn(2, 8, 256, generator=torch.Generator().manual_seed(0)), 4, group_size)
    assert torch.equal(of_qtensor(weight).dequantize(), weight.dequantize())


@given(st.sampled_from([64, 128, 384]), st.booleans(), st.integers(0, 2**31))
def test_one_scale_a_channel_is_carried_exactly(columns: int, grouped: bool, seed: int) -> None:
    weight = random_weight((2,), 4, columns, columns, seed)
    grouped = grouped and columns % 128 == 0
    result, error = to_integer_scales(weight, grouped)
    assert error == 0 and result.group_size == (128 if grouped else -1)
    assert torch.equal(result.dequantize(), weight.dequantize())


@given(st.sampled_from([128, 256]), st.integers(0, 2**31))
def test_group_scales_become_the_nearest_multipliers(group_size: int, seed: int) -> None:
    weight = random_weight((2,), 4, 1024, group_size, seed)
    result, error = to_integer_scales(weight, True)
    assert torch.equal(result.qvalue, weight.integer())
    wanted = weight.dequantize()
    assert error == pytest.approx(float((result.dequantize() - wanted).norm() / wanted.norm()), rel=1e-3)
    assert error < 0.005  # a multiplier near 127 is off by half a step at most


def test_multipliers_are_the_best_of_all_that_were_tried() -> None:
    generator = torch.Generator().manual_seed(3)
    wanted, mass = torch.rand(50, 6, generator=generator) * 0.01 + 1e-3, torch.rand(50, 6, generator=generator)
    scale, multiplier = fit_multipliers(wanted, mass)
    best = (mass * (scale[:, None] * multiplier - wanted).square()).sum(-1)
    for top in range(64, 128):
        other = (wanted.amax(-1) / top).half().float()
        found = (mass * (other[:, None] * (wanted / other[:, None]).round().clamp(1, 127) - wanted).square()).sum(-1)
        assert bool((best <= found * (1 + 1e-6)).all())
    equal, ones = fit_multipliers(torch.full((1, 4), 0.25), torch.ones(1, 4))
    assert equal.item() == 0.25 and ones.tolist() == [[1, 1, 1, 1]]


def test_what_kernels_cannot_hold_is_named() -> None:
    for weight, grouped, message in (
        (random_weight((), 4, 256, 128, 0, zeros=True), True, "zero points"),
        (random_weight((), 4, 256, 128, 0, order=True), True, "activation order"),
        (random_weight((), 4, 256, 64, 0), True, "groups of 64 among 256"),
        (random_weight((), 4, 96, 96, 0), True, "groups of 96 among 96"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            to_integer_scales(weight, grouped)
    weight = random_weight((), 4, 64, 64, 0)
    weight.scale[0, 0] = -1.0
    with pytest.raises(UnsupportedError, match="positive"):
        to_integer_scales(weight, False)


def test_a_group_of_scale_zero_is_zero() -> None:
    weight = random_weight((), 4, 256, 128, 0)
    weight.scale[2, 1] = 0.0
    result, _ = to_integer_scales(weight, True)
    assert not result.qvalue[2, 128:].any() and result.qvalue[2, :128].any()


def test_damaged_groups() -> None:
    weight = random_weight((), 4, 32, 16, 0, order=True)
    weight.group_index[:] = 0
    with pytest.raises(UserError, match="do not hold 16 columns"):
        weight.in_group_order()
    with pytest.raises(UserError, match="span"):
        WeightOnly(weight.qvalue, weight.scale, None, 16, weight.group_index + 2)
    with pytest.raises(UserError, match="scale is"):
        WeightOnly(weight.qvalue, weight.scale, None, 8)


def test_minus_eight_in_the_kernels_form() -> None:
    weight = QTensor(torch.full((2, 8), -8, dtype=torch.int8), torch.ones(2), 4)
    assert torch.equal(weight.dequantize(), torch.full((2, 8), -8.0))
    with pytest.raises(UserError, match="spans"):
        QTensor(torch.full((2, 8), -9, dtype=torch.int8), torch.ones(2), 4)
