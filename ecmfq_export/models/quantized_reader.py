"""Reading quantized weights from a compressed-tensors checkpoint: which they are, and their integers and scales.

On disk a linear module ``M`` of N outputs and K inputs is, in compressed-tensors' own terms:

- ``pack-quantized`` (int4): ``M.weight_packed`` int32 [N, K / 8], eight offset-binary nibbles a word, lowest first;
  ``M.weight_scale`` [N, 1]; ``M.weight_shape`` int64 [2].
- ``int-quantized`` (int8): ``M.weight`` int8 [N, K]; ``M.weight_scale`` [N, 1].

With groups of 128 columns ``weight_scale`` is float32 [N, K / 128], see group_scales.py.

Experts lie one by one, ``...mlp.experts.{e}.{gate,up,down}_proj``, as vLLM and llm-compressor name them. Shared experts, which
published checkpoints hold as one MLP, lie one by one too, ``...mlp.shared_experts.{s}.{gate,up,down}_proj``: each has scales of
its own, and quantizes what its down projection reads by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ecmfq_export.errors import CheckpointError, UnsupportedError, UserError
from ecmfq_export.models.checkpoint import Checkpoint
from ecmfq_export.models.group_scales import split_scales
from ecmfq_export.models.module_names import matcher
from ecmfq_export.models.online_rotation import DOWN, read_transforms
from ecmfq_export.quant.pack import unpack_int4
from ecmfq_export.quant.qtensor import GROUP, QTensor, group_count

PACKED, INT8 = "pack-quantized", "int-quantized"
EXPERT_PARTS: Mapping[str, tuple[str, ...]] = {
    "mlp.experts.gate_up_proj": ("gate_proj", "up_proj"),
    "mlp.experts.down_proj": ("down_proj",),
}
"""Canonical fused expert tensors and the modules that each expert has on disk, in row order."""

_NOT_LINEAR = ("embed_tokens.weight", "pos_embed.weight", "position_embedding.weight", "mlp.router.weight")
"""Ends of names of matrices that are no linear module's weight: tables, and the routers, which are modules of their own kind."""

_SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Scheme:
    """How one weight is stored and used: int4 packed (``w4a8``) or int8 (``w8a8``); group_size -1 (per channel) or 128."""

    num_bits: Literal[4, 8]
    group_size: int = -1

    @property
    def recipe(self) -> Literal["w4a8", "w8a8"]:
        return "w4a8" if self.num_bits == 4 else "w8a8"

    @property
    def storage(self) -> str:
        return PACKED if self.num_bits == 4 else INT8


@dataclass(frozen=True)
class QuantizedSource:
    """Where a quantized canonical weight lies.

    Attributes:
        scheme: how it is stored.
        modules: disk names of the modules that hold it: one for a dense weight; for experts, expert by expert, the parts that
            are stacked along N.
        shape: canonical, [N, K] or [E, N, K].
    """

    scheme: Scheme
    modules: tuple[tuple[str, ...], ...]
    shape: tuple[int, ...]

    @property
    def recipe(self) -> Literal["w4a8", "w8a8"]:
        return self.scheme.recipe

    def disk_names(self) -> list[str]:
        """Every tensor on disk that belongs to it."""
        parts = ("weight_packed", "weight_scale", "weight_shape") if self.scheme.num_bits == 4 else ("weight", "weight_scale")
        return [f"{module}.{part}" for modules in self.modules for module in modules for part in parts]

    def check(self, checkpoint: Checkpoint) -> None:
        """Shapes and dtypes from headers.

        Raises:
            CheckpointError: one is not what config.json implies.
        """
        rows, columns = self.shape[-2] // len(self.modules[0]), self.shape[-1]
        groups = 1 if self.scheme.group_size == -1 else group_count(columns, self.scheme.group_size)
        scale = ((rows, groups), _SCALE_DTYPES)
        if self.scheme.num_bits == 4:
            expected = {
                "weight_packed": ((rows, -(-columns // 8)), (torch.int32,)),
                "weight_scale": scale,
                "weight_shape": ((2,), (torch.int64, torch.int32)),
            }
        else:
            expected = {"weight": ((rows, columns), (torch.int8,)), "weight_scale": scale}
        for module in (module for modules in self.modules for module in modules):
            for part, (shape, dtypes) in expected.items():
                entry = checkpoint.entry(f"{module}.{part}")
                if entry.shape != shape or entry.dtype not in dtypes:
                    raise CheckpointError(
                        f"'{module}.{part}' is {entry.dtype} {list(entry.shape)}, expected {dtypes[0]} {list(shape)}",
                        "the checkpoint and its config.json do not belong together",
                    )

    def load(self, checkpoint: Checkpoint, start: int | None = None, stop: int | None = None) -> QTensor:
        """The weight; `start` to `stop` choose experts (or rows of a dense weight).

        Raises:
            CheckpointError: integers outside the symmetric grid, bad scales, or a ``weight_shape`` that disagrees.
        """
        stacked = len(self.shape) == 3
        modules = self.modules[start:stop] if stacked else self.modules
        flat = [module for parts in modules for module in parts]
        qvalue = torch.stack([self._integers(checkpoint, module) for module in flat])
        scale, multiplier = self._scales(checkpoint, flat)
        shape = (len(modules), *self.shape[-2:]) if stacked else self.shape
        if multiplier is not None:
            multiplier = multiplier.view(*shape[:-1], -1)
        try:
            weight = QTensor(
                qvalue.view(shape), scale.view(shape[:-1]), self.scheme.num_bits, self.scheme.group_size, multiplier
            )
        except UserError as error:
            raise CheckpointError(
                f"'{flat[0]}': {error.what}", "the checkpoint was damaged, or was not quantized symmetrically"
            ) from None
        return weight if stacked or start is None else weight.rows(start, self.shape[0] if stop is None else stop)

    def _scales(self, checkpoint: Checkpoint, modules: list[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
        names = [f"{module}.weight_scale" for module in modules]
        stored = [checkpoint.load(name) for name in names]
        if self.scheme.group_size == -1:
            return torch.stack(stored).float(), None
        parts = [split_scales(scale.float(), name) for name, scale in zip(names, stored, strict=True)]
        return torch.stack([scale for scale, _ in parts]), torch.stack([multiplier for _, multiplier in parts])

    def _integers(self, checkpoint: Checkpoint, module: str) -> torch.Tensor:
        if self.scheme.num_bits == 8:
            return checkpoint.load(f"{module}.weight")
        shape = [self.shape[-2] // len(self.modules[0]), self.shape[-1]]
        stored = checkpoint.load(f"{module}.weight_shape").tolist()
        if stored != shape:
            raise CheckpointError(f"'{module}.weight_shape' says {stored}, config.json implies {shape}")
        words = checkpoint.load(f"{module}.weight_packed")
        # Offset binary to two's complement is a flip of each nibble's highest bit; words are little-endian in safetensors.
        nibbles = unpack_int4(words.view(torch.uint8).bitwise_xor(0x88).view(torch.int8))
        return nibbles[:, : shape[1]].contiguous()


class QuantizationInfo:
    """What config.json's ``quantization_config`` says, for this model.

    Attributes:
        recipes: canonical weight name to recipe, for every quantized weight.
        group_size: 128 where any weight has groups, else -1.
        blocks: canonical name of a down projection to the block of the Hadamard that its inputs go through while the model runs
            (online_rotation.py); without those that read plain inputs.
    """

    def __init__(self, sources: Mapping[str, QuantizedSource], blocks: Mapping[str, int]) -> None:
        self._sources, self.blocks = dict(sources), dict(blocks)
        self.recipes = {name: source.recipe for name, source in self._sources.items()}
        self.group_size = max((source.scheme.group_size for source in self._sources.values()), default=-1)

    def source(self, name: str) -> QuantizedSource | None:
        """Where the canonical weight `name` lies, or None where it is not quantized."""
        return self._sources.get(name)


def read_quantization(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], disk_name: Callable[[str], str], num_shared: int = 0
) -> QuantizationInfo | None:
    """Resolve ``quantization_config`` against the model's weights; None where there is none.

    Args:
        shapes: canonical names and shapes of all tensors.
        disk_name: canonical to disk name.
        num_shared: shared experts among a layer's stacked experts.

    Raises:
        UnsupportedError: another method or format, or a scheme other than symmetric int4 or int8 with dynamic
            per-token int8 activations, or one that covers weights which stay in floating point here; a transform other
            than a block Hadamard before down projections.
    """
    quantization = config.get("quantization_config")
    if quantization is None:
        return None
    choose = _chooser(*_groups(quantization))
    transform = read_transforms(quantization)
    sources: dict[str, QuantizedSource] = {}
    blocks: dict[str, int] = {}
    for name, shape in shapes.items():
        modules = quantizable_modules(name, shape, disk_name, num_shared)
        if not modules:
            continue
        schemes = {choose(module) for parts in modules for module in parts}
        if len(schemes) > 1:
            raise UnsupportedError(
                f"quantization_config gives the experts of '{name}' different schemes", "give all one scheme"
            )
        scheme = schemes.pop()
        if scheme is not None:
            if name.startswith("vision."):
                raise UnsupportedError(
                    f"quantization_config quantizes '{modules[0][0]}'", "add the vision tower to its ignore list"
                )
            sources[name] = QuantizedSource(scheme, modules, shape)
        block = _block({transform(module) for parts in modules for module in parts}, name, shape[-1], scheme is not None)
        if block != 1:
            blocks[name] = block
    return QuantizationInfo(sources, blocks)


def _block(blocks: set[int], name: str, columns: int, quantized: bool) -> int:
    """The block of the transform before a weight's modules, checked to be one that runs."""
    if blocks == {1}:
        return 1
    largest = max(blocks)
    if len(blocks) > 1 or not quantized or not name.endswith(DOWN) or columns % largest:
        raise UnsupportedError(
            f"quantization_config transforms the inputs of '{name}' in blocks of {sorted(blocks)}",
            "supported: one block size before a quantized down projection, dividing its columns",
        )
    return largest


def quantizable_modules(
    name: str, shape: tuple[int, ...], disk_name: Callable[[str], str], num_shared: int = 0
) -> tuple[tuple[str, ...], ...]:
    """Disk names of the linear modules behind a canonical tensor, expert by expert; empty where it is no linear weight.

    The last `num_shared` of stacked experts are the shared ones.
    """
    for suffix, parts in EXPERT_PARTS.items():
        if name.endswith(suffix):
            routed = disk_name(name).rsplit(".", 1)[0]
            owners = [f"{routed}.{expert}" for expert in range(shape[0] - num_shared)]
            owners += [f"{routed.removesuffix('experts')}shared_experts.{expert}" for expert in range(num_shared)]
            return tuple(tuple(f"{owner}.{part}" for part in parts) for owner in owners)
    linear = name.endswith(".weight") and len(shape) == 2
    if not linear or name.endswith(_NOT_LINEAR):
        return ()
    return ((disk_name(name).removesuffix(".weight"),),)


def _groups(quantization: Any) -> tuple[list[tuple[list[str], Scheme]], list[str]]:
    if not isinstance(quantization, Mapping) or quantization.get("quant_method") != "compressed-tensors":
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
        raise UnsupportedError(
            f"quantization_config of method {method!r} is not supported",
            "supported: gptq, awq, compressed-tensors; or give the floating-point checkpoint",
        )
    if quantization.get("quantization_status", "compressed") != "compressed":
        raise UnsupportedError(f"quantization_status {quantization.get('quantization_status')!r}", "expected 'compressed'")
    for key in ("kv_cache_scheme", "sparsity_config"):
        if quantization.get(key):
            raise UnsupportedError(f"quantization_config.{key} is not supported", "quantize weights and activations alone")
    groups, ignore = quantization.get("config_groups"), quantization.get("ignore") or []
    if not isinstance(groups, Mapping) or not groups or not isinstance(ignore, list):
        raise CheckpointError("quantization_config has no config_groups, or an ignore list that is none")
    return [_scheme(name, group, quantization.get("format")) for name, group in groups.items()], ignore


def _scheme(name: str, group: Any, default_format: Any) -> tuple[list[str], Scheme]:
    where = f"quantization_config.config_groups.{name}"
    weights = group.get("weights") if isinstance(group, Mapping) else None
    inputs = group.get("input_activations") if isinstance(group, Mapping) else None
    targets = group.get("targets") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping) or not isinstance(inputs, Mapping) or not isinstance(targets, list):
        raise UnsupportedError(f"{where} lacks weights, input_activations or targets", "expected W4A8 or W8A8 groups")
    bits = weights.get("num_bits")
    if bits not in (4, 8):
        raise UnsupportedError(f"{where}.weights.num_bits = {bits!r}", "supported: 4, 8")
    grouped = weights.get("strategy") == "group"
    scheme = Scheme(bits, GROUP if grouped else -1)
    seen = {
        "weights.type": (weights.get("type", "int"), "int"),
        "weights.symmetric": (weights.get("symmetric", True), True),
        "weights.strategy": (weights.get("strategy"), "group" if grouped else "channel"),
        "weights.group_size": (weights.get("group_size") or -1, scheme.group_size),
        "weights.dynamic": (weights.get("dynamic", False), False),
        "weights.actorder": (weights.get("actorder"), None),
        "input_activations.num_bits": (inputs.get("num_bits"), 8),
        "input_activations.type": (inputs.get("type", "int"), "int"),
        "input_activations.symmetric": (inputs.get("symmetric", True), True),
        "input_activations.strategy": (inputs.get("strategy"), "token"),
        "input_activations.dynamic": (inputs.get("dynamic", False), True),
        "output_activations": (group.get("output_activations"), None),
        "format": (group.get("format") or default_format, scheme.storage),
    }
    for field, (value, expected) in seen.items():
        if value != expected:
            raise UnsupportedError(f"{where}.{field} = {value!r} is not supported", f"supported: {expected!r}")
    return targets, scheme


def _chooser(groups: list[tuple[list[str], Scheme]], ignore: list[str]) -> Callable[[str], Scheme | None]:
    """Module name to the scheme of the first group that targets it, None where it is ignored or no group does."""
    ignored = matcher(ignore)
    matchers = [(matcher(targets), scheme) for targets, scheme in groups]

    def choose(module: str) -> Scheme | None:
        if ignored(module):
            return None
        return next((scheme for matches, scheme in matchers if matches(module)), None)

    return choose
