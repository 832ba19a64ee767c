"""The routed MoE layer in plain NumPy: what the kernels must equal, bit for bit.

Only correctly rounded float32 operations are used, in the kernels' order and without fused multiply-add, and the sums are integers.
The rules are docs/kernels.md's ("Semantics"); plugins/include/ecmfq/numerics.cuh is their device form.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

F32 = np.float32
TINY = F32(1e-30)
DTYPES = {0: np.dtype(np.float16), 1: np.dtype(ml_dtypes.bfloat16)}


@dataclass(frozen=True)
class Case:
    """One layer's input. Weights are canonical packed int4; multipliers are None per channel."""

    hidden_states: np.ndarray  # [T, H] float16 or bfloat16
    topk_ids: np.ndarray  # int32 [T, top_k]
    topk_weights: np.ndarray  # float32 [T, top_k]
    gate_up_qweight: np.ndarray  # int8 [E, 2I, H / 2]
    gate_up_scale: np.ndarray  # float32 [E, 2I]
    gate_up_multiplier: np.ndarray | None  # int8 [E, 2I, H / 128]
    down_qweight: np.ndarray  # int8 [E, H, I / 2]
    down_scale: np.ndarray  # float32 [E, H]
    down_multiplier: np.ndarray | None  # int8 [E, H, I / 128]

    @property
    def num_experts(self) -> int:
        return self.gate_up_scale.shape[0]

    @property
    def intermediate_size(self) -> int:
        return self.gate_up_scale.shape[1] // 2

    @property
    def dtype_code(self) -> int:
        return 0 if self.hidden_states.dtype == np.float16 else 1


@dataclass(frozen=True)
class Result:
    """The layer's output and its integer stages; rows are (token, slot) pairs sorted by expert."""

    output: np.ndarray  # [T, H]
    act_q: np.ndarray  # int8 [T, H]
    act_scale: np.ndarray  # float32 [T]
    expert_offsets: np.ndarray  # int32 [E + 1]
    row_pair: np.ndarray  # int32 [rows]
    inter_q: np.ndarray  # int8 [rows, I]
    inter_scale: np.ndarray  # float32 [rows]


def quantize_rows(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 [R, C] and float32 [R]; a row with a NaN or an infinity gets the scale NaN and zeros."""
    x = x.astype(F32)
    absmax = np.abs(x).max(axis=1, initial=F32(0))
    finite = np.isfinite(absmax)
    scale = np.where(finite, np.maximum(absmax, TINY) / F32(127), F32(np.nan)).astype(F32)
    divided = np.where(finite[:, None], x, F32(0)) / np.where(finite, scale, F32(1))[:, None]
    return np.clip(np.rint(divided), -127, 127).astype(np.int8), scale


def exp_clamped(x: np.ndarray) -> np.ndarray:
    x = np.minimum(np.maximum(x, F32(-87)), F32(88))  # NaN passes
    n = np.rint(np.where(np.isnan(x), F32(0), x) * F32(1.44269504))
    r = x + n * F32(-0.693359375)
    r = r + n * F32(2.12194440e-4)
    p = np.full_like(r, F32(1.9875691500e-4))
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = p * r + F32(c)
    p = p * (r * r) + r + F32(1)
    return p * ((n.astype(np.int32) + 127).astype(np.uint32) << np.uint32(23)).view(F32)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (F32(1) + exp_clamped(-x))


def integer_weights(packed: np.ndarray, multiplier: np.ndarray | None) -> np.ndarray:
    """int64 [..., N, K] from int8 [..., N, K / 2]."""
    low = ((packed.view(np.uint8) << 4).view(np.int8) >> 4).astype(np.int64)
    high = (packed >> 4).astype(np.int64)
    values = np.stack((low, high), axis=-1).reshape(*packed.shape[:-1], -1)
    return values if multiplier is None else values * np.repeat(multiplier.astype(np.int64), 128, axis=-1)


def exact_product(q: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """q @ weights^T as int32; float64 holds every sum exactly, and BLAS is fast."""
    sums = q.astype(np.float64) @ weights.astype(np.float64).T
    assert np.abs(sums).max(initial=0) < 2**31
    return sums.astype(np.int32)


def dequantize(sums: np.ndarray, act_scale: np.ndarray, channel_scale: np.ndarray) -> np.ndarray:
    return (sums.astype(F32) * act_scale[:, None]) * channel_scale[None, :]


def routed_moe(case: Case) -> Result:
    tokens, hidden = case.hidden_states.shape
    experts, inter, top_k = case.num_experts, case.intermediate_size, case.topk_ids.shape[1]
    act_q, act_scale = quantize_rows(case.hidden_states)

    ids = case.topk_ids.reshape(-1)
    valid = np.flatnonzero((ids >= 0) & (ids < experts))
    row_pair = valid[np.argsort(ids[valid], kind="stable")].astype(np.int32)
    expert_offsets = np.searchsorted(ids[row_pair], np.arange(experts + 1)).astype(np.int32)

    inter_q = np.zeros((len(row_pair), inter), np.int8)
    inter_scale = np.zeros(len(row_pair), F32)
    terms = np.zeros((tokens * top_k, hidden), F32)
    with np.errstate(all="ignore"):
        for e in range(experts):
            rows = slice(expert_offsets[e], expert_offsets[e + 1])
            pairs = row_pair[rows]
            if not len(pairs):
                continue
            gate_up = integer_weights(case.gate_up_qweight[e], None if case.gate_up_multiplier is None else case.gate_up_multiplier[e])
            token = pairs // top_k
            both = dequantize(exact_product(act_q[token], gate_up), act_scale[token], case.gate_up_scale[e])
            inter_q[rows], inter_scale[rows] = quantize_rows(silu(both[:, :inter]) * both[:, inter:])
            down = integer_weights(case.down_qweight[e], None if case.down_multiplier is None else case.down_multiplier[e])
            terms[pairs] = dequantize(exact_product(inter_q[rows], down), inter_scale[rows], case.down_scale[e])

        total = np.zeros((tokens, hidden), F32)
        for slot in range(top_k):
            used = (case.topk_ids[:, slot] >= 0) & (case.topk_ids[:, slot] < experts)
            of_slot = terms.reshape(tokens, top_k, hidden)[:, slot]
            total = np.where(used[:, None], total + of_slot * case.topk_weights[:, slot, None], total)
        output = total.astype(case.hidden_states.dtype)
    return Result(output, act_q, act_scale, expert_offsets, row_pair, inter_q, inter_scale)
