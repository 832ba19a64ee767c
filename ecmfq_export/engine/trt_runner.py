"""Run an engine on this machine's GPU, with TensorRT-RTX or TensorRT.

Not run yet: no machine of this project had a GPU with a driver. It imports, and refuses clearly where there is no device.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ecmfq_export.bundle import MANIFEST
from ecmfq_export.engine.device import current_device
from ecmfq_export.engine.engine_directory import check_runs_here, open_engines
from ecmfq_export.engine.runner import check_feeds
from ecmfq_export.engine.trt_module import LogLines, load_module, make_logger
from ecmfq_export.errors import BuildError
from ecmfq_export.target import Target

_HOST_TO_DEVICE, _DEVICE_TO_HOST = 1, 2  # cudaMemcpyKind


class TrtRunner:
    """A :class:`~ecmfq_export.engine.runner.Runner` over one engine.

    Copies every input to the device and every output back on each run: simple, and right for validation. A serving loop would
    keep the KV cache on the device and bind one buffer to the past and the present tensor.

    Args:
        path: the engine.
        target: what it was built for.
        plugin_library: for an engine that does not embed it.

    Raises:
        BuildError: no device, a device of another compute capability, no CUDA runtime, or TensorRT refuses the engine.
    """

    def __init__(self, path: Path, target: Target, *, plugin_library: Path | None = None) -> None:
        device = current_device()
        if device is None or device.compute_capability not in target.compute_capabilities:
            found = "none" if device is None else f"{device.name} with {device.compute_capability}"
            raise BuildError(f"{path} needs a GPU of compute capability {list(target.compute_capabilities)}; found: {found}",
                             "without a GPU, ONNX Runtime runs the bundle: ecmfq-export run")
        path = Path(path)
        module = load_module(target.engine)
        if (path.parent / MANIFEST).is_file():
            record = next((r for r in open_engines(path.parent).values() if r.path.name == path.name), None)
            if record is not None:
                check_runs_here(record, module.__version__, device)
        self._cuda = _cudart()
        self._log = LogLines()
        self._logger = make_logger(module, self._log)
        self._runtime = module.Runtime(self._logger)
        self._runtime.engine_host_code_allowed = True  # the embedded plugin library is our own
        if plugin_library is not None:
            self._runtime.get_plugin_registry().load_library(str(plugin_library))
        self._engine = self._runtime.deserialize_cuda_engine(Path(path).read_bytes())
        if self._engine is None:
            raise BuildError(f"{path}: TensorRT refuses the engine: {'; '.join(self._log.errors)}", "build it again on this device")
        self._context = self._engine.create_execution_context()
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        is_input = {name: self._engine.get_tensor_mode(name) == module.TensorIOMode.INPUT for name in names}
        self._inputs = {name: (self._dtype(module, name), tuple(self._engine.get_tensor_shape(name)))
                        for name in names if is_input[name]}
        self._outputs = {name: self._dtype(module, name) for name in names if not is_input[name]}

    @property
    def input_names(self) -> list[str]:
        return list(self._inputs)

    @property
    def output_names(self) -> list[str]:
        return list(self._outputs)

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        check_feeds(feeds, self._inputs)
        buffers: list[ctypes.c_void_p] = []
        stream = ctypes.c_void_p()
        self._call("cudaStreamCreate", ctypes.byref(stream))
        try:
            for name in self._inputs:
                array = np.ascontiguousarray(feeds[name])
                self._context.set_input_shape(name, array.shape)
                self._bind(name, array.nbytes, buffers)
                self._call("cudaMemcpy", buffers[-1], array.ctypes.data_as(ctypes.c_void_p), ctypes.c_size_t(array.nbytes),
                           _HOST_TO_DEVICE)
            results: dict[str, tuple[np.ndarray, ctypes.c_void_p]] = {}
            for name, dtype in self._outputs.items():
                shape = tuple(self._context.get_tensor_shape(name))
                self._bind(name, math.prod(shape) * dtype.itemsize, buffers)
                results[name] = (np.empty(shape, dtype), buffers[-1])
            if not self._context.execute_async_v3(stream.value):
                raise BuildError(f"the engine failed: {'; '.join(self._log.errors)}")
            self._call("cudaStreamSynchronize", stream)
            for array, buffer in results.values():
                self._call("cudaMemcpy", array.ctypes.data_as(ctypes.c_void_p), buffer, ctypes.c_size_t(array.nbytes),
                           _DEVICE_TO_HOST)
            return {name: array for name, (array, _) in results.items()}
        finally:
            for buffer in buffers:
                self._cuda.cudaFree(buffer)
            self._cuda.cudaStreamDestroy(stream)

    def _bind(self, name: str, size: int, buffers: list[ctypes.c_void_p]) -> None:
        pointer = ctypes.c_void_p()
        self._call("cudaMalloc", ctypes.byref(pointer), ctypes.c_size_t(max(size, 1)))
        buffers.append(pointer)
        self._context.set_tensor_address(name, pointer.value)

    def _call(self, function: str, *arguments: Any) -> None:
        status = getattr(self._cuda, function)(*arguments)
        if status != 0:
            raise BuildError(f"{function} failed with CUDA error {status}")

    def _dtype(self, module: Any, name: str) -> np.dtype:
        return np.dtype(module.nptype(self._engine.get_tensor_dtype(name)))


def _cudart() -> ctypes.CDLL:
    for name in ("libcudart.so.13", "libcudart.so.12", "libcudart.so"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise BuildError("the CUDA runtime (libcudart.so) is not on this machine", "pip install nvidia-cuda-runtime, or install CUDA")
