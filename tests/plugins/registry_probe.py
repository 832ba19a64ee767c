"""Run in a process of its own: load the plugin library into one TensorRT's registry and report what it sees, as JSON.

Usage: python registry_probe.py tensorrt_rtx|tensorrt_lean LIBRARY
"""

from __future__ import annotations

import ctypes
import importlib
import json
import sys
from typing import Any

import numpy as np

GOOD: dict[str, Any] = {
    "abi_version": 1, "num_experts": 8, "top_k": 2, "hidden_size": 256, "intermediate_size": 128, "group_size": -1,
    "activation": "silu_glu", "weight_layout": "row_major",
}
WRONG: dict[str, dict[str, Any]] = {
    "top_k": {"top_k": 9}, "num_experts": {"num_experts": 0}, "activation": {"activation": "relu"},
    "weight_layout": {"weight_layout": "column_major"}, "group_size": {"group_size": 64}, "abi_version": {"abi_version": 2},
    "hidden_size": {"hidden_size": 257}, "intermediate_size": {"intermediate_size": -4},
    "unknown": {"colour": 1}, "missing": {"top_k": None},
}


def main(module_name: str, library: str) -> None:
    trt = importlib.import_module(module_name)
    # A builder's registry unloads the library when the builder goes; Python may free a plugin after that. Keep it mapped.
    ctypes.CDLL(library)
    messages: list[str] = []

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            messages.append(message)

    logger = Logger()
    if module_name == "tensorrt_rtx":
        builder = trt.Builder(logger)
        registry = builder.get_plugin_registry()
    else:
        registry = trt.get_plugin_registry()
    handle = registry.load_library(library)
    creators = [[c.name, c.plugin_version, c.plugin_namespace] for c in registry.all_creators if c.name.startswith("Ecmfq")]
    creator = registry.get_creator("EcmfqRoutedMoE", "1", "")

    def create(values: dict[str, Any], phase: Any) -> Any:
        fields = []
        for name, value in values.items():
            if isinstance(value, str):
                fields.append(trt.PluginField(name, np.frombuffer(value.encode() + b"\0", np.int8), trt.PluginFieldType.CHAR))
            elif value is not None:
                fields.append(trt.PluginField(name, np.array([value], np.int32), trt.PluginFieldType.INT32))
        return creator.create_plugin("probe/moe", trt.PluginFieldCollection(fields), phase)

    plugin = create(GOOD, trt.TensorRTPhase.BUILD)
    kinds = [plugin.get_capability_interface(getattr(trt.PluginCapabilityType, name)).interface_info.kind
             for name in ("CORE", "BUILD", "RUNTIME")]
    refused = {}
    for case, change in WRONG.items():
        del messages[:]
        made = create({**GOOD, **change}, trt.TensorRTPhase.BUILD)
        refused[case] = [made is None, messages[-1] if messages else ""]
    as_engine = create({**GOOD, "activation": 0, "weight_layout": 0}, trt.TensorRTPhase.RUNTIME)
    print(json.dumps({
        "version": trt.__version__, "handle": handle is not None, "creators": creators, "kinds": kinds, "refused": refused,
        "fields": {f.name: f.type.name for f in creator.field_names}, "created": plugin is not None,
        "engine_fields_without_checksum": as_engine is not None,
    }))


if __name__ == "__main__":
    main(*sys.argv[1:])
