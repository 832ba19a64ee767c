"""Integer tensors, packing, rounding to nearest and per-token activations."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ecmfq_export.errors import UnsupportedError, UserError
from ecmfq_export.quant.activation import fake_quantize_per_token, quantize_per_token
from ecmfq_export.quant.pack import pack_int4, unpack_int4
from ecmfq_export.quant.qtensor import QTensor, cat_rows, round_scale
from ecmfq_export.quant.rtn import quantize_rtn


@given(st.lists(st.lists(st.integers(-8, 7), min_size=6, max_size=6), min_size=1, max_size=5))
def test_packing_round_trip(rows):
    values = torch.tensor(rows, dtype=torch.int8)
    packed = pack_int4(values)
    assert packed.shape == (len(rows), 3) and packed.dtype == torch.int8
    assert torch.equal(unpack_int4(packed), values)
    assert torch.equal(pack_int4(unpack_int4(packed)), packed)


def test_low_nibble_is_the_even_index():
    assert pack_int4(torch.tensor([1, -2], dtype=torch.int8)).item() == 1 | (14 << 4) - 256
    assert torch.equal(unpack_int4(torch.tensor([0xE1], dtype=torch.uint8)), torch.tensor([1, -2], dtype=torch.int8))


def test_every_byte_unpacks_and_packs_back():
    packed = torch.arange(-128, 128).to(torch.int8)
    assert torch.equal(pack_int4(unpack_int4(packed)), packed)


@pytest.mark.parametrize("bad", [torch.zeros(3, dtype=torch.int8), torch.zeros(2), torch.tensor([8, 0], dtype=torch.int8)])
def test_packing_refuses(bad):
    with pytest.raises(UserError):
        pack_int4(bad)


def test_per_token_rounds_half_to_even_and_hits_the_ends():
    q, scale = quantize_per_token(torch.tensor([[127.0, 0.5, 1.5, -2.5, -127.0]]))
    assert scale.item() == 1.0
    assert q.tolist() == [[127, 0, 2, -2, -127]]


def test_per_token_zero_and_subnormal_rows():
    q, scale = quantize_per_token(torch.tensor([[0.0, 0.0], [1e-40, -1e-42], [1e-30, -1e-30]]))
    assert q.tolist() == [[0, 0], [0, 0], [127, -127]]
    assert bool((scale == torch.tensor(1e-30) / 127).all())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_per_token_refuses_what_is_not_finite(value):
    with pytest.raises(UserError, match="1 of 2 tokens"):
        quantize_per_token(torch.tensor([[1.0, value], [1.0, 2.0]]))


@given(st.integers(0, 10_000), st.floats(-20, 20))
@settings(deadline=None, max_examples=30)
def test_per_token_error_is_half_a_step(seed, log_scale):
    x = torch.randn(4, 17, generator=torch.Generator().manual_seed(seed)) * 10.0**log_scale
    q, scale = quantize_per_token(x)
    assert int(q.abs().amax(-1).min()) == 127
    assert bool(((q.float() * scale - x).abs() <= scale * 0.5001).all())
    assert torch.equal(fake_quantize_per_token(x), q.float() * scale)


def test_per_token_computes_half_precision_inputs_in_float32():
    x = torch.randn(3, 8).half()
    assert torch.equal(quantize_per_token(x)[1], quantize_per_token(x.float())[1])


@given(st.integers(0, 10_000), st.sampled_from([4, 8]), st.sampled_from([-1, 128]), st.sampled_from(["absmax", "mse"]))
@settings(deadline=None, max_examples=30)
def test_rtn_is_on_the_grid_and_the_search_never_hurts(seed, bits, group_size, clip):
    weight = torch.randn(2, 5, 256, generator=torch.Generator().manual_seed(seed)) * torch.logspace(-3, 1, 5)[:, None]
    q = quantize_rtn(weight, bits, group_size, clip)
    error = (q.dequantize() - weight).square().sum(-1)
    assert torch.allclose(q.integer().float() * q.scale.unsqueeze(-1), q.dequantize())
    assert torch.equal(q.scale.half().float(), q.scale)
    if group_size == -1:
        assert bool((error <= (quantize_rtn(weight, bits).dequantize() - weight).square().sum(-1) * (1 + 1e-5)).all())
    requantized = quantize_rtn(q.dequantize(), bits, group_size)
    if clip == "absmax" and group_size == -1:
        assert torch.equal(requantized.qvalue, q.qvalue)


def test_groups_follow_outliers_that_one_scale_cannot():
    weight = torch.randn(1, 4, 256, generator=torch.Generator().manual_seed(1))
    weight[..., :128] *= 20
    def second_half_error(q):
        return (q.dequantize() - weight)[..., 128:].square().mean()
    assert second_half_error(quantize_rtn(weight, 4, 128)) < 0.1 * second_half_error(quantize_rtn(weight, 4))


def test_weighted_clip_search_follows_the_importance():
    weight = torch.randn(1, 8, 64, generator=torch.Generator().manual_seed(0))
    weight[..., 0] = 9.0
    importance = torch.ones(1, 64)
    importance[..., 0] = 1e4
    kept = quantize_rtn(weight, 4, clip="mse", importance=importance).dequantize()[..., 0]
    clipped = quantize_rtn(weight, 4, clip="mse").dequantize()[..., 0]
    assert bool((kept > clipped).all()) and torch.allclose(kept, torch.tensor(9.0), rtol=0.05)


def test_chunks_do_not_change_the_result():
    weight = torch.randn(6, 4, 32, generator=torch.Generator().manual_seed(0))
    whole, parts = quantize_rtn(weight, 4, clip="mse"), quantize_rtn(weight, 4, clip="mse", max_bytes=1)
    assert torch.equal(whole.qvalue, parts.qvalue) and torch.equal(whole.scale, parts.scale)


def test_zero_channel_and_tiny_channel():
    weight = torch.zeros(1, 2, 8)
    weight[0, 1] = 1e-9
    q = quantize_rtn(weight, 4)
    assert not q.dequantize().any() and q.scale[0, 0] == 1.0 and q.scale[0, 1] == 2.0**-24


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e9])
def test_rtn_refuses_what_no_scale_can_hold(value):
    weight = torch.ones(1, 2, 8)
    weight[0, 0, 0] = value
    with pytest.raises(UserError):
        quantize_rtn(weight, 4)


def test_unsupported_bits_and_groups():
    with pytest.raises(UnsupportedError, match="num_bits = 5"):
        quantize_rtn(torch.ones(2, 128), 5)
    with pytest.raises(UnsupportedError, match="divide 96"):
        quantize_rtn(torch.ones(2, 96), 4, 128)
    with pytest.raises(UnsupportedError, match="group_size = 64"):
        quantize_rtn(torch.ones(2, 128), 4, 64)


def good() -> dict:
    return {"qvalue": torch.zeros(2, 128, dtype=torch.int8), "scale": torch.ones(2), "num_bits": 4}


@pytest.mark.parametrize("change", [
    {"qvalue": torch.full((2, 128), 8, dtype=torch.int8)},
    {"qvalue": torch.full((2, 128), -9, dtype=torch.int8)},
    {"qvalue": torch.full((2, 128), -128, dtype=torch.int8), "num_bits": 8},
    {"qvalue": torch.zeros(2, 128)},
    {"scale": torch.ones(3)},
    {"scale": torch.ones(2).double()},
    {"scale": torch.tensor([1.0, 0.0])},
    {"scale": torch.tensor([1.0, float("nan")])},
    {"scale": torch.tensor([1.0, float("inf")])},
    {"scale": torch.tensor([1.0, 0.1])},
    {"num_bits": 5},
    {"group_multiplier": torch.ones(2, 1, dtype=torch.int8)},
    {"group_size": 128},
    {"group_size": 128, "group_multiplier": torch.zeros(2, 1, dtype=torch.int8)},
    {"group_size": 128, "group_multiplier": torch.ones(2, 2, dtype=torch.int8)},
])  # fmt: skip
def test_qtensor_refuses(change):
    with pytest.raises(UserError):
        QTensor(**(good() | change))


def test_rows_and_cat_are_inverse():
    q = quantize_rtn(torch.randn(3, 10, 128, generator=torch.Generator().manual_seed(0)), 4, 128)
    again = cat_rows([q.rows(0, 4), q.rows(4, 10)])
    assert torch.equal(again.qvalue, q.qvalue) and torch.equal(again.scale, q.scale)
    assert torch.equal(again.dequantize(), q.dequantize())


def test_round_scale_refuses_overflow_and_nan():
    for value in (7e4, float("nan")):
        with pytest.raises(UserError):
            round_scale(torch.tensor([1.0, value]))
