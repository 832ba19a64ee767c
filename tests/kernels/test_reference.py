"""The NumPy reference itself: against float64 arithmetic, and against the project's definitions of int4 and of quantized activations."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from ecmfq_export.quant.activation import quantize_per_token
from ecmfq_export.quant.pack import unpack_int4
from tests.kernels.cases import Shape, make_case
from tests.kernels.reference import Case, exp_clamped, integer_weights, quantize_rows, routed_moe, silu


def test_exp_is_within_two_ulp_where_it_is_not_clamped() -> None:
    x = np.concatenate([np.linspace(-87, 88, 400_001), np.random.default_rng(0).normal(0, 4, 100_000)]).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    ulp = np.spacing(exact.astype(np.float32)).astype(np.float64)
    assert float((np.abs(exp_clamped(x) - exact) / ulp).max()) < 2.0


def test_silu_outside_the_range_of_exp() -> None:
    x = np.array([-1e30, -200, -100, -0.0, 0.0, 100, 1e30, np.nan], np.float32)
    got = silu(x)
    assert np.abs(got[1:3]).max() < 1e-35 and abs(got[0]) < 1e-7  # x / (1 + e^88): zero beside any other term of a sum
    assert got[3:7].tolist() == [0.0, 0.0, 100.0, np.float32(1e30)] and np.isnan(got[7])


def test_activation_quantization_is_the_projects() -> None:
    x = np.random.default_rng(1).normal(size=(50, 96)).astype(np.float32) * np.float32(2.0) ** np.arange(-25, 25, dtype=np.float32)[:, None]
    x[7] = 0
    q, scale = quantize_rows(x)
    wanted_q, wanted_scale = quantize_per_token(torch.from_numpy(x))
    assert np.array_equal(q, wanted_q.numpy()) and np.array_equal(scale, wanted_scale.numpy()[:, 0])


def test_int4_is_the_projects() -> None:
    packed = np.arange(-128, 128, dtype=np.int16).astype(np.int8).reshape(4, 64)
    assert np.array_equal(integer_weights(packed, None), unpack_int4(torch.from_numpy(packed)).numpy())


@pytest.mark.parametrize("group_size", [-1, 128])
def test_layer_is_close_to_float64_on_dequantized_weights(group_size: int) -> None:
    case = make_case(Shape(30, 4, 2, 256, 384, group_size, routing="padded", seed=3))
    want, got = float_layer(case), routed_moe(case).output.astype(np.float64)
    assert not got[~want.any(axis=1)].any()
    assert np.linalg.norm(got - want) / np.linalg.norm(want) < 0.05  # two 8-bit quantizations


def test_a_wrong_order_of_halves_would_show() -> None:
    """Guards the test above: gate and up swapped is far away."""
    case = make_case(Shape(10, 2, 1, 128, 128, seed=4))
    swapped = dataclasses.replace(case, gate_up_qweight=np.roll(case.gate_up_qweight, 128, axis=1),
                                  gate_up_scale=np.roll(case.gate_up_scale, 128, axis=1))
    want, got = float_layer(case), routed_moe(swapped).output.astype(np.float64)
    assert np.linalg.norm(got - want) / np.linalg.norm(want) > 0.2


def float_layer(case: Case) -> np.ndarray:
    """float64 [T, H]: no activation quantization, a library exp."""
    tokens, hidden = case.hidden_states.shape
    inter = case.intermediate_size
    gate_up = integer_weights(case.gate_up_qweight, case.gate_up_multiplier) * case.gate_up_scale[..., None].astype(np.float64)
    down = integer_weights(case.down_qweight, case.down_multiplier) * case.down_scale[..., None].astype(np.float64)
    x = case.hidden_states.astype(np.float64)
    out = np.zeros((tokens, hidden))
    for t in range(tokens):
        for slot, e in enumerate(case.topk_ids[t]):
            if 0 <= e < case.num_experts:
                both = gate_up[e] @ x[t]
                gate = both[:inter]
                out[t] += case.topk_weights[t, slot] * (down[e] @ (gate / (1 + np.exp(-np.clip(gate, -700, 700))) * both[inter:]))
    return out
