"""A second device for tests, made of host memory: its tensors meet tensors of the CPU only where CUDA tensors may.

Run as a program: quantizes a model with every computation on that device and prints where the results lie. It registers itself with
PyTorch for the whole process, which is why tests start it in one of its own.

    python -m tests.stages.other_device MODEL DATA OUT SMOOTHING
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "other"
ANY_DEVICE = {"aten::copy_", "aten::_to_copy"}
HOST_INDICES = {"aten::index.Tensor", "aten::index_put.default", "aten::index_put_.default", "aten::_index_put_impl_.default"}
"""Operators that CUDA tensors take host indices in."""


class OtherTensor(torch.Tensor):
    """A tensor of the other device; its values are a tensor on the CPU that nobody else sees."""

    raw: torch.Tensor

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> OtherTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls, raw.shape, strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype, device=NAME,  # type: ignore
            dispatch_sizes_strides_policy="sizes")
        made.raw = raw
        return made

    def tolist(self) -> Any:
        return self.raw.tolist()

    def __repr__(self, **_: Any) -> str:
        return f"OtherTensor({self.raw!r})"

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op in _SHAPE:
            return _SHAPE[op](args[0].raw, *args[1:])
        return run(op, args, kwargs or {})


_ATEN = torch.ops.aten
_SHAPE: dict[Any, Callable[..., Any]] = {
    _ATEN.sym_size.default: lambda raw: tuple(raw.shape), _ATEN.sym_stride.default: lambda raw: raw.stride(),
    _ATEN.sym_numel.default: lambda raw: raw.numel(), _ATEN.sym_storage_offset.default: lambda raw: raw.storage_offset(),
    _ATEN.dim.default: lambda raw: raw.dim(), _ATEN.is_contiguous.default: lambda raw: raw.is_contiguous(),
    _ATEN.is_contiguous.memory_format: lambda raw, kind: raw.is_contiguous(memory_format=kind),
    _ATEN.is_strides_like_format.default: lambda raw, kind: raw.is_contiguous(memory_format=kind),
    _ATEN.is_non_overlapping_and_dense.default: lambda raw: raw.is_contiguous(),
}  # fmt: skip
"""A wrapper asks for its tensor's shape, which operators may change in place."""


def run(op: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = op._schema.name if op._schema.name in ANY_DEVICE else f"{op._schema.name}.{op._schema.overload_name or 'default'}"
    flat, _ = pytree.tree_flatten((args, kwargs))
    tensors = [value for value in flat if isinstance(value, torch.Tensor)]
    mine = [tensor for tensor in tensors if isinstance(tensor, OtherTensor)]
    strangers = [tensor for tensor in tensors if not isinstance(tensor, OtherTensor) and tensor.ndim]
    allowed = name in ANY_DEVICE or (name in HOST_INDICES and isinstance(args[0], OtherTensor))
    if mine and strangers and not allowed:
        raise RuntimeError(f"{name}: tensors of the CPU {[list(t.shape) for t in strangers]} among those of '{NAME}'")
    wanted = kwargs.get("device")
    to_host = wanted is not None and torch.device(wanted).type == "cpu"
    kwargs = {key: (torch.device("cpu") if key == "device" and value is not None else value) for key, value in kwargs.items()}
    raw_args, raw_kwargs = pytree.tree_map(lambda value: value.raw if isinstance(value, OtherTensor) else value, (args, kwargs))
    out = op(*raw_args, **raw_kwargs)
    if to_host:
        return out
    if op._schema.is_mutable and not name.startswith("aten::copy_"):
        changed = [arg for arg, spec in zip(args, op._schema.arguments, strict=False) if spec.alias_info and spec.alias_info.is_write]
        changed += [kwargs[spec.name] for spec in op._schema.arguments
                    if spec.name in kwargs and spec.alias_info and spec.alias_info.is_write]
        written = [value for value in changed if isinstance(value, OtherTensor)]
        if written:
            return written[0] if len(written) == 1 else tuple(written)
    if name == "aten::copy_":
        return args[0]
    return pytree.tree_map(lambda value: OtherTensor(value) if isinstance(value, torch.Tensor) else value, out)


def register() -> None:
    """Make the device known to PyTorch."""
    _setup_privateuseone_for_python_backend(NAME)
    library = torch.library.Library("_", "IMPL")
    library.fallback(lambda op, *args, **kwargs: run(op, args, kwargs), "PrivateUse1")
    # What PyTorch makes from numbers does not go through the dispatcher, or makes an empty tensor larger, which a wrapper cannot.
    torch.tensor, torch.arange = _made_on_host(torch.tensor), _made_on_host(torch.arange)
    register.library = library  # type: ignore[attr-defined]  # it lasts as long as it is held


def _made_on_host(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def made(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        device = torch.empty(0).device if device is None else torch.device(device)
        values = make(*args, device="cpu", **kwargs)
        return OtherTensor(values) if device.type == NAME else values

    return made


def main() -> None:
    from ecmfq_export import workflow
    from ecmfq_export.progress import Silent
    from ecmfq_export.stages.resources import Resources
    from tests.stages.common import SETTINGS

    register()
    torch.set_num_threads(1)
    model, data, out = map(Path, sys.argv[1:4])
    config = replace(SETTINGS, num_samples=4, weighting="rho_g_phi", smoothing=sys.argv[4], percdamp=1.0)
    workflow.quantize_model(model, data, out / "quantized", config, Silent(), Resources(device=NAME))


if __name__ == "__main__":
    main()
