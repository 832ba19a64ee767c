"""The CUDA driver through ctypes: device facts, memory, streams, events, graphs. It needs no package, so a Jetson can run it.

Every call that fails raises CudaError with the driver's own name for the error.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


class CudaError(RuntimeError):
    """A driver call failed, or there is no driver or device."""


@dataclass(frozen=True)
class DeviceFacts:
    name: str
    compute_capability: int
    num_sms: int
    max_smem_per_block: int
    l2_bytes: int
    memory_bytes: int
    sm_clock_mhz: float
    memory_clock_mhz: float
    memory_bus_bits: int
    driver_version: int


# CUdevice_attribute values, from the driver API's documentation.
_SM_CLOCK, _SM_COUNT, _MEMORY_CLOCK, _BUS, _L2, _MAJOR, _MINOR, _SMEM_OPTIN = 13, 16, 36, 37, 38, 75, 76, 97


class Device:
    """The first GPU and its primary context, which the CUDA runtime inside the kernel library shares."""

    def __init__(self) -> None:
        try:
            self._cuda = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise CudaError(f"no CUDA driver: {error}") from None
        self.call("cuInit", 0)
        self._device = ctypes.c_int()
        self.call("cuDeviceGet", ctypes.byref(self._device), 0)
        self._context = ctypes.c_void_p()
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._device)
        self.call("cuCtxSetCurrent", self._context)
        self.stream = ctypes.c_void_p()
        self.call("cuStreamCreate", ctypes.byref(self.stream), 1)  # non-blocking: can be captured

    def call(self, name: str, *arguments: object) -> None:
        code = getattr(self._cuda, name)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self._cuda.cuGetErrorName(code, ctypes.byref(text))
            raise CudaError(f"{name}: {(text.value or b'unknown error').decode()} ({code})")

    def facts(self) -> DeviceFacts:
        name = ctypes.create_string_buffer(256)
        self.call("cuDeviceGetName", name, 256, self._device)
        memory, version = ctypes.c_size_t(), ctypes.c_int()
        self.call("cuDeviceTotalMem_v2", ctypes.byref(memory), self._device)
        self.call("cuDriverGetVersion", ctypes.byref(version))
        return DeviceFacts(name.value.decode(), 10 * self._attribute(_MAJOR) + self._attribute(_MINOR), self._attribute(_SM_COUNT),
                           self._attribute(_SMEM_OPTIN), self._attribute(_L2), memory.value, self._attribute(_SM_CLOCK) / 1e3,
                           self._attribute(_MEMORY_CLOCK) / 1e3, self._attribute(_BUS), version.value)

    def _attribute(self, which: int) -> int:
        value = ctypes.c_int()
        self.call("cuDeviceGetAttribute", ctypes.byref(value), which, self._device)
        return value.value

    def allocate(self, nbytes: int) -> Buffer:
        return Buffer(self, nbytes)

    def upload(self, array: np.ndarray) -> Buffer:
        data = np.ascontiguousarray(array)
        buffer = Buffer(self, data.nbytes)
        if data.nbytes:
            self.call("cuMemcpyHtoD_v2", ctypes.c_uint64(buffer.address), ctypes.c_void_p(data.ctypes.data), ctypes.c_size_t(data.nbytes))
        return buffer

    def synchronize(self) -> None:
        self.call("cuStreamSynchronize", self.stream)

    def copy_bandwidth(self, nbytes: int = 1 << 29, repeats: int = 20) -> float:
        """Bytes read plus written a second by device-to-device copies."""
        a, b = self.allocate(nbytes), self.allocate(nbytes)
        copy = lambda: self.call("cuMemcpyDtoDAsync_v2", ctypes.c_uint64(b.address), ctypes.c_uint64(a.address),  # noqa: E731
                                 ctypes.c_size_t(nbytes), self.stream)
        seconds = min(self.timed([copy] * repeats) / repeats for _ in range(3))
        return 2 * nbytes / seconds

    def timed(self, calls: list[Callable[[], None]]) -> float:
        """Seconds on the GPU for the calls, put on the stream one after the other; warmed up once."""
        start, stop = ctypes.c_void_p(), ctypes.c_void_p()
        for event in (start, stop):
            self.call("cuEventCreate", ctypes.byref(event), 0)
        calls[0]()
        self.synchronize()
        self.call("cuEventRecord", start, self.stream)
        for run in calls:
            run()
        self.call("cuEventRecord", stop, self.stream)
        self.call("cuEventSynchronize", stop)
        milliseconds = ctypes.c_float()
        self.call("cuEventElapsedTime", ctypes.byref(milliseconds), start, stop)
        for event in (start, stop):
            self.call("cuEventDestroy_v2", event)
        return milliseconds.value / 1e3

    def captured(self, calls: list[Callable[[], None]]) -> Callable[[], None]:
        """One CUDA graph of the calls; the result launches it on the stream. It lives as long as the process."""
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        self.call("cuStreamBeginCapture_v2", self.stream, 2)  # relaxed
        for run in calls:
            run()
        self.call("cuStreamEndCapture", self.stream, ctypes.byref(graph))
        self.call("cuGraphInstantiateWithFlags", ctypes.byref(executable), graph, ctypes.c_ulonglong(0))
        return lambda: self.call("cuGraphLaunch", executable, self.stream)


class Buffer:
    """Device memory, freed with the object."""

    def __init__(self, device: Device, nbytes: int) -> None:
        self._device, self.nbytes = device, nbytes
        pointer = ctypes.c_uint64()
        device.call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(max(nbytes, 1)))
        self.address = pointer.value

    def __del__(self) -> None:
        if getattr(self, "address", 0):
            self._device._cuda.cuMemFree_v2(ctypes.c_uint64(self.address))

    def download(self, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
        out = np.empty(shape, dtype)
        if out.nbytes:
            self._device.call("cuMemcpyDtoH_v2", ctypes.c_void_p(out.ctypes.data), ctypes.c_uint64(self.address),
                              ctypes.c_size_t(out.nbytes))
        return out
