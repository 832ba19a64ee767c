"""What torch offers for the same layer on the same GPU: bf16 grouped GEMMs, and int4 weights with bf16 activations.

Each baseline is a function of one routing that puts the layer on torch's current stream; its routing work is outside the timing, which
favours it. A baseline that this torch or GPU lacks raises Unavailable with the reason.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from benchmarks.kernels.roofline import Layer


class Unavailable(RuntimeError):
    """This torch or this GPU cannot run the baseline; the text says why."""


def torch_with_cuda():
    """torch, or Unavailable: the whole comparison is optional."""
    try:
        import torch
    except ImportError as error:
        raise Unavailable(f"torch cannot be imported: {error}") from None
    if not torch.cuda.is_available():
        raise Unavailable(f"torch {torch.__version__} has no CUDA device")
    return torch


def seconds_of(calls: list[Callable[[], None]], repeats: int = 5) -> float:
    """Seconds a call on the GPU, as one CUDA graph of all the calls where they can be captured, else eagerly; best of `repeats`."""
    torch = torch_with_cuda()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        run = graph.replay
    except RuntimeError:
        torch.cuda.synchronize()

        def run() -> None:
            for call in calls:
                call()

    run()
    best = float("inf")
    for _ in range(repeats):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        stop.record()
        stop.synchronize()
        best = min(best, start.elapsed_time(stop) / 1e3)
    return best / len(calls)


def bf16_grouped(layer: Layer, num_tokens: int, routings: list[np.ndarray]) -> list[Callable[[], None]]:
    """torch's grouped matrix product on bf16 weights; falls back to one product for each expert in use."""
    torch = torch_with_cuda()
    experts, hidden, inter = layer.num_experts, layer.hidden_size, layer.intermediate_size
    gate_up = torch.randn(experts, 2 * inter, hidden, device="cuda", dtype=torch.bfloat16) * 0.02
    down = torch.randn(experts, hidden, inter, device="cuda", dtype=torch.bfloat16) * 0.02
    x = torch.randn(num_tokens, hidden, device="cuda", dtype=torch.bfloat16)
    grouped_mm = getattr(torch.nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    if grouped_mm is None:
        raise Unavailable(f"torch {torch.__version__} has no grouped_mm")

    def one(ids: np.ndarray) -> Callable[[], None]:
        flat = torch.from_numpy(ids.reshape(-1)).cuda()
        order = torch.argsort(flat, stable=True)
        token = order // layer.top_k
        offsets = torch.cumsum(torch.bincount(flat, minlength=experts), 0).to(torch.int32)
        weights = torch.rand(len(flat), 1, device="cuda", dtype=torch.bfloat16)
        out = torch.zeros_like(x)

        def call() -> None:
            both = grouped_mm(x[token], gate_up.transpose(-2, -1), offs=offsets)
            inner = torch.nn.functional.silu(both[:, :inter]) * both[:, inter:]
            out.zero_().index_add_(0, token, grouped_mm(inner, down.transpose(-2, -1), offs=offsets) * weights)

        return call

    return [one(ids) for ids in routings]


def bf16_loop(layer: Layer, num_tokens: int, routings: list[np.ndarray]) -> list[Callable[[], None]]:
    """A bf16 product for each expert in use: what eager models do, here without their host-side routing."""
    torch = torch_with_cuda()
    experts, hidden, inter = layer.num_experts, layer.hidden_size, layer.intermediate_size
    gate_up = torch.randn(experts, 2 * inter, hidden, device="cuda", dtype=torch.bfloat16) * 0.02
    down = torch.randn(experts, hidden, inter, device="cuda", dtype=torch.bfloat16) * 0.02
    return _expert_loop(layer, num_tokens, routings, lambda e, v: v @ gate_up[e].T, lambda e, v: v @ down[e].T)


def int4_loop(layer: Layer, num_tokens: int, routings: list[np.ndarray]) -> list[Callable[[], None]]:
    """torch's int4 weight-only product (groups of 128, bf16 activations) for each expert in use."""
    torch = torch_with_cuda()
    experts, hidden, inter = layer.num_experts, layer.hidden_size, layer.intermediate_size
    convert = getattr(torch.ops.aten, "_convert_weight_to_int4pack", None)
    if convert is None:
        raise Unavailable(f"torch {torch.__version__} has no int4 weight-only product")

    def weights(rows: int, cols: int) -> list[tuple[object, object]]:
        packed = []
        for _ in range(experts):
            bytes_ = torch.randint(0, 256, (rows, cols // 2), dtype=torch.uint8, device="cuda")
            scales = torch.full((cols // 128, rows, 2), 0.01, dtype=torch.bfloat16, device="cuda")
            packed.append((convert(bytes_, 8), scales))
        return packed

    try:
        gate_up, down = weights(2 * inter, hidden), weights(hidden, inter)
    except RuntimeError as error:
        raise Unavailable(f"_convert_weight_to_int4pack: {error}") from None
    product = torch.ops.aten._weight_int4pack_mm
    return _expert_loop(layer, num_tokens, routings, lambda e, v: product(v, gate_up[e][0], 128, gate_up[e][1]),
                        lambda e, v: product(v, down[e][0], 128, down[e][1]))


def _expert_loop(layer: Layer, num_tokens: int, routings: list[np.ndarray], first: Callable, second: Callable) -> list[Callable[[], None]]:
    torch = torch_with_cuda()
    inter = layer.intermediate_size
    x = torch.randn(num_tokens, layer.hidden_size, device="cuda", dtype=torch.bfloat16)

    def one(ids: np.ndarray) -> Callable[[], None]:
        out = torch.zeros_like(x)
        work = []
        for expert in np.unique(ids):
            token = torch.from_numpy(np.argwhere(ids == expert)[:, 0]).cuda()
            work.append((int(expert), token, torch.rand(len(token), 1, device="cuda", dtype=torch.bfloat16)))

        def call() -> None:
            out.zero_()
            for expert, token, weight in work:
                both = first(expert, x[token])
                inner = torch.nn.functional.silu(both[:, :inter]) * both[:, inter:]
                out.index_add_(0, token, second(expert, inner) * weight)

        return call

    return [one(ids) for ids in routings]


def int8_peak(size: int = 8192) -> float:
    """int8 operations a second of torch's own int8 product, a measured stand-in for the peak."""
    torch = torch_with_cuda()
    a = torch.randint(-8, 8, (size, size), dtype=torch.int8, device="cuda")
    b = torch.randint(-8, 8, (size, size), dtype=torch.int8, device="cuda").t()
    try:
        seconds = seconds_of([lambda: torch._int_mm(a, b)] * 4)
    except RuntimeError as error:
        raise Unavailable(f"torch._int_mm: {error}") from None
    return 2 * size**3 / seconds


BASELINES = {"bf16_grouped_mm": bf16_grouped, "bf16_expert_loop": bf16_loop, "int4_weight_only_loop": int4_loop}
EXPERT_LOOP_MAX_PAIRS = 4096
"""Above this many (token, slot) pairs the loops are not timed: graphs of thousands of launches say little."""
