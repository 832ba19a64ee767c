"""What is compared: the published methods, ECMFQ's ablations, and further settings, each as settings of QuantConfig.

Names are those of the tables. Every variant runs through the same stages, quantizer, calibration pool and scope.
"""

from __future__ import annotations

from typing import Any

METHODS = (
    "rtn", "smoothquant", "awq", "gptq", "gptaq", "mbq", "moequant", "eaquant", "veq_me", "veq_ma", "veq_me_ma", "quarot_gptq",
    "ecmfq",
)  # fmt: skip
"""Settings of ``method``; the last one is ours, all others are baselines."""

OURS = "ecmfq"

# FAQ off: plain GPTQ. Rounding to nearest would read no data, and MACS alone could show nothing.
_NO_FAQ = {"weighting": "none", "cross_strength": 0.0, "shrinkage_kappa": 0.0}
_NO_ECS = {"smoothing": "none"}
_NO_MACS = {"selection": "random"}

ABLATIONS: dict[str, dict[str, Any]] = {
    "ECS alone": _NO_FAQ | _NO_MACS,
    "MACS alone": _NO_FAQ | _NO_ECS,
    "FAQ alone": _NO_ECS | _NO_MACS,
    "ECS + FAQ": _NO_MACS,
    "MACS + FAQ": _NO_ECS,
    "MACS + ECS": _NO_FAQ,
    "lambda = 0": {"fusion_lambda": 0.0},
    "weights: none": {"weighting": "none"},
    "weights: rho": {"weighting": "rho"},
    "weights: rho·g": {"weighting": "rho_g"},
    "weights: rho·g²": {"weighting": "rho_g", "gate_power": 2.0},
    "weights: rho·g·phi": {"weighting": "rho_g_phi"},
    "K = 32": {"num_samples": 32},
    "K = 256": {"num_samples": 256},
    "real-valued scales": {"smooth_rounding": "real"},
    "cross term": {"cross_strength": 1.0},
    "cross term, a quarter": {"cross_strength": 0.25},
    "no shrinkage": {"shrinkage_kappa": 0.0},
    "kappa = 256": {"shrinkage_kappa": 256.0},
    "rotation (option R)": {"rotate": "residual"},
    "rotation, online too": {"rotate": "residual_online", "rotate_values": True},
}
"""ECMFQ with parts left out or replaced."""

STRESSES = ("plain", "mild", "strong")
"""Forms of each model: as trained, and with function-preserving outliers (benchmarks/testbed/stress.py)."""


def settings_of(variant: str) -> dict[str, Any]:
    """Settings of a method or an ablation.

    Raises:
        KeyError: neither.
    """
    if variant in METHODS:
        return {"method": variant}
    return {"method": OURS, **ABLATIONS[variant]}
