"""FAQ's weighted GPTQ of the layer, a chunk of experts at a time as the stage does it. Called by run.py."""

from __future__ import annotations

import argparse
import functools
import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from measure import Meter  # noqa: E402
from problem import Layer, make_layer  # noqa: E402

from ecmfq_export.config import QuantConfig  # noqa: E402
from ecmfq_export.quant import gptq_host  # noqa: E402
from ecmfq_export.quant.expert_memory import plan_experts  # noqa: E402
from ecmfq_export.quant.faq import FaqSettings, quantize_faq  # noqa: E402
from ecmfq_export.quant.hessian import WeightedHessian  # noqa: E402
from ecmfq_export.quant.host_kernels import HostKernels  # noqa: E402
from ecmfq_export.quant.qtensor import QTensor, cat_experts  # noqa: E402
from ecmfq_export.quant.rounding import relative_error  # noqa: E402
from ecmfq_export.quant.workspace import Workspace  # noqa: E402

PARTS = [(HostKernels, "blend_in_order", "layout"), (HostKernels, "to_columns", "layout"), (HostKernels, "to_rows", "layout"),
         (gptq_host, "_damped_factor", "factorization"), (gptq_host, "choose_scale", "scales"), (gptq_host, "_walk", "columns"),
         (gptq_host, "_first_of_nearest", "better of both"), (gptq_host, "_keep_better_rows", "better of both"),
         (gptq_host, "_moved", "cross term")]


class CoreSeconds:
    """Core seconds by part of the rounding, summed over threads; a part within a part counts as itself."""

    def __init__(self, parts: list[tuple[object, str, str]]) -> None:
        self.seconds: dict[str, float] = {}
        self._inner = threading.local()
        self._lock = threading.Lock()
        for owner, name, part in parts:
            setattr(owner, name, self._timed(getattr(owner, name), part))

    def _timed(self, function: Callable, part: str) -> Callable:
        @functools.wraps(function)
        def timed(*args, **kwargs):
            outer, self._inner.seconds = getattr(self._inner, "seconds", 0.0), 0.0
            start = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                spent = time.thread_time() - start
                with self._lock:
                    self.seconds[part] = self.seconds.get(part, 0.0) + spent - self._inner.seconds
                self._inner.seconds = outer + spent
        return timed


def round_weight(
    name: str, weight: torch.Tensor, x: torch.Tensor, token: torch.Tensor | None, layer: Layer, cross: bool, limit: int, meter: Meter,
    plans: dict[str, int],
) -> QTensor:
    """One of the layer's two weights; `token` is each pair's row of x, None where pairs have rows of their own."""
    experts, rows, columns = weight.shape
    shared = token is not None
    plan = plan_experts(experts, rows, columns, cross=cross, shared=shared, own_target=False, limit=limit)
    plans[name] = plan.chunk
    target = target_cross = None
    reference = 1.01 * x if cross else None
    if shared:
        with meter.phase("hessians"):
            pooled = WeightedHessian(1, columns, cross, "operators")
            token_weight = torch.zeros(len(x)).index_add_(0, token, layer.weight)
            pooled.add(x, torch.zeros(len(x), dtype=torch.int64), token_weight, reference=reference)
            target, target_cross = pooled.matrix[0], None if pooled.cross is None else pooled.cross[0]
    settings = FaqSettings(4, max_bytes=plan.working_bytes, kappa=256.0 if shared else 0.0)
    found, memory = [], Workspace()
    for start in range(0, experts, plan.chunk):
        stop = min(start + plan.chunk, experts)
        with meter.phase("hessians"):
            low, high = (int(v) for v in torch.searchsorted(layer.expert, torch.tensor([start, stop])))
            pairs = slice(low, high)
            hessian = WeightedHessian(stop - start, columns, cross, memory=memory)
            mine = (x, token[pairs], reference) if token is not None else (x[pairs], None, None if reference is None else reference[pairs])
            hessian.add(mine[0], layer.expert[pairs] - start, layer.weight[pairs], mine[1], mine[2])
        with meter.phase("rounding"):
            found.append(quantize_faq(weight[start:stop], hessian, settings, target, target_cross))
        with meter.phase("(errors for the report)"):
            relative_error(weight[start:stop], found[-1], hessian.matrix, plan.working_bytes)
        del hessian
    return cat_experts(found)


@torch.no_grad()
def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, required=True)
    parser.add_argument("--cross", action="store_true")
    parser.add_argument("--memory", type=float, default=QuantConfig().expert_memory_gb)
    args = parser.parse_args()
    layer = make_layer(args.experts)
    warm = make_layer(8, seed=1)
    plans: dict[str, int] = {}
    round_weight("", warm.down, warm.inner, None, warm, args.cross, int(args.memory * 1e9), Meter(), plans)
    del warm
    parts = CoreSeconds(PARTS)
    meter = Meter()
    gate_up = round_weight("gate_up", layer.gate_up, layer.x, layer.token, layer, args.cross, int(args.memory * 1e9), meter, plans)
    down = round_weight("down", layer.down, layer.inner, None, layer, args.cross, int(args.memory * 1e9), meter, plans)
    plans.pop("")
    dequantized = [q.qvalue[:4].float() * q.scale[:4].unsqueeze(-1) for q in (gate_up, down)]
    print(json.dumps({
        "seconds": meter.seconds, "core_seconds": meter.core_seconds, "core_seconds_of_rounding": parts.seconds,
        "peak_bytes": meter.peak_bytes, "others": meter.others,
        "result_bytes": gate_up.qvalue.numel() + down.qvalue.numel(), "experts_at_a_time": plans, "experts": args.experts,
        "threads": torch.get_num_threads(), "torch": torch.__version__,
        "error": [error_of(layer, *pair) for pair in zip(("gate_up", "down"), dequantized, strict=True)],
    }))


def error_of(layer: Layer, name: str, dequantized: torch.Tensor) -> float:
    """Mean over the first experts of the weighted output error, relative to the outputs."""
    total = []
    for expert, found in enumerate(dequantized):
        rows = layer.expert == expert
        x = (layer.x[layer.token[rows]] if name == "gate_up" else layer.inner[rows]) * layer.weight[rows].sqrt().unsqueeze(-1)
        weight = getattr(layer, name)[expert]
        total.append(float((x @ (found - weight).T).square().sum() / (x @ weight.T).square().sum()))
    return sum(total) / len(total)


if __name__ == "__main__":
    main()
