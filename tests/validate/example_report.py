"""A report with made-up figures, for the tests of its checks and its pages."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from ecmfq_export.validate.evaluate import accuracy_by_type, paired_bootstrap
from ecmfq_export.validate.report import SCHEMA_VERSION, Thresholds, finite, judge

EDGES = np.arange(-10.0, 2.01, 0.25).tolist()


def _comparison(kl: float, top1: float) -> dict[str, float | int]:
    return {"kl_mean": kl, "kl_median": kl / 2, "kl_p95": 3 * kl, "kl_max": 30 * kl, "top1_agreement": top1,
            "top1_disagreements": round((1 - top1) * 500), "positions": 500, "top1_decisive": top1,
            "decisive_disagreements": round((1 - top1) * 480), "decisive_positions": 480}  # fmt: skip


def example_report(questions: int = 240, **changes: Any) -> dict[str, Any]:
    """A passing report; `changes` replace top-level entries before it is judged."""
    generator = np.random.default_rng(0)
    types = [("color", "count", "<b>odd</b> & $x$")[i % 3] for i in range(questions)]
    right = {"float": generator.random(questions) < 0.96}
    right["quantized"] = right["float"].copy()
    right["quantized"][0] = ~right["quantized"][0]
    right["onnx"] = right["quantized"]
    histogram = np.histogram(generator.normal(-4, 1, 500), EDGES)[0].tolist()
    layers = [
        {"index": i, "float_vs_quantized": {"sqnr_db": 30.0 - 2 * i, "cosine": 0.999, "max_abs": 0.1, "median_error": 0.01},
         "quantized_vs_onnx": {"sqnr_db": None if i == 0 else 60.0 - i, "cosine": 1.0, "max_abs": 1e-3, "median_error": 2e-7},
         "same_experts": 0.98,
         "expert_usage": {"text": generator.integers(0, 90, 16).tolist(), "vision": generator.integers(0, 90, 16).tolist()}}
        for i in range(4)
    ]  # fmt: skip
    record = {
        "method": "ecmfq",
        "layers": [{"layer": i, "weighting": "rho_g", "kl": {"none": 2e-5, "rho_g": 1e-5},
                    "errors": {"attention_input": [2e-5], "gate_up": [*(generator.random(15) * 1e-2), None], "down": [1e-3] * 16},
                    "tokens": [*([int(n), 9] for n in generator.integers(1, 90, 15)), [0, 0]]} for i in range(4)],
        "scales": {"moe_input": [{"layer": i, "quantiles": [0.1, 0.5, 1.0, 2.0, 8.0]} for i in range(4)]},
        "selection": {"pool": 448, "selected": 32, "topped_up": 3,
                      "figures": {"objective": [2.3, 1.8], "coverage": [1.0, 1.0], "usage_std": [0.2, 0.3]}},
    }  # fmt: skip
    row = {"float16": 1_474_560, "stored": 376_320, "ratio": 0.2552}
    report = {
        "schema_version": SCHEMA_VERSION,
        "quantization": record,
        "model": {"family": "qwen3_vl_moe", "layers": 4, "hidden_size": 128, "experts": 16, "top_k": 4, "quantized": True},
        "settings": {"items": questions, "positions": "tokens of held-out answers", "tapped_items": 6, "onnx_dtype": "float16"},
        "vision": [{"output": "image features", "sqnr_db": 61.0, "cosine": 1.0, "max_abs": 1e-3, "median_error": 2e-7}],
        "layers": layers,
        "logits": {"float_vs_quantized": _comparison(8e-4, 0.998), "quantized_vs_onnx": _comparison(1e-5, 1.0),
                   "prefill_vs_decode": _comparison(0.0, 1.0)},
        "kl_histogram": {"log10_edges": EDGES, "float_vs_quantized": histogram, "quantized_vs_onnx": histogram[8:] + [0] * 8},
        "accuracy": {m: accuracy_by_type(types, r) for m, r in right.items()},
        "retention": {m: int(right[m].sum()) / int(right["float"].sum()) for m in ("quantized", "onnx")},
        "paired": {"quantized - float": vars(paired_bootstrap(right["float"], right["quantized"], 500))},
        "same_answers": {"float, quantized": 0.99, "quantized, onnx": 1.0},
        "retrieval": {"candidates": 16, "prompts": 320, "recalls": {
            m: {"image_to_text_r@1": 0.9, "text_to_image_r@1": 0.8, "mean": 0.85, "near_duplicate": None} for m in right}},
        "items": [{"index": 0, "question": "<script>alert(1)</script>", "answer": "a & b", "type": "color", "kl": 0.02,
                   "said": {"float": "a & b", "quantized": "<i>b</i>", "onnx": "b"},
                   "correct": {"float": True, "quantized": False, "onnx": False}}],
        "bytes": {"layers": {"w4a8": row, "w8a8": {"float16": 393_216, "stored": 199_680, "ratio": 0.5078},
                             "quantized": {"float16": 1_867_776, "stored": 576_000, "ratio": 0.3084}},
                  "whole": {"float16": 3_200_000, "stored": 1_900_000, "ratio": 0.594},
                  "by_precision": {"int4": 368_640, "int8": 196_608, "scales": 10_752, "float": 1_324_000}, "group_size": -1,
                  "artifacts": {"onnx/decoder": 2_000_000, "onnx, all": 2_400_000, "engines/rtx/decoder.engine": 3_000_000}},
        "engines": {"target": "rtx", "decoder": {"bytes": 3_000_000, "plugin_nodes": [{}] * 4, "compute_capabilities": [86, 89]}},
        "seconds": {"pytorch": 20.0, "onnx": 10.0},
        **copy.deepcopy(changes),
    }  # fmt: skip
    report["thresholds"] = vars(Thresholds())
    report["checks"] = judge(report, Thresholds())
    return finite(report)
