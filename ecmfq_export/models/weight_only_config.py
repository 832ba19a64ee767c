"""What ``quantization_config`` says of another quantizer's int4 checkpoint: GPTQ, AWQ, or compressed-tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ecmfq_export.errors import CheckpointError, UnsupportedError

MARKS = {"gptq": "qweight", "awq": "qweight", "compressed-tensors": "weight_scale"}
"""By method: the tensor of a module whose presence says that it is quantized."""

_ANEW = "quantize the floating-point checkpoint again, with ecmfq-export or the library that wrote this one"

_GPTQ_HARMLESS = {
    "meta", "method", "lm_head", "model_name_or_path", "model_file_base_name", "damp_percent", "damp_auto_increment", "static_groups",
    "true_sequential", "dataset", "tokenizer", "use_exllama", "exllama_config", "use_cuda_fp16", "max_input_length", "batch_size",
    "block_name_to_quantize", "module_name_preceding_first_block", "modules_in_block_to_quantize", "pad_token_id", "model_seqlen",
    "cache_block_outputs", "backend", "quantizer", "hyb_act", "mse", "device", "act_group_aware", "offload_to_disk", "pack_impl",
    "modules_to_not_convert", "act_order",
}  # fmt: skip
_AWQ_HARMLESS = {
    "modules_to_not_convert", "backend", "do_fuse", "fuse_max_seq_len", "modules_to_fuse", "exllama_config", "meta", "method",
    "pack_dtype", "desc_act", "sym", "lm_head", "checkpoint_format", "quantizer",
}  # fmt: skip
"""Fields of how a checkpoint was made or is run elsewhere; which modules are quantized is read from the tensors themselves."""


@dataclass(frozen=True)
class WeightOnlyForm:
    """How the quantized modules of a checkpoint are stored; all of them alike.

    Attributes:
        method: who packs so.
        group_size: columns that share a scale; -1 for all of a row.
        minus_one: GPTQ's zero points are stored less one (format ``gptq``), not as they are (``gptq_v2``).
        zero_points: compressed-tensors: whether modules have a ``weight_zero_point``.
        group_indices: compressed-tensors: whether modules have a ``weight_g_idx``. (GPTQ's always have a ``g_idx``.)
        bytes: compressed-tensors: an int8 for each value (``int-quantized``), not eight values a word (``pack-quantized``).
        activations: what the checkpoint was made for: ``float`` (W4A16), or ``int8``, dynamic and per token (W4A8).
    """

    method: Literal["gptq", "awq", "compressed-tensors"]
    group_size: int
    minus_one: bool = False
    zero_points: bool = False
    group_indices: bool = False
    bytes: bool = False
    activations: Literal["float", "int8"] = "float"

    @property
    def mark(self) -> str:
        """Suffix of a tensor that quantized modules have and others have not."""
        return MARKS[self.method]


def read_weight_only(config: Mapping[str, Any]) -> WeightOnlyForm | None:
    """The form of a config.json's int4 weights; None where it has none, or one that quantized_reader.py reads.

    Raises:
        UnsupportedError: other bits than 4, a packing that is not read, settings by module, or a field that is not known.
        CheckpointError: a field of a wrong type.
    """
    quantization = config.get("quantization_config")
    if not isinstance(quantization, Mapping):
        return None
    method = quantization.get("quant_method")
    if method == "gptq":
        return _gptq(quantization)
    if method == "awq":
        return _awq(quantization)
    if method == "compressed-tensors" and (_without_activations(quantization) or _names_observers(quantization)):
        return _compressed(quantization)
    return None


def _gptq(given: Mapping[str, Any]) -> WeightOnlyForm:
    form = given.get("checkpoint_format") or given.get("format") or "gptq"
    _expect("checkpoint_format", form, "gptq", "gptq_v2")
    _expect("bits", given.get("bits"), 4)
    _expect("pack_dtype", given.get("pack_dtype", "int32"), "int32")
    _expect("is_marlin_format", given.get("is_marlin_format", False), False)
    _expect_one_setting(given)
    known = {"quant_method", "bits", "group_size", "sym", "desc_act", "checkpoint_format", "format", "pack_dtype", "is_marlin_format",
             "dynamic"}
    _refuse_unknown(given, known | _GPTQ_HARMLESS)
    return WeightOnlyForm("gptq", _group_size(given), minus_one=form == "gptq")


def _awq(given: Mapping[str, Any]) -> WeightOnlyForm:
    version = str(given.get("version") or given.get("format") or "gemm").lower()
    _expect("version", version, "gemm")
    _expect("bits", given.get("bits", given.get("w_bit", 4)), 4)
    _expect_one_setting(given)
    known = {"quant_method", "bits", "w_bit", "group_size", "q_group_size", "zero_point", "version", "format", "dynamic"}
    _refuse_unknown(given, known | _AWQ_HARMLESS)
    return WeightOnlyForm("awq", _group_size(given, "q_group_size"))


def _expect_one_setting(given: Mapping[str, Any]) -> None:
    """GPTQModel's ``dynamic``: patterns with ``-:`` leave modules alone, which their tensors show; others give them settings."""
    dynamic = given.get("dynamic") or {}
    if not isinstance(dynamic, Mapping):
        raise CheckpointError(f"quantization_config.dynamic = {dynamic!r}", "expected patterns with their settings")
    for pattern in dynamic:
        if not str(pattern).startswith("-:"):
            raise UnsupportedError(f"quantization_config.dynamic gives the modules {pattern!r} settings of their own", _ANEW)


def _without_activations(given: Mapping[str, Any]) -> bool:
    groups = given.get("config_groups")
    members = list(groups.values()) if isinstance(groups, Mapping) else []
    return bool(members) and all(isinstance(group, Mapping) and group.get("input_activations") is None for group in members)


def _names_observers(given: Mapping[str, Any]) -> bool:
    """int4 of llm-compressor, with int8 activations too: any floating scale a group. Ours have two levels, and name no observer."""
    groups = given.get("config_groups")
    members = list(groups.values()) if isinstance(groups, Mapping) else []
    weights = [group.get("weights") if isinstance(group, Mapping) else None for group in members]
    return bool(members) and all(
        isinstance(w, Mapping) and w.get("num_bits") == 4 and w.get("observer") for w in weights
    )


def _compressed(given: Mapping[str, Any]) -> WeightOnlyForm:
    _expect("quantization_status", given.get("quantization_status", "compressed"), "compressed")
    for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        if given.get(key):
            raise UnsupportedError(f"quantization_config.{key} is not supported", _ANEW)
    forms = {name: _compressed_group(f"config_groups.{name}", group, given.get("format")) for name, group in given["config_groups"].items()}
    if len(set(forms.values())) > 1:
        raise UnsupportedError(f"quantization_config has groups of different schemes: {', '.join(forms)}", "give all modules one scheme")
    return next(iter(forms.values()))


def _compressed_group(where: str, group: Mapping[str, Any], default_format: Any) -> WeightOnlyForm:
    weights = group.get("weights")
    if not isinstance(weights, Mapping):
        raise UnsupportedError(f"quantization_config.{where} has no weights", _ANEW)
    storage = group.get("format") or default_format
    _expect(f"{where}.format", storage, "pack-quantized", "int-quantized")
    if storage == "int-quantized":
        _expect(f"{where}.weights.symmetric", weights.get("symmetric", True), True)
    _expect(f"{where}.output_activations", group.get("output_activations"), None)
    _expect(f"{where}.weights.num_bits", weights.get("num_bits"), 4)
    _expect(f"{where}.weights.type", weights.get("type", "int"), "int")
    _expect(f"{where}.weights.dynamic", weights.get("dynamic", False), False)
    strategy = weights.get("strategy") or ("group" if weights.get("group_size") else "tensor")
    _expect(f"{where}.weights.strategy", strategy, "group", "channel")
    inputs = group.get("input_activations")
    if inputs is not None:
        expected = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
        for key, value in expected.items():
            _expect(f"{where}.input_activations.{key}", inputs.get(key) if isinstance(inputs, Mapping) else inputs, value)
    actorder = weights.get("actorder")
    _expect(f"{where}.weights.actorder", actorder, None, False, True, "weight", "static", "group", "dynamic")
    size = _group_size(weights) if strategy == "group" else -1
    # "weight" and "static" order columns while rounding only; "group" (also spelled true or dynamic) leaves them in that order.
    return WeightOnlyForm("compressed-tensors", size, zero_points=not weights.get("symmetric", True),
                          group_indices=strategy == "group" and actorder in (True, "group", "dynamic"),
                          bytes=storage == "int-quantized", activations="float" if inputs is None else "int8")


def _group_size(given: Mapping[str, Any], other: str = "group_size") -> int:
    value = given.get("group_size", given.get(other))
    if type(value) is not int or not (value == -1 or value > 0):
        raise CheckpointError(f"quantization_config.group_size = {value!r}", "expected -1 or a positive integer")
    return value


def _expect(name: str, value: Any, *allowed: Any) -> None:
    if not any(value is choice or (type(value) is type(choice) and value == choice) for choice in allowed):
        raise UnsupportedError(f"quantization_config.{name} = {value!r} is not supported",
                               f"supported: {', '.join(repr(choice) for choice in allowed)}; {_ANEW}")


def _refuse_unknown(given: Mapping[str, Any], known: set[str]) -> None:
    unknown = sorted(set(given) - known)
    if unknown:
        raise UnsupportedError(f"quantization_config has fields that are not known: {', '.join(unknown)}",
                               "they could change what it means")
