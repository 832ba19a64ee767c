"""The few calls of the CUDA runtime that running an engine takes, through ctypes: memory, one stream, graphs.

:class:`CudaApi` is what :mod:`ecmfq_export.engine.bound_engine` knows; tests put a CPU in its place.
"""

from __future__ import annotations

import ctypes
from typing import Any, Protocol

import numpy as np

from ecmfq_export.errors import BuildError

_HOST_TO_DEVICE, _DEVICE_TO_HOST = 1, 2  # cudaMemcpyKind
_THREAD_LOCAL = 1  # cudaStreamCaptureModeThreadLocal: other threads' calls do not spoil the capture


class CudaApi(Protocol):
    """Device memory is an address (int); everything is put on one stream."""

    stream: int

    def allocate(self, size: int) -> int: ...

    def free(self, address: int) -> None: ...

    def clear(self, address: int, size: int) -> None:
        """Fill with zero bytes."""
        ...

    def upload(self, address: int, array: np.ndarray) -> None:
        """Copy a C-contiguous array to the device; it may be changed when this returns."""
        ...

    def download(self, array: np.ndarray, address: int) -> None:
        """Copy from the device into a C-contiguous array; it is there when this returns."""
        ...

    def synchronize(self) -> None: ...

    def begin_capture(self) -> None: ...

    def end_capture(self) -> int:
        """The captured work, ready to launch."""
        ...

    def launch(self, graph: int) -> None: ...

    def drop_graph(self, graph: int) -> None: ...

    def memory(self) -> tuple[int, int]:
        """Free and total bytes of the device."""
        ...


class CudaRuntime:
    """libcudart of this machine.

    Raises:
        BuildError: no CUDA runtime, or a call failed; with CUDA's own name of the error.
    """

    def __init__(self) -> None:
        self._library = _load()
        self._library.cudaGetErrorName.restype = ctypes.c_char_p
        handle = ctypes.c_void_p()
        self._call("cudaStreamCreateWithFlags", ctypes.byref(handle), ctypes.c_uint(1))  # non-blocking: captures need it
        self.stream = int(handle.value or 0)

    def close(self) -> None:
        if self.stream:
            self._library.cudaStreamDestroy(ctypes.c_void_p(self.stream))
            self.stream = 0

    def allocate(self, size: int) -> int:
        pointer = ctypes.c_void_p()
        self._call("cudaMalloc", ctypes.byref(pointer), ctypes.c_size_t(max(size, 1)))
        self.clear(int(pointer.value or 0), max(size, 1))
        return int(pointer.value or 0)

    def free(self, address: int) -> None:
        self._call("cudaFree", ctypes.c_void_p(address))

    def clear(self, address: int, size: int) -> None:
        self._call("cudaMemsetAsync", ctypes.c_void_p(address), ctypes.c_int(0), ctypes.c_size_t(size), ctypes.c_void_p(self.stream))

    def upload(self, address: int, array: np.ndarray) -> None:
        self._copy(ctypes.c_void_p(address), array.ctypes.data_as(ctypes.c_void_p), array.nbytes, _HOST_TO_DEVICE)
        self.synchronize()

    def download(self, array: np.ndarray, address: int) -> None:
        self._copy(array.ctypes.data_as(ctypes.c_void_p), ctypes.c_void_p(address), array.nbytes, _DEVICE_TO_HOST)
        self.synchronize()

    def synchronize(self) -> None:
        self._call("cudaStreamSynchronize", ctypes.c_void_p(self.stream))

    def begin_capture(self) -> None:
        self._call("cudaStreamBeginCapture", ctypes.c_void_p(self.stream), ctypes.c_int(_THREAD_LOCAL))

    def end_capture(self) -> int:
        graph, ready = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cudaStreamEndCapture", ctypes.c_void_p(self.stream), ctypes.byref(graph))
        try:
            self._call("cudaGraphInstantiateWithFlags", ctypes.byref(ready), graph, ctypes.c_ulonglong(0))
        finally:
            self._library.cudaGraphDestroy(graph)
        return int(ready.value or 0)

    def launch(self, graph: int) -> None:
        self._call("cudaGraphLaunch", ctypes.c_void_p(graph), ctypes.c_void_p(self.stream))

    def drop_graph(self, graph: int) -> None:
        self._call("cudaGraphExecDestroy", ctypes.c_void_p(graph))

    def memory(self) -> tuple[int, int]:
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    def _copy(self, to: ctypes.c_void_p, source: ctypes.c_void_p, size: int, kind: int) -> None:
        self._call("cudaMemcpyAsync", to, source, ctypes.c_size_t(size), ctypes.c_int(kind), ctypes.c_void_p(self.stream))

    def _call(self, function: str, *arguments: Any) -> None:
        status = getattr(self._library, function)(*arguments)
        if status != 0:
            name = self._library.cudaGetErrorName(ctypes.c_int(status)).decode(errors="replace")
            raise BuildError(f"{function} failed: {name} ({status})", "'ecmfq-export doctor' shows the device and its driver")


def _load() -> ctypes.CDLL:
    for name in ("libcudart.so.13", "libcudart.so.12", "libcudart.so"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise BuildError("the CUDA runtime (libcudart.so) is not on this machine", "pip install nvidia-cuda-runtime, or install CUDA")
