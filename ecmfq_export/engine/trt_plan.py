"""Read a full TensorRT engine back with TensorRT itself: possible only on the device that it was built on.

Not run yet: no machine of this project had TensorRT with a GPU. TensorRT-RTX engines are read by
:mod:`ecmfq_export.engine.engine_file` instead, without a GPU.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

from ecmfq_export.engine.device import current_device
from ecmfq_export.engine.engine_file import PLUGIN_NAME, EngineInfo, PluginNode
from ecmfq_export.engine.trt_module import LogLines, make_logger
from ecmfq_export.errors import BuildError


def read_plan(module: ModuleType, log: LogLines, path: Path) -> EngineInfo:
    """Deserialize an engine and list its plugin layers with TensorRT's inspector.

    The plugin library must be registered in this process already; a builder's registry is the process's.

    Raises:
        BuildError: TensorRT refuses its own engine.
    """
    plan = path.read_bytes()
    logger = make_logger(module, log)
    runtime = module.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise BuildError(f"{path}: TensorRT cannot load the engine that it built: {'; '.join(log.errors)}")
    layers = json.loads(engine.create_engine_inspector().get_engine_information(module.LayerInformationFormat.JSON))["Layers"]
    nodes, num_layers = plugin_layers(layers)
    device = current_device()
    return EngineInfo(
        path=path.name, bytes=len(plan), sha256=hashlib.sha256(plan).hexdigest(), runtime="tensorrt",
        runtime_version=module.__version__, compute_capabilities=(device.compute_capability,) if device else (),
        sections={}, io_names=tuple(engine.get_tensor_name(i) for i in range(engine.num_io_tensors)), plugin_nodes=nodes,
        num_custom_layers=num_layers, plugin_library_sha256="",
    )


def plugin_layers(layers: list[Any]) -> tuple[tuple[PluginNode, ...], int]:
    """Our plugin's nodes among the inspector's layers, and how many plugin layers there are of any kind; every profile's copy is one."""
    plugins = {re.sub(r" \[profile \d+\]$", "", str(layer["Name"])): PLUGIN_NAME in json.dumps(layer) for layer in layers
               if isinstance(layer, dict) and "plugin" in str(layer.get("LayerType", "")).lower()}
    return tuple(PluginNode(name, PLUGIN_NAME, "1", "", {}) for name, own in plugins.items() if own), len(plugins)
