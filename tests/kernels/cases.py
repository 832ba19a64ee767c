"""Random routed-MoE inputs, from a seed and a few named properties."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from tests.kernels.reference import DTYPES, Case

ROUTINGS = ("uniform", "hot", "skewed", "padded", "repeated", "none")


@dataclass(frozen=True)
class Shape:
    """What a case looks like; ``group_size`` 128 wants sizes that are multiples of 128."""

    num_tokens: int
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    group_size: int = -1
    dtype: int = 0
    routing: str = "uniform"
    seed: int = 0


def make_ids(shape: Shape, rng: np.random.Generator) -> np.ndarray:
    """int32 [T, top_k]: all sorts of loads, empty experts and one expert with every token among them."""
    size = (shape.num_tokens, shape.top_k)
    experts = shape.num_experts
    if shape.routing == "hot":
        return np.full(size, rng.integers(experts), np.int32)
    if shape.routing == "none":  # every slot padded
        return rng.choice(np.array([-1, -7, experts, 2**31 - 1, -(2**31)]), size).astype(np.int32)
    if shape.routing == "skewed":
        p = 1.0 / np.arange(1, experts + 1) ** 1.5
        return rng.choice(experts, size, p=p / p.sum()).astype(np.int32)
    ids = rng.integers(0, experts, size).astype(np.int32)
    if shape.routing == "padded":
        return np.where(rng.random(size) < 0.4, rng.choice(np.array([-1, experts, 1 << 20]), size), ids).astype(np.int32)
    if shape.routing == "repeated":
        ids[:] = ids[:, :1]
    return ids


def make_case(shape: Shape) -> Case:
    """A case with every int4 value (-8 too), scales over several binades, and tokens from zero to large."""
    rng = np.random.default_rng(shape.seed)
    experts, hidden, inter = shape.num_experts, shape.hidden_size, shape.intermediate_size
    grouped = shape.group_size == 128

    def packed(*size: int) -> np.ndarray:
        return rng.integers(-128, 128, size).astype(np.int8)

    def scales(*size: int) -> np.ndarray:
        # Multipliers average 64: without the shift most grouped outputs would overflow fp16.
        return (rng.random(size) * 2.0 ** rng.integers(-12, -4, size) / (64 if grouped else 1)).astype(np.float32)

    def multipliers(*size: int) -> np.ndarray | None:
        return rng.integers(1, 128, size).astype(np.int8) if grouped else None

    magnitude = 2.0 ** rng.integers(-10, 6, (shape.num_tokens, 1))
    magnitude[rng.random((shape.num_tokens, 1)) < 0.05] = 0.0
    hidden_states = (rng.standard_normal((shape.num_tokens, hidden)) * magnitude).astype(DTYPES[shape.dtype])
    return Case(
        hidden_states=hidden_states,
        topk_ids=make_ids(shape, rng),
        topk_weights=rng.random((shape.num_tokens, shape.top_k)).astype(np.float32),
        gate_up_qweight=packed(experts, 2 * inter, hidden // 2),
        gate_up_scale=scales(experts, 2 * inter),
        gate_up_multiplier=multipliers(experts, 2 * inter, hidden // 128),
        down_qweight=packed(experts, hidden, inter // 2),
        down_scale=scales(experts, hidden),
        down_multiplier=multipliers(experts, hidden, inter // 128),
    )


def with_values(case: Case, token: int, column: int, value: float) -> Case:
    """The case with one hidden state replaced."""
    states = case.hidden_states.copy()
    states[token, column] = value
    return replace(case, hidden_states=states)
