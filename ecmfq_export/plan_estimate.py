"""What a run will take in memory and time, counted from shapes and from rates that are measured on this machine in a second."""

from __future__ import annotations

import math
import resource
import time
from dataclasses import dataclass
from pathlib import Path

from ecmfq_export.config import QuantConfig
from ecmfq_export.disk_need import Prompts
from ecmfq_export.models.moe_vlm import MoEVLM, layer_shapes
from ecmfq_export.models.spec import MoESpec
from ecmfq_export.quant import ecs
from ecmfq_export.quant.gptq import gptq_bytes
from ecmfq_export.stages.judge import judged_layers
from ecmfq_export.stages.methods import resolve
from ecmfq_export.stages.sensitivity import NUM_SAMPLES

_MATRIX, _SECONDS = 1024, 0.4
_READ_BYTES = 64 << 20
_FLOAT = 4
_SMOOTH_EVALUATIONS = 20
"""Points of a smoothing search, each of which runs a layer on its sampled tokens; the searches use about so many."""
_SMOOTH_LOOKS = 80
"""Looks at no more than :data:`ecs.FINE_PRODUCTS` multiplications that a layer's searches take at least, where the layer is so large
that looks are bounded."""


@dataclass(frozen=True)
class Rates:
    """What this machine did just now.

    Attributes:
        flops: float32 operations a second in matrix products, as PyTorch runs them with its threads.
        read: bytes a second from the checkpoint's largest file; from memory where the file was read before.
        threads: of PyTorch.
        process: bytes that this process has needed so far, its libraries loaded.
    """

    flops: float
    read: float
    threads: int
    process: int


@dataclass(frozen=True)
class Load:
    """What one stage computes and holds.

    Attributes:
        flops: multiplications and additions that are sure to be done.
        read_again: bytes of the checkpoint beyond one reading.
        memory: bytes at the peak, above what the process needs anyway.
        basis: what was counted, for people.
    """

    flops: float
    memory: int
    basis: str
    read_again: int = 0


def measure_rates(model: MoEVLM) -> Rates:
    """Multiply matrices and read a piece of the checkpoint, half a second each at most."""
    import torch

    left = right = torch.ones(_MATRIX, _MATRIX)
    left @ right
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < _SECONDS:
        left @ right
        count += 1
    flops = 2 * _MATRIX**3 * count / (time.perf_counter() - began)
    files = {model.checkpoint.entry(name).file for name in model.checkpoint.names()}
    file = max(files, key=lambda path: path.stat().st_size)
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Rates(flops, _read_rate(file), torch.get_num_threads(), process)


def _read_rate(file: Path) -> float:
    began, done = time.perf_counter(), 0
    with file.open("rb") as stream:
        while done < _READ_BYTES and (block := stream.read(1 << 20)):
            done += len(block)
    return done / max(time.perf_counter() - began, 1e-6)


def active_weights(model: MoEVLM) -> int:
    """Decoder weights that one token meets: of routed experts its top k, of the head none."""
    total = 0
    for layer in model.spec.layers:
        for name, shape in layer_shapes(model.spec, layer).items():
            count = math.prod(shape)
            if isinstance(layer.mlp, MoESpec) and name.startswith("mlp.experts."):
                count = count // layer.mlp.total_experts * (layer.mlp.top_k + layer.mlp.num_shared_experts)
            total += count
    return total


def largest_layer(model: MoEVLM) -> int:
    """float32 bytes of the largest decoder layer."""
    return max(_FLOAT * sum(math.prod(shape) for shape in layer_shapes(model.spec, layer).values()) for layer in model.spec.layers)


def quantize_loads(model: MoEVLM, config: QuantConfig, prompts: Prompts | None, activation_bytes: int) -> dict[str, Load]:
    """The stages up to the quantized checkpoint, by their names in ``disk_need``."""
    parts, layer = resolve(config), largest_layer(model)
    weights = sum(math.prod(model.shape(name)) for name in model.names())
    transform = 2.0 * weights * math.log2(max(model.spec.hidden_size, 2))
    loads = {"rotate": Load(transform, 2 * layer, "a fast Hadamard transform of every weight")}
    forward = 2.0 * active_weights(model)
    tokens = prompts.tokens if prompts is not None else 0.0
    count = prompts.count if prompts is not None else 0
    chosen = min(config.num_samples, count) * tokens
    pooled = 0.0 if parts.selection == "random" else count * tokens
    gradients = 3.0 * min(NUM_SAMPLES, count) * tokens if parts.gamma == 0.0 else 0.0
    held = min(activation_bytes, int(_FLOAT * model.spec.hidden_size * 4 * max(pooled, chosen)))
    loads["calibrate"] = Load(forward * (pooled + gradients), layer + held,
                              f"the decoder over {pooled + gradients:,.0f} tokens; one layer and activations in memory")
    bounded = 2.0 * ecs.FINE_PRODUCTS * _SMOOTH_LOOKS * model.spec.num_layers
    searches = min(forward * chosen * _SMOOTH_EVALUATIONS, bounded)
    said = (f"about {_SMOOTH_LOOKS} looks at {2 * ecs.FINE_PRODUCTS / 1e9:.1f} GFLOP of each layer" if searches == bounded
            else f"about {_SMOOTH_EVALUATIONS} evaluations of each layer")
    loads["smooth"] = Load(forward * chosen + searches, 2 * layer + held, f"{said}; {chosen:,.0f} tokens")
    loads["quantize"] = _rounding(model, config, forward, chosen, layer, held)
    return loads


def _rounding(model: MoEVLM, config: QuantConfig, forward: float, chosen: float, layer: int, held: int) -> Load:
    """GPTQ: activations of both models, second moments of every input, their factors, and the update of all columns."""
    parts = resolve(config)
    if parts.rounding != "gptq":
        return Load(2 * forward * chosen, 2 * layer + held, "rounding to nearest, and both models' activations where samples are used")
    kinds, layers = len(parts.weightings), model.spec.num_layers
    judged = judged_layers(layers, config.judged_layers) if parts.chooses_weighting else []
    work, passes = 0.0, 0
    hessians = 0
    sides = 2 if parts.cross_strength else 1
    for spec in model.spec.layers:
        # A judged layer is quantized with every weighting, and once more with the one that is kept.
        times = kinds + 1 if spec.index in judged else 1
        passes += times
        for name, shape in layer_shapes(model.spec, spec).items():
            if len(shape) < 2 or "router" in name:
                continue
            stacked, rows, columns = (shape if len(shape) == 3 else (1, *shape))
            slots = 1.0 if len(shape) == 2 or not isinstance(spec.mlp, MoESpec) else spec.mlp.top_k + spec.mlp.num_shared_experts
            work += times * 2.0 * chosen * slots * columns**2 * sides
            work += times * stacked * (columns**3 + 2.0 * rows * columns**2)
            # As many experts at a time as the setting allows.
            held_now = stacked * (_FLOAT * sides * columns**2 + gptq_bytes(rows, columns))
            hessians = max(hessians, min(held_now, int(config.expert_memory_gb * 1e9)) if stacked > 1 else held_now)
    basis = f"second moments and GPTQ of every matrix over {chosen:,.0f} tokens"
    flops, again = work + (2 * layers + passes) / layers * forward * chosen, 0
    if parts.chooses_weighting:
        # What the layers behind a judged one make of the held-out samples, for each candidate.
        read = sum(layers - 1 - index for index in judged)
        flops += kinds * config.holdout_fraction * chosen * forward * read / layers
        weights = sum(math.prod(shape) for spec in model.spec.layers for shape in layer_shapes(model.spec, spec).values())
        stored = model.stored_dtype(f"layers.0.{next(iter(layer_shapes(model.spec, model.spec.layers[0])))}").itemsize
        again = weights * stored * read // layers
        basis += (f"; {kinds} token weightings are compared in {len(judged)} layers, for which {read} layers are read again "
                  "(--set judged_layers=N, or --set weighting=rho_g_phi to compare none)")
    return Load(flops, 2 * layer + hessians + held, basis + f"; up to {hessians / 1e9:.2f} GB of second moments at a time", again)
