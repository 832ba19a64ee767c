"""Stage import: another quantizer's int4 checkpoint carried over to the integer kernels' form, in the place of stage quantize.

Nothing is rounded anew where the form can hold it. GPTQ, AWQ and compressed-tensors' weight-only checkpoints are made for
floating-point activations (W4A16); what this stage writes computes with int8 ones (W4A8), as everything does that the kernels run.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from ecmfq_export import bundle
from ecmfq_export.config import QuantConfig
from ecmfq_export.errors import UnsupportedError, UserError
from ecmfq_export.models.moe_vlm import MoEVLM, layer_shapes, open_model
from ecmfq_export.models.quantized_format import QuantizedWriter
from ecmfq_export.models.spec import DecoderLayerSpec, MoESpec
from ecmfq_export.progress import Progress
from ecmfq_export.quant.integer_scales import to_integer_scales
from ecmfq_export.quant.qtensor import GROUP, QTensor
from ecmfq_export.quant.rtn import quantize_rtn
from ecmfq_export.quant.weight_only import WeightOnly
from ecmfq_export.stages.recipes import attention_bits

STAGE = "import"

RECORD = "import.json"
"""What became of each weight: a list with one object a layer, ``layer`` and by canonical suffix ``recipe`` and ``error``, see
:func:`import_quantized`."""

GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"

_MADE_FOR = {"float": "the checkpoint was made for floating-point ones (W4A16)", "int8": "as the checkpoint was made for (W4A8)"}
_ANEW = "round it anew from its dequantized weights ('ecmfq-export quantize')"
_WAY_OUT = f"{_ANEW}, or export it weight-only for ONNX Runtime (--flavour ort)"


def import_quantized(model_dir: Path, out_dir: Path, config: QuantConfig, progress: Progress) -> Path:
    """Write what `model_dir` holds as a W4A8 checkpoint to `out_dir`.

    Routed and shared experts keep their integers: exactly, with one scale a channel; with groups, under the integer multipliers
    nearest to their scales. Other quantized projections follow ``config.attention``: ``w4a8`` keeps the integers and needs one
    symmetric scale a channel; ``w8a8`` keeps them where it can and else rounds the dequantized weight to int8; ``fp16`` takes the
    dequantized weight. What the checkpoint left in floating point stays so.

    ``import.json`` beside the weights: ``error`` is the norm of a weight's change over its norm, 0 where the values are the same.

    Raises:
        UnsupportedError: a checkpoint without quantized experts, or experts that the kernels' form cannot hold: zero points, inputs in
            activation order, groups that are no multiple of 128.
        UserError: damaged weights, or a full disk.
    """
    model = open_model(model_dir)
    if model.weight_only is None:
        raise UnsupportedError(f"{model_dir} holds no weight-only int4 weights",
                               "import takes GPTQ, AWQ and W4A16 compressed-tensors checkpoints")
    require_importable(model)
    settings = {"attention": config.attention, "source": dataclasses.asdict(model.weight_only)}
    inputs = {"model": bundle.fingerprint(model_dir)}
    if bundle.is_current(out_dir, STAGE, settings, inputs):
        progress.note(f"{out_dir}: up to date")
        return out_dir
    with bundle.write_stage(out_dir, STAGE, settings, inputs, resume=True) as (work, info):
        writer = QuantizedWriter(work, model)
        record = _read_record(work / RECORD)
        layers = range(model.spec.num_layers)
        for index in progress.track(layers, f"import {model.weight_only.method} weights", len(layers)):
            if index < len(record) and writer.has_layer(index):
                continue
            weights, errors = import_layer(model, index, config)
            writer.write_layer(index, weights)
            record[index:] = [{"layer": index, **errors}]
            bundle.write_json(work / RECORD, record)
        writer.finish()
        entries = [entry for layer in record for entry in layer.values() if isinstance(entry, dict)]
        info.update(
            method=model.weight_only.method, largest_error=max(entry["error"] for entry in entries),
            exact_weights=sum(entry["error"] == 0 for entry in entries), weights=len(entries),
            activations=f"int8 a token, {_MADE_FOR[model.weight_only.activations]}",
        )  # fmt: skip
    progress.note(f"{info['exact_weights']} of {info['weights']} weights carried over exactly, largest relative change "
                  f"{info['largest_error']:.2g}; activations: {info['activations']}")
    return out_dir


def require_importable(model: MoEVLM) -> None:
    """Refuse what headers and config.json tell already, before any work; zero points and orders of columns are in the tensors.

    Raises:
        UnsupportedError: naming a weight.
    """
    require_experts(model)
    size = model.weight_only.group_size
    for index in model.spec.moe_layers:
        columns = {name: model.shape(name)[-1] for name in (f"layers.{index}.{GATE_UP}", f"layers.{index}.{DOWN}")}
        if size == -1 or size >= max(columns.values()):
            continue
        for name, width in columns.items():
            if size % GROUP or width % GROUP:
                what = f"'{name}' has groups of {min(size, width)} among {width} columns, and integer kernels take groups of {GROUP}"
                raise UnsupportedError(what, _WAY_OUT)


def require_experts(model: MoEVLM) -> None:
    """Refuse a weight-only checkpoint whose experts are not quantized as a whole.

    Raises:
        UnsupportedError: naming a layer.
    """
    for index in model.spec.moe_layers:
        for suffix in (GATE_UP, DOWN):
            if not model.has_int4(f"layers.{index}.{suffix}"):
                raise UnsupportedError(f"'layers.{index}.{suffix}' is not quantized in {model.path}",
                                       "every routed layer's experts must be; 'ecmfq-export quantize' rounds such a checkpoint anew")


def import_layer(model: MoEVLM, index: int, config: QuantConfig) -> tuple[dict[str, torch.Tensor | QTensor], dict[str, Any]]:
    """Decoder layer `index`: what changes, by canonical suffix, and what became of each quantized weight; see :func:`import_quantized`.

    Raises:
        UnsupportedError: naming the weight and why it cannot be carried over.
    """
    spec, prefix = model.spec.layers[index], f"layers.{index}."
    weights: dict[str, torch.Tensor | QTensor] = {}
    errors: dict[str, Any] = {}
    for suffix in layer_shapes(model.spec, spec):
        if suffix in (GATE_UP, DOWN) or not model.has_int4(prefix + suffix):
            continue
        bits = attention_bits(config)
        if bits is None:
            errors[suffix] = {"recipe": "float", "error": 0.0}
            continue
        weight, error = _dense(model.weight_only_tensor(prefix + suffix), bits, prefix + suffix)
        weights[suffix], errors[suffix] = weight, {"recipe": f"w{bits}a8", "error": error}
    if isinstance(spec.mlp, MoESpec):
        for suffix, (weight, error) in _experts(model, spec, prefix).items():
            weights[suffix], errors[suffix] = weight, {"recipe": "w4a8", "error": error}
    return weights, errors


def _dense(weight: WeightOnly, bits: int, name: str) -> tuple[QTensor, float]:
    """A projection of one kernel call: the same integers where one symmetric scale a channel allows, else the nearest int8."""
    if weight.num_groups == 1 and weight.zero_point is None:
        exact, error = _carried(weight, False, name)
        return (exact if bits == 4 else QTensor(exact.qvalue, exact.scale, 8)), error
    if bits == 4:
        zeros = " with zero points" if weight.zero_point is not None else ""
        raise UnsupportedError(f"'{name}' has groups of {weight.group_size} columns{zeros}",
                               "dense int4 projections take one symmetric scale a channel; use --attention w8a8 or fp16")
    wanted = weight.dequantize()
    rounded = quantize_rtn(wanted, 8)
    return rounded, float((rounded.dequantize() - wanted).norm() / wanted.norm().clamp_min(1e-30))


def _experts(model: MoEVLM, spec: DecoderLayerSpec, prefix: str) -> dict[str, tuple[QTensor, float]]:
    """Both expert matrices. An order of the down projection's inputs goes into the rows of gate and up, which is the same function."""
    gate_up, down = model.weight_only_tensor(prefix + GATE_UP), model.weight_only_tensor(prefix + DOWN)
    try:
        down, order = down.in_group_order()
    except UserError as error:
        raise type(error)(f"'{prefix}{DOWN}': {error.what}", error.fix) from None
    if order is not None:
        gate_up = gate_up.take_rows(torch.cat((order, order + spec.mlp.intermediate_size), -1))
    grouped = gate_up.num_groups > 1 or down.num_groups > 1
    return {suffix: _carried(weight, grouped, prefix + suffix) for suffix, weight in ((GATE_UP, gate_up), (DOWN, down))}


def _carried(weight: WeightOnly, grouped: bool, name: str) -> tuple[QTensor, float]:
    try:
        return to_integer_scales(weight, grouped)
    except UnsupportedError as error:
        # QMoE has no form for an order of its own for each expert either.
        raise UnsupportedError(f"'{name}' has {error.what}, and {error.fix}", _WAY_OUT if weight.group_index is None else _ANEW) from None


def _read_record(file: Path) -> list[dict[str, Any]]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
