"""A floating-point checkpoint seen in a rotated basis: the same function, with outlier channels spread over all of them.

With Q orthogonal and R_l orthogonal within a head of layer l (both from :mod:`ecmfq_export.quant.hadamard`)::

    reads behind a norm of weight g      W  <- W diag(g) Q          q, k, v (MLA: q or q_a, kv_a); router, gate and up; lm_head
    writes                               W  <- Q^T W, b <- b Q      o, down; embeddings (rows); the vision tower's last layers
    norm                                 g  <- 1
    values, where asked for              W_v <- R_l^T W_v (each head; MLA: value rows of kv_b), W_o <- W_o R_l (each head)

Products are computed in float64 and rounded once. Tied embeddings are untied, since only the output matrix takes the
final norm's weight.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ecmfq_export.errors import CheckpointError, UnsupportedError
from ecmfq_export.json_file import read_json
from ecmfq_export.models.float_source import ExpertsSource, FloatSource
from ecmfq_export.models.moe_vlm import MoEVLM
from ecmfq_export.models.residual import EMBEDDINGS, OUTPUT, Role, residual_roles, value_path
from ecmfq_export.models.spec import ModelSpec
from ecmfq_export.quant.hadamard import Rotation, randomized_hadamard

NOTE = "residual_rotation.json"
"""File beside the weights that says how the residual stream was rotated; copies of the checkpoint carry it along."""

_KIND = "randomized_hadamard"
_CHUNK = 1 << 24
"""Values that are in memory in float64 at once (a matrix whose rows are rotated: at least one matrix)."""


@dataclass(frozen=True)
class _Rows:
    """A rotation of rows in heads of ``skipped + rotation.size``, the first `skipped` of each left alone."""

    rotation: Rotation
    skipped: int = 0

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """``Q^T W`` for W [..., rows, K] or the only axis of a bias."""
        moved = x.transpose(-1, -2) if x.ndim > 1 else x
        heads = moved.unflatten(-1, (-1, self.skipped + self.rotation.size))
        values = self.rotation.apply(heads[..., self.skipped :])
        moved = torch.cat((heads[..., : self.skipped], values), -1).flatten(-2)
        return moved.transpose(-1, -2) if x.ndim > 1 else moved


@dataclass
class _Change:
    """What happens to one tensor: columns scaled by a norm, columns rotated, rows rotated; or all ones; or nothing."""

    norm: str = ""
    columns: Rotation | None = None
    rows: _Rows | None = None
    ones: bool = False

    def __bool__(self) -> bool:
        return bool(self.norm) or self.columns is not None or self.rows is not None or self.ones


class RotatedModel(MoEVLM):
    """`model` in the basis that `seed` gives; everything of :class:`MoEVLM` in it.

    Args:
        model: floating point. Tensors that text and images do not need (``MoEVLM.unused``) are no part of the view: what reads or
            writes the residual stream among them would compute wrongly in another basis.
        seed: of the rotations.
        values: whether values are rotated within heads too.
        dtype: of every tensor that changes; the others keep their stored one.

    Raises:
        UnsupportedError: a tensor whose part in the residual stream is not known, or tied embeddings that the family cannot untie.
        ValueError: `model` is quantized.
    """

    def __init__(self, model: MoEVLM, seed: int, values: bool = False, dtype: torch.dtype = torch.float32) -> None:
        if model.quantization is not None:
            raise ValueError(f"{model.path} is quantized already")
        config, spec = _untied(model)
        shapes, sources = dict(model._shapes), dict(model._sources)
        if model.spec.tie_word_embeddings:
            shapes[OUTPUT] = shapes[EMBEDDINGS]
            sources[OUTPUT] = FloatSource(model.family.disk_name(OUTPUT), shapes[OUTPUT])
        _set_dtype(config, str(dtype).removeprefix("torch."))
        super().__init__(model.path, config, model.family, spec, model.checkpoint, shapes, sources, None)
        self.dtype = dtype
        self._origin = {OUTPUT: EMBEDDINGS} if model.spec.tie_word_embeddings else {}
        self.rotation = randomized_hadamard(spec.hidden_size, seed)
        vision = [name for name in shapes if name.startswith("vision.")]
        roles = residual_roles(spec, model.family.residual_writers(spec), vision)
        self._changes = {name: self._change(name, role) for name, role in roles.items()}
        for layer in spec.layers if values else ():
            path = value_path(layer.attention)
            within = randomized_hadamard(path.size, _layer_seed(seed, layer.index))
            prefix = f"layers.{layer.index}."
            for producer in path.producers:
                if prefix + producer in shapes:
                    self._changes[prefix + producer].rows = _Rows(within, path.skipped)
            heads = shapes[prefix + path.consumer][-1] // path.size
            self._changes[prefix + path.consumer].columns = within.repeated(heads)

    def stored_dtype(self, name: str) -> torch.dtype:
        self._source(name)
        return self.dtype if self._changes[name] else super().stored_dtype(name)

    def tensor(self, name: str) -> torch.Tensor:
        """The rotated tensor; memory beside it as `_CHUNK` says."""
        if not self._changes[name]:
            return super().tensor(name)
        if self._row_by_row(name):
            return self.tensor_rows(name, 0, self.shape(name)[0])
        return self._rotated(self._changes[name], super().tensor(name))

    def tensor_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        if not self._changes[name]:
            return super().tensor_rows(name, start, stop)
        if not self._row_by_row(name):
            return self.tensor(name)[start:stop].clone()
        shape = self.shape(name)
        out = torch.empty(stop - start, *shape[1:], dtype=self.dtype)
        step = max(1, _CHUNK // max(1, math.prod(shape[1:])))
        for first in range(start, stop, step):
            rows = super().tensor_rows(self._origin.get(name, name), first, min(first + step, stop))
            out[first - start : first - start + step] = self._rotated(self._changes[name], rows)
        return out

    def disk_part(self, name: str, part: str) -> torch.Tensor:
        if not self._changes[name]:
            return super().disk_part(name, part)
        source = self.float_source(name)
        if not isinstance(source, ExpertsSource):
            raise ValueError(f"'{name}' is one tensor on disk")
        return source.part(part, lambda start, stop: self.tensor_rows(name, start, stop))

    def _row_by_row(self, name: str) -> bool:
        """Whether rows of the first axis (experts, vocabulary) change each by itself."""
        return len(self.shape(name)) == 3 or (len(self.shape(name)) == 2 and self._changes[name].rows is None)

    def _change(self, name: str, role: Role) -> _Change:
        if role.kind == "norm":
            return _Change(ones=True)
        if role.kind == "reads":
            return _Change(norm=role.norm, columns=self.rotation)
        if role.kind == "writes":
            return _Change(columns=self.rotation) if name == EMBEDDINGS else _Change(rows=_Rows(self.rotation))
        return _Change()

    def _rotated(self, change: _Change, stored: torch.Tensor) -> torch.Tensor:
        if change.ones:
            return torch.ones_like(stored, dtype=self.dtype)
        x = stored.double()
        if change.norm:
            x = x * super().tensor(change.norm).double()
        if change.columns is not None:
            x = change.columns.apply(x)
        if change.rows is not None:
            x = change.rows.apply(x)
        return x.to(self.dtype).contiguous()


def write_note(directory: Path, model: RotatedModel, seed: int, values: bool) -> None:
    """Say beside the weights how they were rotated."""
    note = {"kind": _KIND, "size": model.spec.hidden_size, "seed": seed, "values": values}
    (directory / NOTE).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")


def residual_rotation(model: MoEVLM) -> Rotation | None:
    """The rotation of the residual stream of a checkpoint that came from a rotated one; None where it was not rotated.

    Raises:
        CheckpointError: a note that cannot be read, or that is another model's.
    """
    file = model.path / NOTE
    if not file.is_file():
        return None
    try:
        note = read_json(file)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}", "run rotate again") from None
    kind, size, seed = (note.get(key) if isinstance(note, Mapping) else None for key in ("kind", "size", "seed"))
    if kind != _KIND or size != model.spec.hidden_size or type(seed) is not int:
        raise CheckpointError(f"{file} says {json.dumps(note)[:200]}, the model's hidden_size is {model.spec.hidden_size}",
                              f"expected kind {_KIND!r} of that size with a seed; run rotate again")
    return randomized_hadamard(size, seed)


def _untied(model: MoEVLM) -> tuple[dict[str, Any], ModelSpec]:
    """A copy of the config, without tied embeddings, and its spec."""
    config = copy.deepcopy(model.config)
    if not model.spec.tie_word_embeddings:
        return config, model.spec
    config["tie_word_embeddings"] = False
    _untie(config)
    spec = model.family.read_spec(config)
    if spec != replace(model.spec, tie_word_embeddings=False):
        raise UnsupportedError(f"{model.path}: its tied embeddings cannot be untied", "set rotate = 'none'")
    return config, spec


def _untie(config: dict[str, Any]) -> None:
    """Say at every level that says something of it that embeddings are not tied."""
    for key, value in config.items():
        if key == "tie_word_embeddings":
            config[key] = False
        elif isinstance(value, dict):
            _untie(value)


def _set_dtype(config: dict[str, Any], dtype: str) -> None:
    """Name the new dtype where the config names one, at any level: transformers casts to it when it loads."""
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and value is not None:
            config[key] = dtype
        elif isinstance(value, dict):
            _set_dtype(value, dtype)


def _layer_seed(seed: int, layer: int) -> int:
    return seed * 1_000_003 + layer + 1
