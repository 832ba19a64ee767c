"""Times the layer on a device against torch's baselines and the roofline. Called by gpu_check.py."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np

from benchmarks.kernels import baselines
from benchmarks.kernels.device_layer import MMA_S8, DeviceLayer
from benchmarks.kernels.driver import Device
from benchmarks.kernels.roofline import LAYERS, TOKENS, Layer, floor_microseconds
from tests.kernels.reference import DTYPES, Case

ROUTINGS = ("uniform", "zipf")
ZIPF_EXPONENT = 1.0
REPEATS = 5
TARGETS = {"decode_bandwidth": 0.70, "decode_speedup": 3.0, "prefill_peak": 0.40, "prefill_speedup": 1.5}
"""What the kernels aim at: decode at 1 to 16 tokens, prefill at 1024 to 4096, against bf16 and the measured limits."""


def make_routing(layer: Layer, num_tokens: int, kind: str, rng: np.random.Generator) -> np.ndarray:
    """int32 [T, top_k]: distinct experts within a token, uniform or Zipf over experts; shared experts in the last slots."""
    routed, slots = layer.num_experts - layer.shared, layer.top_k - layer.shared
    weight = np.ones(routed) if kind == "uniform" else rng.permutation(1.0 / np.arange(1, routed + 1) ** ZIPF_EXPONENT)
    # Gumbel top-k draws without replacement in proportion to the weights.
    keys = np.log(weight) - np.log(-np.log(rng.random((num_tokens, routed))))
    ids = np.argpartition(-keys, slots - 1, axis=1)[:, :slots]
    always = np.broadcast_to(np.arange(routed, layer.num_experts), (num_tokens, layer.shared))
    return np.concatenate((ids, always), axis=1).astype(np.int32)


def make_layer_case(layer: Layer, num_tokens: int, ids: np.ndarray, group_size: int, rng: np.random.Generator) -> Case:
    """fp16 activations and random weights of the layer's full size."""
    experts, hidden, inter = layer.num_experts, layer.hidden_size, layer.intermediate_size

    def packed(*size: int) -> np.ndarray:
        return np.frombuffer(rng.bytes(int(np.prod(size))), np.int8).reshape(size)

    def multipliers(*size: int) -> np.ndarray | None:
        return rng.integers(1, 128, size).astype(np.int8) if group_size > 0 else None

    scale = np.float32(0.01 / (64 if group_size > 0 else 1))
    return Case(rng.standard_normal((num_tokens, hidden)).astype(DTYPES[0]), ids, rng.random(ids.shape).astype(np.float32),
                packed(experts, 2 * inter, hidden // 2), np.full((experts, 2 * inter), scale),
                multipliers(experts, 2 * inter, hidden // 128),
                packed(experts, hidden, inter // 2), np.full((experts, hidden), scale), multipliers(experts, hidden, inter // 128))


def routing_count(layer: Layer, num_tokens: int, l2_bytes: int) -> int:
    """So many different routings in turn that their weights together exceed the L2 cache four times, at least four and at most 64."""
    touched = layer.expected_experts(num_tokens) * layer.expert_bytes()
    return int(np.clip(np.ceil(4 * l2_bytes / touched), 4, 64))


def run(library: ctypes.CDLL, device: Device, facts: dict[str, int], l2_bytes: int, quick: bool) -> dict[str, object]:
    """Measured limits, one row a layer, group size, routing and number of tokens, and whether the targets hold."""
    limits: dict[str, object] = {"copy_bandwidth_gb_s": device.copy_bandwidth() / 1e9}
    try:
        limits["int8_peak_tops"] = baselines.int8_peak() / 1e12
    except baselines.Unavailable as reason:
        limits["int8_peak_tops"], limits["int8_peak_missing"] = None, str(reason)
    rows = []
    for layer in LAYERS[:1] if quick else LAYERS:
        for group_size in (-1,) if quick else (-1, 128):
            for tokens in (1, 64, 1024) if quick else TOKENS:
                for kind in ROUTINGS[:1] if quick else ROUTINGS:
                    rows.append(_row(library, device, facts, layer, group_size, tokens, kind, l2_bytes, limits))
    return {"limits": limits, "rows": rows, "targets": judge(rows), "timing": "CUDA graph of one call for each routing, best of "
            f"{REPEATS}, microseconds a call; routings differ so that weights come from memory, not from L2"}


def _row(library: ctypes.CDLL, device: Device, facts: dict[str, int], layer: Layer, group_size: int, tokens: int, kind: str,
         l2_bytes: int, limits: dict[str, object]) -> dict[str, object]:
    rng = np.random.default_rng(tokens)
    routings = [make_routing(layer, tokens, kind, rng) for _ in range(routing_count(layer, tokens, l2_bytes))]
    ours = DeviceLayer(library, device, facts, make_layer_case(layer, tokens, routings[0], group_size, rng), MMA_S8)
    calls = [ours.with_ids(ids) for ids in routings]
    experts = float(np.mean([len(np.unique(ids)) for ids in routings]))
    row: dict[str, object] = {"layer": layer.name, "group_size": group_size, "tokens": tokens, "routing": kind, "routings": len(routings),
                              "experts_touched": experts, "workspace_bytes": ours.workspace_bytes}
    graph = device.captured(calls)
    row["w4a8_us"] = 1e6 * min(device.timed([graph]) for _ in range(REPEATS)) / len(calls)
    row["w4a8_eager_us"] = 1e6 * min(device.timed(calls) for _ in range(REPEATS)) / len(calls)
    peak = limits["int8_peak_tops"]
    memory, arithmetic = floor_microseconds(layer, tokens, float(limits["copy_bandwidth_gb_s"]), peak, experts, group_size)
    row |= {"memory_floor_us": memory, "int8_floor_us": arithmetic, "of_bandwidth": memory / row["w4a8_us"],
            "of_int8_peak": None if arithmetic is None else arithmetic / row["w4a8_us"]}
    if group_size < 0:  # the baselines do not know our groups: once a shape is enough
        for name, make in baselines.BASELINES.items():
            row[f"{name}_us"] = _baseline(make, layer, tokens, routings, name)
    return row


def _baseline(make: Callable[..., list[Callable[[], None]]], layer: Layer, tokens: int, routings: list[np.ndarray], name: str) -> object:
    """Microseconds a call, or the reason why there is none."""
    if name.endswith("_loop") and tokens * layer.top_k > baselines.EXPERT_LOOP_MAX_PAIRS:
        return "not timed: too many launches"
    try:
        return 1e6 * baselines.seconds_of(make(layer, tokens, routings))
    except baselines.Unavailable as reason:
        return str(reason)
    except RuntimeError as error:  # out of memory, or an operator that this GPU lacks
        return f"failed: {str(error)[:300]}"


def judge(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """Issue 3's targets for each row that one applies to: what was reached, and whether it is enough (None: not measurable here)."""
    verdicts = []
    for row in rows:
        tokens = int(row["tokens"])
        if row["group_size"] != -1 or not (tokens <= 16 or tokens >= 1024):
            continue
        phase = "decode" if tokens <= 16 else "prefill"
        bf16 = [row[k] for k in ("bf16_grouped_mm_us", "bf16_expert_loop_us") if isinstance(row.get(k), float)]
        speedup = min(bf16) / row["w4a8_us"] if bf16 else None
        share = row["of_bandwidth"] if phase == "decode" else row["of_int8_peak"]
        wanted_share = TARGETS["decode_bandwidth" if phase == "decode" else "prefill_peak"]
        known = speedup is not None and share is not None
        verdicts.append({"layer": row["layer"], "tokens": tokens, "routing": row["routing"], "phase": phase, "share_of_limit": share,
                         "speedup_over_bf16": speedup,
                         "reached": (share >= wanted_share and speedup >= TARGETS[f"{phase}_speedup"]) if known else None})
    return verdicts
