"""The CUDA device of this machine, asked from the driver itself: no CUDA toolkit and no torch with CUDA needed."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

_ATTRIBUTE_MAJOR, _ATTRIBUTE_MINOR, _ATTRIBUTE_SMS = 75, 76, 16  # CUdevice_attribute


@dataclass(frozen=True)
class Device:
    """Device 0. ``compute_capability`` is 10 * major + minor, ``memory_bytes`` its total memory."""

    name: str
    compute_capability: int
    num_sms: int
    memory_bytes: int
    driver: str


def current_device() -> Device | None:
    """Device 0, or None where there is no driver or no device. Never raises."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    count, version = ctypes.c_int(), ctypes.c_int()
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0:
        return None
    cuda.cuDriverGetVersion(ctypes.byref(version))
    handle, name, memory = ctypes.c_int(), ctypes.create_string_buffer(128), ctypes.c_size_t()
    if cuda.cuDeviceGet(ctypes.byref(handle), 0) != 0:
        return None
    cuda.cuDeviceGetName(name, len(name), handle)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), handle)

    def attribute(number: int) -> int:
        value = ctypes.c_int()
        cuda.cuDeviceGetAttribute(ctypes.byref(value), number, handle)
        return value.value

    return Device(name.value.decode(errors="replace"), 10 * attribute(_ATTRIBUTE_MAJOR) + attribute(_ATTRIBUTE_MINOR),
                  attribute(_ATTRIBUTE_SMS), memory.value, f"{version.value // 1000}.{version.value % 1000 // 10}")
