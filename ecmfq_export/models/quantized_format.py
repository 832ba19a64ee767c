"""Writing a quantized checkpoint: a Hugging Face directory in the compressed-tensors format, layer by layer.

One shard a decoder layer and one for everything else, so that an interrupted run keeps the layers it finished. Floating
tensors keep the dtype that the source checkpoint stores, but for norms, routers and biases that folded scales made inexact in
it: these are float32. Given no quantized tensor at all, the result is a floating-point copy.
What is on disk is described in quantized_reader.py; reading is ``open_model`` on the directory.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ecmfq_export.errors import CheckpointError
from ecmfq_export.models.checkpoint import INDEX_FILE, read_header
from ecmfq_export.models.float_source import ExpertsSource, JoinedSource
from ecmfq_export.models.group_scales import join_scales
from ecmfq_export.models.moe_vlm import MoEVLM, layer_shapes, open_model
from ecmfq_export.models.online_rotation import DOWN, KEY, transform_config
from ecmfq_export.models.quantized_reader import Scheme, quantizable_modules
from ecmfq_export.models.registry import CONFIG_FILE
from ecmfq_export.models.safetensors_writer import TensorToWrite, write_safetensors
from ecmfq_export.quant.hadamard import online_block
from ecmfq_export.quant.pack import pack_int4
from ecmfq_export.quant.qtensor import QTensor

_SIDE_FILES = re.compile(r".*\.(json|jinja|txt|model|md)|LICENSE.*|NOTICE.*")
_WEIGHT_FILES = re.compile(r".*\.index\.json|config\.json|quant(ize)?_config\.json|manifest\.json|README\.md")
_SMALL = re.compile(r"norm\.weight$|\.router\.weight$|\.bias$")
"""What folds leave in floating point; all of it together is small beside a layer's weights."""

_KINDS = {
    "experts": (r"\.mlp\.experts\.(gate_up|down)_proj$", r"re:.*\.mlp\.(shared_)?experts\.\d+\.(gate|up|down)_proj$"),
    "attention": (r"\.self_attn\.\w+_proj\.weight$", r"re:.*\.self_attn\.\w+_proj(_with_mqa)?$"),
    "dense MLP": (r"\.mlp\.(gate|up|down)_proj\.weight$", r"re:.*\.mlp\.(gate|up|down)_proj$"),
    "lm_head": (r"^lm_head\.weight$", r"re:(.*\.)?lm_head$"),
}
"""Weights that usually share a scheme: their canonical names, and the pattern that names their modules."""


class QuantizedWriter:
    """Writes a quantized version of a floating-point model into a directory.

    ::

        writer = QuantizedWriter(work_dir, model)
        for index in range(model.spec.num_layers):
            if not writer.has_layer(index):
                writer.write_layer(index, {"mlp.experts.gate_up_proj": qtensor, "input_layernorm.weight": folded, ...})
        quantized_model = writer.finish()

    Args:
        work_dir: an existing directory, possibly with layers of an interrupted run on the same input.
        model: the floating-point source.
        rotated_down: whether the quantized down projections that are given expect inputs in the blocks of
            ``hadamard.online_block`` (online_rotation.py).

    Raises:
        ValueError: `model` is quantized already.
    """

    def __init__(self, work_dir: Path, model: MoEVLM, rotated_down: bool = False) -> None:
        if model.quantization is not None:
            raise ValueError(f"{model.path} is quantized already")
        self.work_dir = Path(work_dir)
        self.model = model
        self._rotated_down = rotated_down

    def has_layer(self, index: int) -> bool:
        """Whether an earlier run finished layer `index` (its shard is there, whole and readable)."""
        try:
            return bool(read_header(self._shard(index)))
        except CheckpointError:
            return False

    def write_layer(self, index: int, tensors: Mapping[str, torch.Tensor | QTensor]) -> None:
        """Write decoder layer `index`.

        Args:
            tensors: by canonical suffix (``"self_attn.q_proj.weight"``, ``"mlp.experts.gate_up_proj"``); floating tensors are
                cast to their stored dtype (norms, routers and biases to float32 where that would round them). What is not given is
                copied unchanged from the source.

        Raises:
            CheckpointError: a tensor that overflows its stored dtype.
            OSError: the disk is full.
            ValueError: an unknown suffix, a wrong shape, or a QTensor for what is no linear weight.
        """
        prefix = f"layers.{index}."
        known = [prefix + suffix for suffix in layer_shapes(self.model.spec, self.model.spec.layers[index])]
        self._write(self._shard(index), known, {prefix + suffix: tensor for suffix, tensor in tensors.items()})

    def finish(self, rest: Mapping[str, torch.Tensor | QTensor] | None = None) -> MoEVLM:
        """Write what is in no layer, the index, config.json and the tokenizer's files; open and return the result.

        Tensors that text and images do not need (``MoEVLM.unused``) are copied as they are, so that the result is a whole model.

        Args:
            rest: changed tensors outside the layers by canonical name (``"norm.weight"``, ``"lm_head.weight"``); all others are
                copied unchanged.

        Raises:
            CheckpointError: a layer is missing, or the result does not read back.
            OSError: the disk is full.
            ValueError: as :meth:`write_layer`.
        """
        layers = range(self.model.spec.num_layers)
        missing = [index for index in layers if not self.has_layer(index)]
        if missing:
            raise CheckpointError(f"{self.work_dir} lacks {len(missing)} layers, the first is {missing[0]}", "run again")
        outside = [name for name in self.model.names() if not name.startswith("layers.")]
        rest_shard = self._shard(len(layers))
        self._write(rest_shard, outside, rest or {}, self.model.unused)
        weight_map: dict[str, str] = {}
        total = 0
        for shard in [*(self._shard(index) for index in layers), rest_shard]:
            for name, entry in read_header(shard).items():
                weight_map[name] = shard.name
                total += entry.num_bytes
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(self.work_dir / INDEX_FILE, index)
        config = {key: value for key, value in self.model.config.items() if key != "quantization_config"}
        schemes = self._schemes(weight_map)
        quantization = quantization_config(schemes, self.model)
        if quantization is not None:
            config["quantization_config"] = quantization
            transforms = transform_config(self._blocks(schemes)) if self._rotated_down else None
            if transforms is not None:
                quantization[KEY] = transforms
        _write_json(self.work_dir / CONFIG_FILE, config)
        self._copy_side_files()
        return open_model(self.work_dir)

    def _shard(self, index: int) -> Path:
        return self.work_dir / f"model-{index + 1:05d}-of-{self.model.spec.num_layers + 1:05d}.safetensors"

    def _write(
        self, shard: Path, names: Iterable[str], given: Mapping[str, torch.Tensor | QTensor], copied: Iterable[str] = ()
    ) -> None:
        names = list(names)
        unknown = sorted(set(given) - set(names))
        if unknown:
            raise ValueError(f"{shard.name} takes no tensor named {unknown}")
        entries: dict[str, TensorToWrite] = {}
        for name in names:
            tensor = given.get(name)
            shape = self.model.shape(name)
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(f"'{name}' is {list(tensor.shape)}, expected {list(shape)}")
            if isinstance(tensor, QTensor):
                entries.update(_quantized_entries(self.model, name, tensor))
            else:
                entries.update(self._float_entries(name, tensor))
        checkpoint = self.model.checkpoint
        entries |= {name: TensorToWrite(checkpoint.dtype(name), checkpoint.shape(name), partial(checkpoint.load, name)) for name in copied}
        write_safetensors(shard, entries)

    def _float_entries(self, name: str, tensor: torch.Tensor | None) -> dict[str, TensorToWrite]:
        """Tensors on disk of a floating tensor; None copies it, in the canonical layout."""
        model, source, dtype = self.model, self.model.float_source(name), self.model.stored_dtype(name)
        if tensor is None and isinstance(source, (ExpertsSource, JoinedSource)):
            return {part: TensorToWrite(dtype, shape, partial(model.disk_part, name, part))
                    for part, shape in source.disk_shapes().items()}
        if tensor is None:
            return {source.name: TensorToWrite(dtype, source.shape, lambda: model.tensor(name))}
        stored = tensor.detach().to(dtype)
        if not bool(torch.isfinite(stored).all()):
            raise CheckpointError(
                f"'{name}' overflows {dtype} (largest magnitude {float(tensor.abs().max()):g})",
                "convert the checkpoint to bfloat16 or float32 and quantize that",
            )
        return {part: TensorToWrite.of(values) for part, values in source.split(_exact(name, tensor.detach(), stored)).items()}

    def _schemes(self, on_disk: Mapping[str, str]) -> dict[str, Scheme]:
        """Canonical weight to scheme, found in what is on disk: layers of an earlier run count alike."""
        headers = {shard: read_header(self.work_dir / shard) for shard in set(on_disk.values())}
        schemes: dict[str, Scheme] = {}
        for name in self.model.names():
            modules = _modules(self.model, name)
            scale = f"{modules[0][0]}.weight_scale" if modules else ""
            if scale in on_disk:
                num_bits = 4 if f"{modules[0][0]}.weight_packed" in on_disk else 8
                grouped = headers[on_disk[scale]][scale].dtype == torch.float32
                schemes[name] = Scheme(num_bits, 128 if grouped else -1)
        return schemes

    def _blocks(self, schemes: Mapping[str, Scheme]) -> dict[str, int]:
        """Modules of the quantized down projections to the blocks of what their inputs go through."""
        blocks: dict[str, int] = {}
        for name in schemes:
            if name.endswith(DOWN):
                block = online_block(self.model.shape(name)[-1])
                blocks.update({module: block for parts in _modules(self.model, name) for module in parts})
        return blocks

    def _copy_side_files(self) -> None:
        for file in sorted(self.model.path.iterdir()):
            if file.is_file() and _SIDE_FILES.fullmatch(file.name) and not _WEIGHT_FILES.fullmatch(file.name):
                shutil.copyfile(file, self.work_dir / file.name)


def _exact(name: str, tensor: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
    """`stored`, but a norm, router or bias that its dtype rounds in float32: a real-valued smoothing scale folded into a bfloat16
    norm would lose what the weights behind it were quantized against, and a rounded router could choose other experts."""
    wide = tensor.float()
    return stored if not _SMALL.search(name) or torch.equal(stored.float(), wide) else wide


def quantization_config(schemes: Mapping[str, Scheme], model: MoEVLM) -> dict[str, Any] | None:
    """config.json's ``quantization_config``; None where nothing is quantized.

    Args:
        schemes: canonical weight name to scheme, for quantized weights.
    """
    if not schemes:
        return None
    targets: dict[Scheme, list[str]] = {}
    ignore: list[str] = []
    for canonical, pattern in _KINDS.values():
        members = [name for name in model.names() if re.search(canonical, name) and not name.startswith("vision.")]
        kinds = {schemes.get(name) for name in members}
        if len(kinds) == 1 and None not in kinds:
            targets.setdefault(kinds.pop(), []).append(pattern)
        else:
            for name in members:
                flat = [m for parts in _modules(model, name) for m in parts]
                scheme = schemes.get(name)
                (ignore if scheme is None else targets.setdefault(scheme, [])).extend(flat)
    ignore += sorted(
        model.float_source(name).name.removesuffix(".weight")
        for name in model.names() if name.startswith("vision.") and _modules(model, name)
    )
    ignore += [
        model.family.disk_name(name).removesuffix(".weight") for name in model.names() if name.endswith("mlp.router.weight")
    ]
    ignore += [f"re:^{re.escape(prefix)}.*" for prefix in model.family.unused if any(name.startswith(prefix) for name in model.unused)]
    formats = {scheme.storage for scheme in targets}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": {f"group_{i}": _group(scheme, names) for i, (scheme, names) in enumerate(targets.items())},
        "ignore": ignore,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _modules(model: MoEVLM, name: str) -> tuple[tuple[str, ...], ...]:
    return quantizable_modules(name, model.shape(name), model.family.disk_name, model.spec.num_shared_experts)


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    grouped = scheme.group_size != -1
    weights = {
        "num_bits": scheme.num_bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group" if grouped else "channel",
        "group_size": scheme.group_size if grouped else None,
        "dynamic": False,
    }
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
        "format": scheme.storage,
    }


def _quantized_entries(model: MoEVLM, name: str, weight: QTensor) -> dict[str, TensorToWrite]:
    """Tensors on disk of one canonical weight; experts are packed all at once and written as views."""
    modules = _modules(model, name)
    if not modules or name.startswith("vision."):
        raise ValueError(f"'{name}' cannot be quantized in this format")
    lead = (len(modules), len(modules[0]), -1)
    if weight.num_bits == 4:
        parts = {"weight_packed": pack_words(weight.qvalue)}
    else:
        parts = {"weight": weight.qvalue}
    if weight.group_multiplier is None:
        parts["weight_scale"] = weight.scale.half().unsqueeze(-1)
    else:
        parts["weight_scale"] = join_scales(weight.scale, weight.group_multiplier)
    parts = {part: tensor.reshape(*lead, tensor.shape[-1]) for part, tensor in parts.items()}
    entries: dict[str, TensorToWrite] = {}
    for expert, names in enumerate(modules):
        for row, module in enumerate(names):
            for part, tensor in parts.items():
                entries[f"{module}.{part}"] = TensorToWrite.of(tensor[expert, row])
            if weight.num_bits == 4:
                shape = torch.tensor([weight.shape[-2] // len(names), weight.shape[-1]])
                entries[f"{module}.weight_shape"] = TensorToWrite.of(shape)
    return entries


def pack_words(qvalue: torch.Tensor) -> torch.Tensor:
    """int8 [..., K] in [-8, 7] to int32 [..., ceil(K / 8)], as compressed-tensors packs: offset binary, lowest nibble first."""
    padding = -qvalue.shape[-1] % 8
    if padding:
        # -8 is the nibble 0 in offset binary, which is what compressed-tensors pads with.
        qvalue = torch.nn.functional.pad(qvalue, (0, padding), value=-8)
    # Two's complement to offset binary is a flip of each nibble's highest bit.
    return pack_int4(qvalue).view(torch.uint8).bitwise_xor(0x88).view(torch.int32)


def _write_json(file: Path, data: Any) -> None:
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    temporary.rename(file)
