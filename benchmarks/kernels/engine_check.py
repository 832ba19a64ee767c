"""The GPU check's last proof: a whole engine on this GPU against ONNX Runtime on the reference graph.

A tiny random Qwen3-VL-MoE is quantized, exported and built for the GPU at hand. Where TensorRT-RTX has no code for this GPU
(SM 90, say), the engine is built for SM 80 and tried all the same: whether it runs is a fact worth writing down, so a refusal is
an answer here, not a failure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ecmfq_export.config import ExportConfig, QuantConfig
from ecmfq_export.engine.ort_runner import OrtRunner
from ecmfq_export.engine.runner import Runner
from ecmfq_export.engine.trt_runner import TrtRunner
from ecmfq_export.errors import BuildError
from ecmfq_export.graph.pipeline import export_onnx
from ecmfq_export.progress import Silent
from ecmfq_export.stages.quantize import quantize
from ecmfq_export.target import Target, list_targets, load_target
from ecmfq_export.workflow import Paths, build_engines
from tests.tiny_models import make_qwen3_vl_moe

SIZES = ExportConfig(max_seq_len=64, max_batch=2, max_image_patches=64)
FALLBACK = "a100"
MAX_MEAN_DIFFERENCE = 0.05
"""Of logits whose spread is several units. Both sides compute in float16 with the same integers; a sum that is rounded differently
moves an int8 value by one step, and logits by about 1e-2."""


def pick_target(capability: int) -> tuple[Target, bool]:
    """A target whose engines this GPU runs and this machine builds, and whether it is only a guess (built for another SM)."""
    targets = [load_target(name) for name in list_targets()]
    exact = [target for target in targets if capability in target.compute_capabilities]
    ready = [target for target in exact if target.engine.build == "host-aot"] or exact
    for target in ready:
        if target.engine.runtime == "tensorrt_rtx" or _importable(target.engine.runtime):
            return target, False
    fallback = load_target(FALLBACK)
    return dataclasses.replace(fallback, compute_capabilities=(*fallback.compute_capabilities, capability)), True


def run(work: Path, capability: int, open_engine: Callable[[Path, Target], Runner] = TrtRunner) -> dict[str, object]:
    """Build and run one decoder engine; the differences of its logits from ONNX Runtime's.

    Args:
        work: an empty directory.
        capability: of the GPU, e.g. 90.
        open_engine: what runs the engine; tests put ONNX Runtime here, so that everything but the GPU is exercised.

    Raises:
        RuntimeError: logits differ by more than MAX_MEAN_DIFFERENCE, or are not finite.
    """
    target, guess = pick_target(capability)
    built_for = load_target(FALLBACK) if guess else target
    model = make_qwen3_vl_moe(work / "model")
    quantized = quantize(model, None, None, work / "quantized", QuantConfig(method="rtn"), Silent())
    paths = Paths(work / "bundle")
    export_onnx(quantized, paths.onnx, built_for, SIZES, Silent())
    facts: dict[str, object] = {"target": built_for.name, "built_for": built_for.compute_capabilities, "gpu": capability}
    engines = build_engines(paths.root, built_for, Silent())
    try:
        engine = open_engine(engines / "decoder.engine", target)
    except BuildError as refusal:
        if guess:
            return facts | {"runs_on_this_gpu": False, "evidence": str(refusal)}
        raise
    reference = OrtRunner(paths.onnx / "decoder" / "model.ref.onnx")
    feeds = random_feeds(reference)
    expected, got = reference.run(feeds)["logits"], engine.run(feeds)["logits"]
    difference = np.abs(got.astype(np.float64) - expected)
    facts |= {"runs_on_this_gpu": True, "mean_difference": float(difference.mean()), "largest_difference": float(difference.max()),
              "logit_spread": float(expected.std()), "same_argmax": float((got.argmax(-1) == expected.argmax(-1)).mean())}
    if not difference.mean() <= MAX_MEAN_DIFFERENCE:  # NaN fails too
        raise RuntimeError(f"the engine's logits are not ONNX Runtime's: {facts}")
    return facts


def random_feeds(runner: OrtRunner, batch: int = 2, seq: int = 16, seed: int = 0) -> dict[str, np.ndarray]:
    """A causal prefill of `seq` random embeddings into an empty cache, for every input of a decoder graph."""
    draw = np.random.default_rng(seed)
    feeds: dict[str, np.ndarray] = {}
    for name, (dtype, dims) in runner.inputs.items():
        extents = {"batch": batch, "seq": seq}
        shape = [extents[dim] if isinstance(dim, str) else dim for dim in dims]
        if name == "attention_mask":
            visible = np.arange(shape[-1])[None, :] <= np.arange(seq)[:, None]
            feeds[name] = np.broadcast_to(np.where(visible, 0.0, -30000.0), shape).astype(dtype)
        elif name.startswith("rope_"):
            angle = np.arange(seq)[:, None] * 10000.0 ** -(np.arange(shape[-1]) / shape[-1])
            feeds[name] = np.broadcast_to(np.cos(angle) if name == "rope_cos" else np.sin(angle), shape).astype(dtype)
        elif name == "inputs_embeds":
            feeds[name] = draw.standard_normal(shape).astype(dtype)
        else:
            feeds[name] = np.zeros(shape, dtype)
    return feeds


def _importable(module: str) -> bool:
    try:
        __import__(module)
    except ImportError:
        return False
    return True
