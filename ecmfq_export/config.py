"""Everything a run can be told, as frozen dataclasses that are hashed into manifests.

Values come from a TOML file (``[quant]`` and ``[export]`` tables) and from flags, flags winning. An unknown key is an error.
"""

from __future__ import annotations

import dataclasses
import tomllib
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ecmfq_export.errors import UserError

LinearRecipe = Literal["fp16", "w8a8", "w4a8"]


Method = Literal[
    "ecmfq", "rtn", "smoothquant", "awq", "gptq", "gptaq", "mbq", "moequant", "eaquant", "veq_me", "veq_ma", "veq_me_ma",
    "quarot_gptq",
]


@dataclass(frozen=True)
class QuantConfig:
    """How to quantize. Routed and shared experts are W4A8; METHOD names in parentheses.

    A method is a row of parts (``stages/methods.py``). A part's setting is ``method``, or -1 where it is a number, to take what
    the method says, and any other value to put another part in its place.

    Attributes:
        method: ``ecmfq`` is the whole method; ``rtn`` rounds to nearest without smoothing or calibration; the others are
            published methods, see docs/method.md.
        attention: recipe of q, k, v and o projections.
        expert_bits: 4; 3 and 2 round the experts' weights on a coarser grid that is stored as int4 all the same, to compare methods
            where differences are larger: no fewer bytes, no faster kernels.
        lm_head: recipe of the output projection.
        group_size: -1, one scale an output channel; 128, plus int8 group multipliers.
        num_samples: calibration samples that are picked from the pool (K).
        selection: how samples are picked: ``macs``, ``random``, ``balanced`` (MoEQuant) or ``topped_up`` (EAQuant).
        smoothing: which search finds smoothing scales: ``ecs``, a published method's, or ``none``.
        smooth_rounding: ``power_of_two`` keeps folds exact in any binary floating type; ``real`` does not.
        smooth_alpha: SmoothQuant's alpha; 0 chooses one for the whole model by its output error.
        theta: weight of the worst experts (CVaR) in ECS's objective.
        rounding: ``gptq`` or ``rtn``, to nearest.
        clip: how scales of weights are chosen: ``absmax``, ``mse`` (least squared error of the weights, weighted by the Hessian's
            diagonal where there is one) or ``output`` (AWQ's, least output error; with ``rtn`` only).
        weighting: token weights of the Hessian: ``auto`` keeps FAQ's best per layer by held-out final-logit KL.
        judged_layers: most layers in which ``weighting = auto`` compares, spread over the depth: every comparison reads all layers
            behind it again. Each of the others takes the choice of the last one before it.
        gate_power: power of the gate in token weights (q).
        fusion_lambda: weight of the fusion factor phi (lambda).
        gamma_text: text token weight rho; 0 measures it from loss gradients where the samples have answers.
        balance: ``limited`` keeps the total text mass between 1/4 and 4 times the vision mass; ``none`` takes rho as it is.
        cross_strength: factor on GPTAQ's correction for errors of earlier layers; 0 leaves it out.
        percdamp: damping of the Hessian as a fraction of its mean diagonal.
        shrinkage_kappa: pseudo-count of the shared Hessian for experts with few tokens (kappa); 0 shares nothing.
        activation_order: whether GPTQ rounds the columns with the largest diagonal first.
        rotate: ``residual`` rotates the residual stream before anything else; ``residual_online`` also the inputs of the MLPs' down
            projections, in blocks and while the model runs, which no exported graph does.
        rotate_values: whether values are rotated within attention heads too; needs `rotate`.
        holdout_fraction: fraction of the selected samples kept out of every search, for its gate, where the method has one.
        seed: of every random choice.
        expert_memory_gb: memory in GB (1e9 bytes) for rounding a layer's experts, beside the weights and the activations: as many
            experts' Hessians as fit are built and used at a time. It changes time only, no result, and no stage is run again for it.
    """

    method: Method = "ecmfq"
    attention: LinearRecipe = "w8a8"
    expert_bits: Literal[4, 3, 2] = 4
    lm_head: Literal["fp16", "w8a8"] = "fp16"
    group_size: Literal[-1, 128] = -1
    num_samples: int = 128
    selection: Literal["method", "macs", "random", "balanced", "topped_up"] = "method"
    smoothing: Literal["method", "none", "ecs", "smoothquant", "awq", "mbq", "eaquant", "veq_me"] = "method"
    smooth_rounding: Literal["method", "power_of_two", "real"] = "method"
    smooth_alpha: float = 0.5
    theta: float = 0.2
    rounding: Literal["method", "rtn", "gptq"] = "method"
    clip: Literal["method", "absmax", "mse", "output"] = "method"
    weighting: Literal["method", "auto", "none", "rho", "g", "rho_g", "rho_p", "rho_g_phi"] = "method"
    judged_layers: int = 8
    gate_power: float = 1.0
    fusion_lambda: float = 0.5
    gamma_text: float = -1.0
    balance: Literal["method", "limited", "none"] = "method"
    cross_strength: float = -1.0
    percdamp: float = 0.01
    shrinkage_kappa: float = -1.0
    activation_order: bool = True
    rotate: Literal["method", "none", "residual", "residual_online"] = "method"
    rotate_values: bool = False
    holdout_fraction: float = 0.25
    seed: int = 0
    expert_memory_gb: float = 2.0


@dataclass(frozen=True)
class ExportConfig:
    """How to write graphs.

    Attributes:
        max_seq_len: length of the static KV cache; 0 takes the target's limit or the model's, the smaller one.
        max_batch: largest batch that engines take; 0 takes the target's limit.
        max_image_patches: largest number of vision patches (before merging) in one call; bounds the engine's profile.
            Where images fill a canvas of a fixed size (Aria), the largest canvas is the least.
        logits: ``last`` keeps the last position's logits only (generation), ``all`` keeps every position's.
        ort_dtype: type of activations in graphs for ONNX Runtime alone (``--flavour ort``); a target says its own.
    """

    max_seq_len: int = 0
    max_batch: int = 0
    max_image_patches: int = 4096
    logits: Literal["last", "all"] = "all"
    ort_dtype: Literal["float32", "float16"] = "float32"


ConfigT = typing.TypeVar("ConfigT", QuantConfig, ExportConfig)


def build_config(kind: type[ConfigT], values: dict[str, Any], source: str) -> ConfigT:
    """Check `values` against the fields of `kind` and build it; `source` names where they came from in errors.

    Raises:
        UserError: an unknown key, a wrong type, or a value outside the allowed ones.
    """
    hints = typing.get_type_hints(kind)
    known = {field.name for field in dataclasses.fields(kind)}
    for key, value in values.items():
        if key not in known:
            raise UserError(f"{source}: unknown key '{key}'", f"known keys: {', '.join(sorted(known))}")
        hint = hints[key]
        if typing.get_origin(hint) is Literal:
            allowed = typing.get_args(hint)
            if value not in allowed or isinstance(value, bool):
                raise UserError(f"{source}: {key} = {value!r}", f"allowed: {', '.join(map(str, allowed))}")
        elif hint is float and isinstance(value, int) and not isinstance(value, bool):
            continue
        elif type(value) is not hint:
            raise UserError(f"{source}: {key} = {value!r} is a {type(value).__name__}", f"expected {hint.__name__}")
    config = kind(**values)
    _check_ranges(config, source)
    return config


def _check_ranges(config: QuantConfig | ExportConfig, source: str) -> None:
    if isinstance(config, QuantConfig):
        checks = {
            "num_samples": config.num_samples >= 2,
            "smooth_alpha": 0.0 <= config.smooth_alpha <= 1.0,
            "judged_layers": config.judged_layers >= 1,
            "theta": 0.0 <= config.theta <= 1.0,
            "gate_power": 0.0 <= config.gate_power <= 8.0,
            "fusion_lambda": 0.0 <= config.fusion_lambda <= 1.0,
            "gamma_text": config.gamma_text >= 0.0 or config.gamma_text == -1.0,
            "cross_strength": 0.0 <= config.cross_strength <= 1.0 or config.cross_strength == -1.0,
            "percdamp": 0.0 < config.percdamp <= 1.0,
            "shrinkage_kappa": config.shrinkage_kappa >= 0.0 or config.shrinkage_kappa == -1.0,
            "holdout_fraction": 0.0 < config.holdout_fraction < 1.0,
            "seed": config.seed >= 0,
            "expert_memory_gb": 0.0 < config.expert_memory_gb < float("inf"),
        }
    else:
        checks = {
            "max_seq_len": config.max_seq_len >= 0,
            "max_batch": config.max_batch >= 0,
            "max_image_patches": config.max_image_patches >= 4,
        }
    for key, holds in checks.items():
        if not holds:
            raise UserError(f"{source}: {key} = {getattr(config, key)} is out of range", "see --help for its meaning")
    if isinstance(config, QuantConfig) and config.rotate_values and config.rotate == "none":
        raise UserError(f"{source}: rotate_values = true with rotate = 'none'", "set rotate = 'residual' or 'residual_online'")


def load_toml(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The ``[quant]`` and ``[export]`` tables of a configuration file, unchecked.

    Raises:
        UserError: no such file, no TOML, or another table in it.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no configuration file at {path}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid TOML: {error}") from None
    for key in data:
        if key not in ("quant", "export"):
            raise UserError(f"{path}: unknown table '{key}'", "known tables: quant, export")
    return data.get("quant", {}), data.get("export", {})


def split_settings(settings: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sort ``KEY=VALUE`` settings into fields of :class:`QuantConfig` and of :class:`ExportConfig`.

    Values are read as TOML (``8``, ``0.5``, ``true``), and as a plain string where they are no TOML (``w4a8``).

    Raises:
        UserError: no ``=``, or a key that neither has.
    """
    parts: dict[type, dict[str, Any]] = {QuantConfig: {}, ExportConfig: {}}
    names = {field.name: kind for kind in parts for field in dataclasses.fields(kind)}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or key not in names:
            raise UserError(f"--set {setting}: unknown setting", f"known settings: {', '.join(sorted(names))}")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        parts[names[key]][key] = value
    return parts[QuantConfig], parts[ExportConfig]
