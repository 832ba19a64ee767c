"""Where weight-only int4 weights of other quantizers lie on disk: a linear module's packed integers, scales, zero points and order.

On disk a module ``M`` of N outputs and K inputs in G groups is, by method:

- ``gptq``: ``M.qweight`` int32 [K / 8, N], ``M.qzeros`` int32 [G, N / 8], ``M.scales`` [G, N], ``M.g_idx`` int32 [K].
- ``awq`` (GEMM): ``M.qweight`` int32 [K, N / 8], ``M.qzeros`` int32 [G, N / 8], ``M.scales`` [G, N].
- ``compressed-tensors``: ``M.weight_packed`` int32 [N, K / 8], ``M.weight_scale`` [N, G], ``M.weight_shape`` [2], and where the
  config says so ``M.weight_zero_point`` int32 [N / 8, G] and ``M.weight_g_idx`` int32 [K]; or, ``int-quantized``, ``M.weight``
  int8 [N, K] in [-8, 7] and ``M.weight_scale``.

Experts lie one by one. quant/int4_words.py has the order of the nibbles.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from ecmfq_export.errors import CheckpointError, UnsupportedError, UserError
from ecmfq_export.models.checkpoint import Checkpoint
from ecmfq_export.models.float_source import ExpertPart, ExpertsSource, FloatSource
from ecmfq_export.models.quantized_reader import quantizable_modules
from ecmfq_export.models.registry import Family
from ecmfq_export.models.spec import ModelSpec
from ecmfq_export.models.weight_only_config import WeightOnlyForm
from ecmfq_export.quant import int4_words
from ecmfq_export.quant.weight_only import SYMMETRIC_ZERO, WeightOnly

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_INT32 = (torch.int32,)
_INTEGERS = (torch.int32, torch.int64)


@dataclass(frozen=True)
class WeightOnlySource:
    """A canonical weight that other quantizers' modules hold.

    Attributes:
        form: how they are stored.
        parts: the modules, by the name that their floating weight would have, and what they fill of the canonical tensor.
        shape: canonical, [N, K] or [E, N, K].
        float_source: where the floating weight would lie.
    """

    form: WeightOnlyForm
    parts: tuple[ExpertPart, ...]
    shape: tuple[int, ...]
    float_source: FloatSource | ExpertsSource

    def disk_names(self) -> list[str]:
        """Every tensor on disk that belongs to it."""
        return list(dict.fromkeys(name for part in self.parts for name in self._tensors(part)))

    def check(self, checkpoint: Checkpoint) -> None:
        """Shapes and dtypes from headers.

        Raises:
            CheckpointError: one is not what config.json implies.
        """
        for part in self.parts:
            for name, (shape, dtypes) in self._tensors(part).items():
                entry = checkpoint.entry(name)
                if entry.shape != shape or entry.dtype not in dtypes:
                    raise CheckpointError(
                        f"'{name}' is {entry.dtype} {list(entry.shape)}, expected {dtypes[0]} {list(shape)}",
                        f"config.json says {self.form.method} with group_size {self.form.group_size}; it is another checkpoint's",
                    )

    def load(self, checkpoint: Checkpoint, start: int | None = None, stop: int | None = None) -> WeightOnly:
        """The packed weight; `start` to `stop` choose experts (or rows of a dense weight).

        Raises:
            CheckpointError: damaged group indices.
            UnsupportedError: an expert's gate and up projections with columns in different orders.
        """
        if len(self.shape) == 2:
            weight = self._part(checkpoint, self.parts[0])
            return weight if start is None else weight.rows(start, self.shape[0] if stop is None else stop)
        first, last = start or 0, self.shape[0] if stop is None else stop
        stacked: WeightOnly | None = None
        for part in self.parts:
            if not first <= part.expert < last:
                continue
            weight, row = self._part(checkpoint, part), part.expert - first
            stacked = _empty(weight, last - first, self.shape) if stacked is None else stacked
            stacked.qvalue[row, part.rows], stacked.scale[row, part.rows] = weight.qvalue, weight.scale
            stacked.zero_point[row, part.rows] = SYMMETRIC_ZERO if weight.zero_point is None else weight.zero_point
            index = torch.arange(weight.shape[-1]) // weight.group_size if weight.group_index is None else weight.group_index
            if part.rows.start and not torch.equal(stacked.group_index[row], index):
                raise UnsupportedError(f"'{part.name}' orders its columns otherwise than the expert's other projection of the same inputs",
                                       "read it as floating point instead: 'ecmfq-export quantize' rounds it anew")
            stacked.group_index[row] = index
        if stacked is None:
            raise ValueError(f"experts {first}:{last} of {self.shape[0]}")
        return _simplest(stacked)

    def dequantize(self, checkpoint: Checkpoint, start: int | None = None, stop: int | None = None) -> torch.Tensor:
        """The float32 weight, module by module, whatever the order of its columns; arguments as :meth:`load`."""
        if len(self.shape) == 2:
            return self.load(checkpoint, start, stop).dequantize()
        first, last = start or 0, self.shape[0] if stop is None else stop
        out = torch.empty(last - first, *self.shape[1:])
        for part in self.parts:
            if first <= part.expert < last:
                out[part.expert - first, part.rows] = self._part(checkpoint, part).dequantize()
        return out

    def _tensors(self, part: ExpertPart) -> dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]:
        """Tensors of a module with the shape and dtypes that they must have."""
        module, (rows, columns), form = part.name.removesuffix(".weight"), part.shape, self.form
        groups = 1 if form.group_size == -1 else -(-columns // form.group_size)
        if form.method == "compressed-tensors":
            tensors: dict[str, Any] = {"weight_scale": ((rows, groups), _FLOATS)}
            if form.bytes:
                tensors["weight"] = ((rows, columns), (torch.int8,))
            else:
                tensors |= {"weight_packed": ((rows, -(-columns // 8)), _INT32), "weight_shape": ((2,), _INTEGERS)}
            if form.zero_points:
                tensors["weight_zero_point"] = ((-(-rows // 8), groups), _INT32)
            if form.group_indices:
                tensors["weight_g_idx"] = ((columns,), _INTEGERS)
        else:
            packed = (columns // 8, rows) if form.method == "gptq" else (columns, rows // 8)
            tensors = {"qweight": (packed, _INT32), "qzeros": ((groups, rows // 8), _INT32), "scales": ((groups, rows), _FLOATS)}
            if form.method == "gptq":
                tensors["g_idx"] = ((columns,), _INTEGERS)
        return {f"{module}.{name}": value for name, value in tensors.items()}

    def _part(self, checkpoint: Checkpoint, part: ExpertPart) -> WeightOnly:
        """One module's weight, or the region of it that `part` takes."""
        module, (rows, columns) = part.name.removesuffix(".weight"), part.shape
        get = {name.removeprefix(f"{module}."): name for name in self._tensors(part)}
        loaded = {key: checkpoint.load(name) for key, name in get.items()}
        index = loaded.get("g_idx", loaded.get("weight_g_idx"))
        zero: torch.Tensor | None = None
        if self.form.bytes:
            values, scale = _unsigned(loaded["weight"], module), loaded["weight_scale"].float()
        elif self.form.method == "compressed-tensors":
            if loaded["weight_shape"].tolist() != [rows, columns]:
                stored = loaded["weight_shape"].tolist()
                raise CheckpointError(f"'{module}.weight_shape' says {stored}, config.json implies {[rows, columns]}")
            values, scale = int4_words.unpack_rows(loaded["weight_packed"], columns), loaded["weight_scale"].float()
            if "weight_zero_point" in loaded:
                zero = int4_words.unpack_columns(loaded["weight_zero_point"], rows)
        elif self.form.method == "gptq":
            values, scale = int4_words.unpack_gptq_weight(loaded["qweight"]), loaded["scales"].float().t().contiguous()
            zero = int4_words.unpack_gptq_zeros(loaded["qzeros"], self.form.minus_one)
        else:
            values, scale = int4_words.unpack_awq(loaded["qweight"]), loaded["scales"].float().t().contiguous()
            zero = int4_words.unpack_awq(loaded["qzeros"])
        group_size = columns if self.form.group_size == -1 else min(self.form.group_size, columns)
        try:
            weight = WeightOnly(values, scale, zero, group_size, None if index is None else index.long())
        except UserError as error:
            raise CheckpointError(f"'{module}': {error.what}", error.fix) from None
        weight = _simplest(weight)
        return _region(weight, part) if part.region else weight


def linear_parts(family: Family, spec: ModelSpec, name: str, shape: tuple[int, ...]) -> tuple[ExpertPart, ...]:
    """The linear modules that make a canonical weight, one by one; empty where it is no linear weight.

    Raises:
        UnsupportedError: shared experts in a family whose floating checkpoints stack experts (no such quantized form is known).
    """
    if len(shape) == 3 and name.endswith(("gate_up_proj", "down_proj")):
        parts = family.expert_parts(spec, name)
        if parts and all(len(part.shape) == 2 for part in parts):
            return parts
        if spec.num_shared_experts:
            raise UnsupportedError(f"quantized checkpoints of model_type {family.model_type} are not read",
                                   "give the floating-point checkpoint, or the published form where it is another")
    modules = quantizable_modules(name, shape, family.disk_name)
    parts = []
    for expert, names in enumerate(modules):
        rows = shape[-2] // len(names)
        parts += [ExpertPart(f"{module}.weight", (rows, shape[-1]), expert, slice(i * rows, (i + 1) * rows))
                  for i, module in enumerate(names)]
    return tuple(parts)


def weight_only_source(
    form: WeightOnlyForm, checkpoint: Checkpoint, parts: tuple[ExpertPart, ...], shape: tuple[int, ...],
    float_source: FloatSource | ExpertsSource,
) -> WeightOnlySource | None:
    """The source of a weight whose modules are quantized on disk; None where none of them is.

    Raises:
        UnsupportedError: some of an expert layer's modules are quantized and others are not, or sizes that words of eight cannot hold.
    """
    there = [f"{part.name.removesuffix('.weight')}.{form.mark}" in checkpoint for part in parts]
    if not any(there):
        return None
    if not all(there):
        raise UnsupportedError(f"'{parts[there.index(False)].name}' is not quantized, '{parts[there.index(True)].name}' is",
                               "all experts of a layer must be stored alike")
    for part in parts:
        if form.method != "compressed-tensors" and any(size % 8 for size in part.shape):
            raise UnsupportedError(f"'{part.name}' is {list(part.shape)}", f"{form.method} packs eight values a word")
    return WeightOnlySource(form, parts, shape, float_source)


def _unsigned(values: torch.Tensor, module: str) -> torch.Tensor:
    low, high = (int(v) for v in torch.aminmax(values))
    if low < -8 or high > 7:
        raise CheckpointError(f"'{module}.weight' spans [{low}, {high}], outside [-8, 7] of 4 bits", "the checkpoint was damaged")
    return (values + SYMMETRIC_ZERO).to(torch.uint8)


def _empty(like: WeightOnly, experts: int, shape: tuple[int, ...]) -> WeightOnly:
    groups = like.num_groups
    return WeightOnly(
        torch.empty(experts, *shape[1:], dtype=torch.uint8), torch.empty(experts, shape[1], groups),
        torch.full((experts, shape[1], groups), SYMMETRIC_ZERO, dtype=torch.uint8), like.group_size,
        (torch.arange(shape[2]) // like.group_size).repeat(experts, 1),
    )


def _simplest(weight: WeightOnly) -> WeightOnly:
    """Without zero points that are all 8, and without an order that changes nothing."""
    index, zero = weight.group_index, weight.zero_point
    plain = index is None or torch.equal(index, (torch.arange(weight.shape[-1]) // weight.group_size).expand_as(index))
    symmetric = zero is None or bool((zero == SYMMETRIC_ZERO).all())
    return replace(weight, group_index=None if plain else index, zero_point=None if symmetric else zero)


def _region(weight: WeightOnly, part: ExpertPart) -> WeightOnly:
    """The rows, or the columns, of one shared expert in the MLP that holds them all."""
    rows, columns = (*part.region, slice(None))[:2]
    if rows != slice(None):
        weight = weight.rows(rows.start, rows.stop)
    if columns == slice(None):
        return weight
    if weight.num_groups == 1:
        return replace(weight, qvalue=weight.qvalue[:, columns], group_size=columns.stop - columns.start, group_index=None)
    if weight.group_index is not None or columns.start % weight.group_size or columns.stop % weight.group_size:
        raise UnsupportedError(f"'{part.name}' has groups of {weight.group_size} columns, or an order, across shared experts",
                               "each shared expert's columns must be whole groups")
    groups = slice(columns.start // weight.group_size, columns.stop // weight.group_size)
    zero = None if weight.zero_point is None else weight.zero_point[:, groups]
    return replace(weight, qvalue=weight.qvalue[:, columns], scale=weight.scale[:, groups], zero_point=zero)
