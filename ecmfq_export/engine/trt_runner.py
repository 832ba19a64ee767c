"""Run an engine on this machine's GPU, with TensorRT-RTX or TensorRT.

Not run yet: no machine of this project had a GPU with a driver. It imports, and refuses clearly where there is no device. What it
does with buffers, the cache and CUDA graphs is in :mod:`ecmfq_export.engine.bound_engine`, which tests run over an engine of their own;
this file holds the calls into TensorRT alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ecmfq_export.engine.bound_engine import BoundEngine, Context, Shape
from ecmfq_export.engine.cuda_runtime import CudaRuntime
from ecmfq_export.engine.device import current_device
from ecmfq_export.engine.plugin_library import LIBRARY_NAME, LOCAL_LIBRARY_NAME
from ecmfq_export.engine.trt_module import LogLines, load_module, make_logger
from ecmfq_export.errors import BuildError
from ecmfq_export.target import Target


class TrtRunner:
    """A :class:`~ecmfq_export.engine.runner.Runner` over one engine: buffers allocated once, the KV cache kept on the device.

    Args:
        path: the engine.
        target: what it was built for.
        plugin_library: for an engine that does not embed it; None: the one beside the engine, where the target has it there (one
            that was compiled on the device first).
        weights: expert weights that the engine takes as inputs, by name (:mod:`ecmfq_export.engine.expert_weights`).
        graphs: replay repeated calls as CUDA graphs: TensorRT-RTX's own, which follow changing shapes, or ours of decode steps.

    Raises:
        BuildError: no device, a device of another compute capability, no CUDA runtime, or TensorRT refuses the engine.
    """

    def __init__(self, path: Path, target: Target, *, plugin_library: Path | None = None, graphs: bool = True,
                 weights: Mapping[str, np.ndarray] | None = None) -> None:
        device = current_device()
        if device is None or device.compute_capability not in target.compute_capabilities:
            found = "none" if device is None else f"{device.name} with {device.compute_capability}"
            raise BuildError(f"{path} needs a GPU of compute capability {list(target.compute_capabilities)}; found: {found}",
                             "without a GPU, ONNX Runtime runs the bundle: ecmfq-export run")
        path = Path(path)
        self._cuda = CudaRuntime()
        if plugin_library is None and target.engine.plugin == "beside":
            beside = (path.with_name(name) for name in (LOCAL_LIBRARY_NAME, LIBRARY_NAME))
            plugin_library = next((library for library in beside if library.is_file()), None)
        engine = _TrtEngine(path, target, self._cuda, plugin_library, graphs)
        self._bound = BoundEngine(engine, self._cuda, kv_cache=target.kv_cache, graphs=graphs, weights=weights)

    @property
    def input_names(self) -> list[str]:
        return self._bound.input_names

    @property
    def output_names(self) -> list[str]:
        return self._bound.output_names

    @property
    def device_bytes(self) -> int:
        return self._bound.device_bytes

    @property
    def calls(self) -> dict[str, int]:
        """How many calls ran directly, were captured as a CUDA graph, and were replayed (captured ones included)."""
        return self._bound.calls

    def run(self, feeds: Mapping[str, np.ndarray], outputs: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        return self._bound.run(feeds, outputs)


class _TrtEngine:
    """TensorRT's engine behind bound_engine.Engine: weights once, one context a profile."""

    def __init__(self, path: Path, target: Target, cuda: CudaRuntime, plugin_library: Path | None, graphs: bool) -> None:
        before = cuda.memory()[0]
        module = load_module(target.engine)
        self._log = LogLines()
        self._runtime = module.Runtime(make_logger(module, self._log))
        if target.engine.plugin == "embedded":
            self._runtime.engine_host_code_allowed = True  # the embedded plugin library is our own
        if plugin_library is not None:
            self._runtime.get_plugin_registry().load_library(str(plugin_library))
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise BuildError(f"{path}: TensorRT refuses the engine: {self.error()}", "build it again on this device")
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        facts = {name: (np.dtype(module.nptype(self._engine.get_tensor_dtype(name))), tuple(self._engine.get_tensor_shape(name)))
                 for name in names}
        given = [name for name in names if self._engine.get_tensor_mode(name) == module.TensorIOMode.INPUT]
        self.inputs = {name: facts[name] for name in given}
        self.outputs = {name: facts[name] for name in names if name not in self.inputs}
        self.profiles: list[Mapping[str, tuple[Shape, Shape]]] = []
        self.contexts: list[Context] = []
        for index in range(self._engine.num_optimization_profiles):
            ranges = {name: self._engine.get_tensor_profile_shape(name, index) for name in given}
            self.profiles.append({name: (tuple(shapes[0]), tuple(shapes[2])) for name, shapes in ranges.items()})
            context = self._new_context(module, graphs and target.engine.runtime == "tensorrt_rtx")
            if context is None or not context.set_optimization_profile_async(index, cuda.stream):
                raise BuildError(f"{path}: no execution context for profile {index}: {self.error()}", "free device memory")
            cuda.synchronize()
            self.contexts.append(_TrtContext(context))
        self.device_bytes = max(before - cuda.memory()[0], 0)

    def _new_context(self, module: Any, own_graphs: bool) -> Any:
        if not own_graphs:
            return self._engine.create_execution_context()
        config = self._engine.create_runtime_config()
        config.cuda_graph_strategy = module.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        return self._engine.create_execution_context(config)

    def error(self) -> str:
        return "; ".join(self._log.errors)


class _TrtContext:
    """An execution context behind bound_engine.Context."""

    def __init__(self, context: Any) -> None:
        self._context = context

    def set_shape(self, name: str, shape: Shape) -> bool:
        return bool(self._context.set_input_shape(name, shape))

    def set_address(self, name: str, address: int) -> bool:
        return bool(self._context.set_tensor_address(name, address))

    def output_shape(self, name: str) -> Shape:
        return tuple(self._context.get_tensor_shape(name))

    def enqueue(self, stream: int) -> bool:
        return bool(self._context.execute_async_v3(stream))
