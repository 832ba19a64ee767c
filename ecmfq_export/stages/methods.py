"""Methods as rows of parts: which samples, which smoothing scales, which rounding with which token weights.

Every method runs through the same stages on the same quantizer (docs/method.md says what each does here); a row names its
parts, and a setting of :class:`QuantConfig` puts another part in the place of the row's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from ecmfq_export.config import QuantConfig
from ecmfq_export.errors import UserError
from ecmfq_export.quant import awq, eaquant, ecs, mbq, smoothquant
from ecmfq_export.quant.scale_result import PerExpertResult, ScaleResult
from ecmfq_export.quant.token_weights import WEIGHTINGS, Weighting

Importance = Literal["consensus", "equal", "veq"]

MEASURED = 0.0
"""gamma that is measured from gradients."""


@dataclass(frozen=True)
class MethodSpec:
    """The parts of a method, also once settings have replaced some.

    Attributes:
        selection, smoothing, smooth_rounding, rounding, clip: as the settings of the same names.
        weightings: token weights to choose from by held-out KL, the first one unless another is clearly better; one, where nothing is
            chosen.
        gamma: text weight before balancing; 0 is measured.
        balanced: whether the text mass is kept within [1/4, 4] times the vision mass.
        cross_strength: of GPTAQ's correction.
        kappa: of the shared Hessian.
        align_routing: whether the attention's output clip is chosen by the router's divergence (EAQuant).
        rotate, rotate_values: as the settings of the same names.
    """

    selection: str = "random"
    smoothing: str = "none"
    smooth_rounding: str = "real"
    rounding: str = "gptq"
    clip: str = "mse"
    weightings: tuple[Weighting, ...] = ("none",)
    gamma: float = 10.0
    balanced: bool = True
    cross_strength: float = 0.0
    kappa: float = 0.0
    align_routing: bool = False
    rotate: str = "none"
    rotate_values: bool = False

    @property
    def needs_data(self) -> bool:
        """Whether any part looks at calibration samples."""
        return self.rounding == "gptq" or self.smoothing != "none" or self.clip == "output"

    @property
    def chooses_weighting(self) -> bool:
        """Whether the rounding stage needs samples that no Hessian has seen."""
        return len(self.weightings) > 1


METHODS: dict[str, MethodSpec] = {
    "ecmfq": MethodSpec("macs", "ecs", weightings=WEIGHTINGS, kappa=32.0),
    "rtn": MethodSpec(rounding="rtn", clip="absmax"),
    "smoothquant": MethodSpec(smoothing="smoothquant", rounding="rtn"),
    "awq": MethodSpec(smoothing="awq", rounding="rtn", clip="output"),
    "gptq": MethodSpec(),
    "gptaq": MethodSpec(cross_strength=1.0),
    "mbq": MethodSpec(smoothing="mbq", rounding="rtn", clip="output", weightings=("rho",), gamma=MEASURED, balanced=False),
    "moequant": MethodSpec(selection="balanced", weightings=("g",)),
    "eaquant": MethodSpec(selection="topped_up", smoothing="eaquant", rounding="rtn", align_routing=True),
    "veq_me": MethodSpec(smoothing="veq_me", rounding="rtn", clip="output", gamma=MEASURED, balanced=False),
    "veq_ma": MethodSpec(weightings=("rho_p",), gamma=MEASURED, balanced=False),
    "veq_me_ma": MethodSpec(smoothing="veq_me", weightings=("rho_p",), gamma=MEASURED, balanced=False),
    "quarot_gptq": MethodSpec(rotate="residual_online", rotate_values=True),
}


@dataclass(frozen=True)
class Smoothing:
    """A search for smoothing scales, and what it reads.

    Attributes:
        shared: ``(train, heldout, weight, omega, num_bits, rounding, tie, *, group_size)`` to one scale behind a norm.
        per_expert: ``(train, heldout, weight, num_bits, rounding, *, group_size, rotation)`` to scales of each expert's down projection;
            None where the method has none.
        weighting: of the tokens in its objective.
        importance: of the experts in its objective.
        gated: whether it needs samples that its search has not seen.
        norms_only: whether only what a norm feeds is smoothed.
        measures: whether its objective needs gamma from gradients.
        rounding: of its scales, unless a setting says otherwise.
    """

    shared: Callable[..., ScaleResult]
    per_expert: Callable[..., PerExpertResult] | None
    weighting: Weighting = "none"
    importance: Importance = "equal"
    gated: bool = False
    norms_only: bool = False
    measures: bool = False
    rounding: str = "real"


SMOOTHINGS: dict[str, Smoothing] = {
    "ecs": Smoothing(ecs.search_scale, ecs.search_per_expert, "rho_g_phi", "consensus", gated=True, rounding="power_of_two"),
    "smoothquant": Smoothing(smoothquant.search_scale, None, norms_only=True),
    "awq": Smoothing(awq.search_scale, awq.search_per_expert),
    "mbq": Smoothing(mbq.search_scale, mbq.search_per_expert, "rho", measures=True),
    "eaquant": Smoothing(eaquant.search_scale, eaquant.search_per_expert),
    "veq_me": Smoothing(awq.search_scale, awq.search_per_expert, importance="veq", measures=True),
}


def resolve(config: QuantConfig) -> MethodSpec:
    """The method's parts with the settings' replacements.

    Raises:
        UserError: parts that do not go together.
    """
    spec = METHODS[config.method]
    changes: dict[str, Any] = {name: getattr(config, name) for name in ("selection", "smoothing", "smooth_rounding", "rounding", "clip")
                               if getattr(config, name) != "method"}
    if changes.get("rounding", spec.rounding) != spec.rounding:
        changes.setdefault("clip", "mse")
    if config.weighting != "method":
        changes["weightings"] = WEIGHTINGS if config.weighting == "auto" else (config.weighting,)
    if config.balance != "method":
        changes["balanced"] = config.balance == "limited"
    for name, value in (("cross_strength", config.cross_strength), ("kappa", config.shrinkage_kappa), ("gamma", config.gamma_text)):
        if value != -1.0:
            changes[name] = value
    if config.rotate != "method":
        changes |= {"rotate": config.rotate, "rotate_values": config.rotate_values}
    elif config.rotate_values:
        changes["rotate_values"] = True
    smoothing = SMOOTHINGS.get(changes.get("smoothing", spec.smoothing))
    if smoothing is not None:
        changes.setdefault("smooth_rounding", smoothing.rounding)
        if smoothing.measures and config.gamma_text == -1.0:
            changes["gamma"] = MEASURED
    parts = dataclasses.replace(spec, **changes)
    if parts.rotate_values and parts.rotate == "none":
        raise UserError("rotate_values = true, but nothing is rotated", "set rotate = 'residual' or 'residual_online'")
    if parts.rounding == "gptq":
        if parts.clip == "output":
            raise UserError("clip = 'output' goes with rounding = 'rtn' only", "GPTQ moves weights after the clip is chosen: set clip=mse")
        return dataclasses.replace(parts, align_routing=False)  # which chooses between clip rules of rounding to nearest
    for key in ("cross_strength", "shrinkage_kappa"):
        if getattr(config, key) > 0.0:
            raise UserError(f"{key} = {getattr(config, key)} does nothing with rounding = 'rtn'", "it is a part of GPTQ: set rounding=gptq")
    if config.weighting == "auto" or (config.weighting not in ("method", "none") and parts.clip != "output"):
        raise UserError(f"weighting = '{config.weighting}' does nothing with rounding = 'rtn' and clip = '{parts.clip}'",
                        "set rounding=gptq, or one weighting with clip=output")
    if parts.chooses_weighting or parts.clip != "output":
        # A row whose rounding was replaced: without an output clip no weight reads a Hessian, and nothing is chosen.
        parts = dataclasses.replace(parts, weightings=("none",))
    return dataclasses.replace(parts, cross_strength=0.0, kappa=0.0)


def calibration_settings(config: QuantConfig) -> dict[str, Any]:
    """What shapes stage calibrate."""
    parts = resolve(config)
    return {"num_samples": config.num_samples, "selection": parts.selection, "gamma_text": parts.gamma,
            "holdout_fraction": config.holdout_fraction, "seed": config.seed}


def smoothing_settings(config: QuantConfig) -> dict[str, Any]:
    """What shapes stage smooth."""
    parts = resolve(config)
    settings: dict[str, Any] = {"attention": config.attention, "expert_bits": config.expert_bits, "group_size": config.group_size,
                                "smoothing": parts.smoothing, "smooth_rounding": parts.smooth_rounding, "seed": config.seed,
                                "rotate": parts.rotate}
    if parts.smoothing == "ecs":
        settings |= {"fusion_lambda": config.fusion_lambda, "theta": config.theta, "gate_power": config.gate_power,
                     "balanced": parts.balanced}
    if parts.smoothing == "smoothquant":
        settings["smooth_alpha"] = config.smooth_alpha
    return settings


def rounding_settings(config: QuantConfig) -> dict[str, Any]:
    """What shapes stage quantize."""
    parts = resolve(config)
    settings: dict[str, Any] = {"attention": config.attention, "expert_bits": config.expert_bits, "lm_head": config.lm_head,
                                "group_size": config.group_size, "rounding": parts.rounding, "clip": parts.clip, "rotate": parts.rotate}
    if not parts.needs_data:
        return settings
    settings |= {"weightings": list(parts.weightings), "balanced": parts.balanced, "fusion_lambda": config.fusion_lambda,
                 "gate_power": config.gate_power, "seed": config.seed, "align_routing": parts.align_routing}
    if parts.rounding == "gptq":
        settings |= {"cross_strength": parts.cross_strength, "shrinkage_kappa": parts.kappa, "percdamp": config.percdamp,
                     "activation_order": config.activation_order}
    if parts.chooses_weighting:
        settings["judged_layers"] = config.judged_layers
    return settings
