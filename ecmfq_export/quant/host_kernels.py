"""The host library, ``libecmfq_host.so``: rounding's inner loops on the CPU, in C++ (sources: ``plugins/host``).

What PyTorch's operators would do in many passes over a weight, these do in one, in the calling thread; calls release Python's lock,
so threads that each have matrices of their own run side by side. There is no other implementation for the CPU: a missing library is
an error, not a slower run. On a GPU the same steps are PyTorch operators.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

import torch

from ecmfq_export.compiled_library import find_library
from ecmfq_export.errors import BuildError

LIBRARY_NAME = "libecmfq_host.so"
ABI_VERSION = 1  # ECMFQ_HOST_ABI_VERSION of plugins/host/host_kernels.h
MAX_WIDTH = 256
"""Most columns of one :meth:`HostKernels.walk`."""

_INSTALL = ("pip install . (compiles it), or: cmake -S plugins -B build/plugins -G Ninja -DECMFQ_HOST_KERNELS=ON "
            "&& cmake --build build/plugins --target ecmfq_host")
_FLOATS, _INTS, _BYTES = (ctypes.c_void_p,) * 3
_INT, _FLOAT = ctypes.c_int64, ctypes.c_float


class _Table(ctypes.Structure):
    _fields_ = [
        ("isa", ctypes.c_char_p),
        ("search_steps", ctypes.CFUNCTYPE(None, _FLOATS, _INT, _INT, _INT, _FLOATS, _FLOATS, _INT, _FLOAT, _FLOATS)),
        ("to_columns", ctypes.CFUNCTYPE(None, _FLOATS, _INT, _INT, _INTS, _FLOATS, _FLOATS)),
        ("to_rows", ctypes.CFUNCTYPE(None, _BYTES, _INT, _INT, _INTS, _BYTES)),
        ("blend_in_order", ctypes.CFUNCTYPE(None, _FLOATS, _FLOATS, _FLOAT, _FLOAT, _INTS, _INT, _INT, _FLOATS)),
        ("factor", ctypes.CFUNCTYPE(ctypes.c_int, _FLOATS, _INT, _INT, _INT)),
        ("missed_by_nearest", ctypes.CFUNCTYPE(None, _FLOATS, _FLOATS, _INTS, _INT, _INT, _FLOAT, _FLOATS)),
        ("walk", ctypes.CFUNCTYPE(None, _FLOATS, _INT, _FLOATS, _FLOATS, _FLOATS, _INTS, _INT, _INT, _FLOAT, _BYTES, _FLOATS)),
    ]


def find_host_library() -> Path:
    """The library of this installation.

    Raises:
        BuildError: there is none.
    """
    return find_library(LIBRARY_NAME, "host library", _INSTALL)


class HostKernels:
    """One set of kernels.

    All tensors are dense, row-major and on the CPU; floating ones are float32, positions and orders int64. A weight has N rows and K
    columns; in the walk's layout it is [K, N].

    Args:
        isa: ``avx512``, ``avx2`` or ``base``; None takes the best one that this CPU has.

    Raises:
        BuildError: no library, one of another version, or a CPU without that instruction set.
    """

    def __init__(self, isa: str | None = None) -> None:
        path = find_host_library()
        try:
            library = ctypes.CDLL(os.fspath(path))
            library.ecmfq_host_abi_version.restype = ctypes.c_int
            version = library.ecmfq_host_abi_version()
            library.ecmfq_host_kernels.restype = ctypes.POINTER(_Table)
            library.ecmfq_host_kernels.argtypes = [ctypes.c_char_p]
        except (OSError, AttributeError) as error:
            raise BuildError(f"{path} cannot be loaded: {error}", _INSTALL) from None
        if version != ABI_VERSION:
            raise BuildError(f"{path} has version {version} of its interface, this package needs {ABI_VERSION}", _INSTALL)
        table = library.ecmfq_host_kernels(None if isa is None else isa.encode())
        if not table:
            raise BuildError(f"{path} has no kernels for '{isa}' that this CPU runs", "leave the instruction set out")
        self._library, self._table = library, table.contents
        self.isa: str = self._table.isa.decode()

    def search_steps(
        self, weight: torch.Tensor, groups: int, cost: torch.Tensor | None, ratios: torch.Tensor, limit: int, steps: torch.Tensor
    ) -> None:
        """Write to `steps` [N, G] what has the least weighted squared error for `weight` [N, K]: one of `ratios` [16] times the
        largest magnitude over `limit`, every third tried and then the neighbours of the best. `cost` [K] weighs columns."""
        self._table.search_steps(_at(weight), *weight.shape, groups, _at(cost), _at(ratios), len(ratios), limit, _at(steps))

    def to_columns(self, weight: torch.Tensor, position: torch.Tensor, out: torch.Tensor, scale: torch.Tensor | None = None) -> None:
        """Write `weight` [N, K] to `out` [K, N], column k in row ``position[k]``, divided by `scale` [N] where that is given."""
        self._table.to_columns(_at(weight), *weight.shape, _at(position), _at(scale), _at(out))

    def to_rows(self, values: torch.Tensor, position: torch.Tensor, out: torch.Tensor) -> None:
        """Write int8 `values` [K, N] to `out` [N, K], row ``position[k]`` to column k."""
        columns, rows = values.shape
        self._table.to_rows(_at(values), rows, columns, _at(position), _at(out))

    def blend_in_order(
        self, own: torch.Tensor, shared: torch.Tensor | None, keep: float, factor: float, order: torch.Tensor, block: int,
        out: torch.Tensor,
    ) -> None:
        """Write ``keep own + factor shared`` [K, K] to `out`, rows and columns in `order`: the upper triangle and the blocks of
        `block` columns on the diagonal; the rest of `out` stays as it is."""
        self._table.blend_in_order(_at(own), _at(shared), keep, factor, _at(order), len(order), block, _at(out))

    def factor(self, panel: torch.Tensor) -> bool:
        """Turn `panel` [B, M], B <= 256, a view whose rows may lie apart and which starts with its diagonal block, into its rows of the
        Cholesky factor U, zeros below the diagonal; False where a pivot is not positive."""
        width, columns = panel.shape
        if width > MAX_WIDTH:
            raise ValueError(f"{width} rows at once; at most {MAX_WIDTH}")
        return bool(self._table.factor(_rows_at(panel), panel.stride(0), width, columns) == 0)

    def missed_by_nearest(
        self, target: torch.Tensor, limit: int, out: torch.Tensor, steps: torch.Tensor | None = None, group: torch.Tensor | None = None
    ) -> None:
        """Write `target` [B, N] minus its nearest grid point to `out`; `steps` and `group` as in :meth:`walk`."""
        self._table.missed_by_nearest(_at(target), _at(steps), _at(group), *target.shape, limit, _at(out))

    def walk(
        self, upper: torch.Tensor, product: torch.Tensor | None, target: torch.Tensor, limit: int, grid: torch.Tensor, error: torch.Tensor,
        steps: torch.Tensor | None = None, group: torch.Tensor | None = None,
    ) -> None:
        """Round B <= 256 columns, the last first, as :mod:`gptq` says.

        Args:
            upper: [B, B] of L^T, a view whose rows may lie apart.
            product: [B, N], what the columns behind these add, times the diagonal; None for nothing.
            target: [B, N]; becomes target minus grid point.
            grid: int8 [B, N], written.
            error: [N], grows by the columns' weighted squared errors.
            steps, group: [G, N] and int64 [B], the grid of each column; None where `target` is in units of it.
        """
        width, rows = target.shape
        if width > MAX_WIDTH:
            raise ValueError(f"{width} columns at once; at most {MAX_WIDTH}")
        self._table.walk(_rows_at(upper), upper.stride(0), _at(product), _at(target), _at(steps), _at(group), width, rows, limit,
                         _at(grid), _at(error))


def _at(tensor: torch.Tensor | None) -> int | None:
    if tensor is None:
        return None
    if not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ValueError(f"a kernel of the host was given a tensor of strides {tensor.stride()} on {tensor.device}")
    return tensor.data_ptr()


def _rows_at(tensor: torch.Tensor) -> int:
    """Of a matrix whose rows are dense but may lie apart."""
    if tensor.stride(-1) != 1 or tensor.device.type != "cpu":
        raise ValueError(f"a kernel of the host was given a tensor of strides {tensor.stride()} on {tensor.device}")
    return tensor.data_ptr()


@functools.cache
def host_kernels() -> HostKernels:
    """The best kernels for this CPU.

    Raises:
        BuildError: see :class:`HostKernels`.
    """
    return HostKernels()
