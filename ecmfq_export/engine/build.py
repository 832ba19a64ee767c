"""ONNX to an engine file, for any target.

The module (``tensorrt_rtx`` or ``tensorrt``) is used directly and not through Polygraphy's loaders: Polygraphy chooses between
the two once a process, by an environment variable at import, builds engines in memory only (we stream, at a fraction of the
memory), and has no word for embedded plugin libraries.

An engine is read back before this returns (:mod:`ecmfq_export.engine.engine_file`): what was asked for is what is in it.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx

from ecmfq_export.engine.cross_compile import require_kernels
from ecmfq_export.engine.device import Device, current_device
from ecmfq_export.engine.engine_file import PLUGIN_NAME, EngineInfo, expect_plugin_nodes, read_engine_file
from ecmfq_export.engine.expert_weights import ENGINE, INPUTS, places, weights_as_inputs
from ecmfq_export.engine.graph_file import load_graph
from ecmfq_export.engine.memory import Shapes, check_memory, memory_needs
from ecmfq_export.engine.plugin_library import PluginLibrary, check_plugin_library, read_plugin_library
from ecmfq_export.engine.trt_module import LogLines, clean, load_module, make_logger
from ecmfq_export.engine.trt_plan import read_plan
from ecmfq_export.errors import BuildError
from ecmfq_export.target import Target


def build_engine(
    onnx_path: Path,
    target: Target,
    out_path: Path,
    *,
    profiles: Mapping[str, Shapes],
    plugin_library: Path | None,
    decode_profile: Mapping[str, Shapes] | None = None,
    device_library: Path | None = None,
    timing_cache: Path | None = None,
    log_path: Path | None = None,
    verbose: bool = False,
    expert_weights: str = ENGINE,
) -> EngineInfo:
    """Build one engine and read it back.

    Args:
        onnx_path: the graph; external data beside it.
        target: what to build for.
        out_path: the engine; appears only when it is complete and checked.
        profiles: for every input with a free extent its (min, opt, max) shapes.
        plugin_library: ``libecmfq_plugin.so`` of this machine; needed where the graph has ``EcmfqRoutedMoE`` nodes.
        decode_profile: a second profile within the first one's largest shapes; None: there is one.
        device_library: the library of the target's platform, where that is another one; None: the same. It goes into the engine
            where the target says ``plugin = "embedded"``.
        timing_cache: file of measured tactic times, read if it is there and written; used where the target has one.
        log_path: where to write the builder's whole log, also when it fails.
        verbose: show the builder's messages on stderr as they come.
        expert_weights: ``engine``, or ``inputs``: see :mod:`ecmfq_export.engine.expert_weights`.

    Returns:
        what the engine file holds, by its own bytes; ``build`` has seconds, scratch bytes, shapes, and ``weight_inputs``: where
        the weights lie that are inputs.

    Raises:
        BuildError: this machine cannot build for the target; the graph, a profile or the library is not fit; the parser or the
            builder refused (with node and message); or the engine that came out is not what was asked for.
    """
    onnx_path, out_path = Path(onnx_path), Path(out_path)
    num_plugin_nodes = _count_plugin_nodes(onnx_path)
    needs = memory_needs(onnx_path, profiles)
    check_memory(needs, target)
    library, embedded = _libraries(plugin_library, device_library, num_plugin_nodes, target)
    device = _check_machine(target)
    if device is not None:
        check_memory(needs, target, device.memory_bytes)
        if library is not None:
            check_driver(library, device)
    module = load_module(target.engine)
    graph, names = weights_as_inputs(onnx_path) if expert_weights == INPUTS else (None, [])
    weight_inputs = places(onnx_path, names)

    log = LogLines(sys.stderr if verbose else None)
    started = time.perf_counter()
    partial = out_path.with_name(out_path.name + ".partial")
    try:
        cache = timing_cache if target.engine.timing_cache else None
        shapes = _build(module, log, onnx_path, graph, target, partial, [profiles, *([decode_profile] if decode_profile else [])], library,
                        embedded, cache)
        scratch = log.find(r"Max Scratch Memory: (\d+) bytes") or 0
        info = read_engine_file(partial) if target.engine.runtime == "tensorrt_rtx" else read_plan(module, log, partial)
        _check_engine(info, target, shapes, num_plugin_nodes, embedded)
        needs = dataclasses.replace(needs, scratch=scratch)
        check_memory(needs, target, device.memory_bytes if device else None)
        os.replace(partial, out_path)
    finally:
        partial.unlink(missing_ok=True)
        if log_path is not None:
            log.write(Path(log_path))
    facts: dict[str, object] = {
        "seconds": round(time.perf_counter() - started, 3), "memory": dataclasses.asdict(needs), "io_shapes": shapes,
        "target": target.name, "log_lines": len(log.lines),
    }
    if weight_inputs:
        facts["weight_inputs"] = weight_inputs
    return dataclasses.replace(info, path=out_path.name, build=facts)


def _count_plugin_nodes(onnx_path: Path) -> int:
    model = load_graph(onnx_path)
    if any(function.name == PLUGIN_NAME for function in model.functions):
        raise BuildError(f"{onnx_path} holds a local function '{PLUGIN_NAME}', which the parser would prefer to the plugin",
                         "build from model.onnx; model.ref.onnx is for ONNX Runtime")
    return sum(node.op_type == PLUGIN_NAME for node in model.graph.node)


def _libraries(path: Path | None, device_path: Path | None, num_plugin_nodes: int,
               target: Target) -> tuple[PluginLibrary | None, PluginLibrary | None]:
    """The library to parse with here, and the one to embed in the engine; None and None without plugin nodes."""
    if num_plugin_nodes == 0:
        return None, None
    if path is None:
        raise BuildError(f"the graph has {num_plugin_nodes} {PLUGIN_NAME} nodes and no plugin library was given",
                         "run 'pip install .' to compile it; 'ecmfq-export doctor' shows where it is looked for")
    here = check_plugin_library(path)
    there = here if device_path is None else read_plugin_library(device_path)
    if there.platform != target.platform:
        if target.engine.plugin == "embedded":
            raise BuildError(f"{there.path} is for {there.platform}, the devices of target '{target.name}' are {target.platform}",
                             "give a library of that platform: engine.cross_compile.library_for makes one")
    else:
        require_kernels(there, target)
    return here, there if target.engine.plugin == "embedded" else None


def check_driver(library: PluginLibrary, device: Device) -> None:
    """Refuse a library whose kernels this machine's driver would not load.

    Raises:
        BuildError: it was compiled with a newer major version of CUDA than the driver's.
    """
    if library.cuda and int(library.cuda.split(".")[0]) > int(device.driver.split(".")[0]):
        raise BuildError(f"{library.path} was compiled with CUDA {library.cuda}, the driver of {device.name} takes {device.driver}",
                         "compile it here, with this system's nvcc: pip install . -C cmake.define.ECMFQ_CUDA_ARCHS="
                         f"{device.compute_capability}")


def _check_machine(target: Target) -> Device | None:
    """The device to build on; None where any machine builds."""
    if target.engine.build == "host-aot":
        return None
    device, wanted = current_device(), target.compute_capabilities[0]
    if device is None or device.compute_capability != wanted:
        found = "none was found" if device is None else f"{device.name} has {device.compute_capability}"
        raise BuildError(f"target '{target.name}' is built on the device itself, a GPU of compute capability {wanted}; {found}",
                         f"copy the bundle to the device and run there: ecmfq-export build BUNDLE --target {target.name}")
    return device


def _build(module: ModuleType, log: LogLines, onnx_path: Path, graph: onnx.ModelProto | None, target: Target, out: Path,
           profiles: Sequence[Mapping[str, Shapes]], library: PluginLibrary | None, embedded: PluginLibrary | None,
           timing_cache: Path | None) -> dict[str, dict[str, object]]:
    """Parse the file, or `graph` made from it, and build to `out`; returns dtype, shape and direction of every input and output."""
    logger = make_logger(module, log)
    builder = module.Builder(logger)
    if library is not None and builder.get_plugin_registry().load_library(str(library.path)) is None:
        raise _failed(f"{library.path} was not taken by the plugin registry", log)
    # TensorRT 11 and TensorRT-RTX know only strongly typed networks; TensorRT 10 must be told.
    flag = getattr(module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = module.OnnxParser(network, logger)
    # The path tells where weights lie.
    parsed = parser.parse_from_file(str(onnx_path)) if graph is None else parser.parse(graph.SerializeToString(), str(onnx_path))
    if not parsed:
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        raise _failed(f"{onnx_path}: the parser refused", log,
                      [f"node '{e.node_name()}' ({e.node_operator()}): {e.desc()}" for e in errors])
    config = builder.create_builder_config()
    config.profiling_verbosity = module.ProfilingVerbosity.DETAILED  # layer names in the engine and in the log
    if embedded is not None:
        config.plugins_to_serialize = [str(embedded.path)]
    if timing_cache is not None:
        config.set_timing_cache(config.create_timing_cache(timing_cache.read_bytes() if timing_cache.is_file() else b""), False)
    for one in profiles:
        config.add_optimization_profile(_profile(builder, network, one))
    if target.engine.build == "host-aot":
        config.num_compute_capabilities = len(target.compute_capabilities)
        for index, sm in enumerate(target.compute_capabilities):
            if not config.set_compute_capability(getattr(module.ComputeCapability, f"SM{sm}"), index):
                raise _failed(f"compute capability {sm} was refused", log)
    _write(module, builder, network, config, out, log)
    if timing_cache is not None:
        timing_cache.write_bytes(config.get_timing_cache().serialize())
    return _io(network)


def _profile(builder: Any, network: Any, profiles: Mapping[str, Shapes]) -> Any:
    inputs = {network.get_input(i).name: tuple(network.get_input(i).shape) for i in range(network.num_inputs)}
    unknown = sorted(set(profiles) - set(inputs))
    free = [name for name, shape in inputs.items() if -1 in shape and name not in profiles]
    if unknown or free:
        raise BuildError(f"profiles without an input: {', '.join(unknown) or 'none'}; dynamic inputs without a profile: "
                         f"{', '.join(free) or 'none'}", f"inputs: {', '.join(inputs)}")
    profile = builder.create_optimization_profile()
    for name, (low, opt, high) in profiles.items():
        for shape in (low, opt, high):
            if len(shape) != len(inputs[name]) or any(want not in (-1, have)
                                                       for want, have in zip(inputs[name], shape, strict=True)):
                raise BuildError(f"profile of '{name}' has shape {list(shape)}, the graph has {list(inputs[name])}")
        if any(not a <= b <= c for a, b, c in zip(low, opt, high, strict=True)):
            raise BuildError(f"profile of '{name}' is min {list(low)}, opt {list(opt)}, max {list(high)}",
                             "every extent needs min <= opt <= max")
        profile.set_shape(name, low, opt, high)
    return profile


def _write(module: ModuleType, builder: Any, network: Any, config: Any, out: Path, log: LogLines) -> None:
    if not hasattr(builder, "build_serialized_network_to_stream"):  # TensorRT before 10.12
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise _failed("the builder failed", log)
        out.write_bytes(plan)
        return
    failures: list[OSError] = []
    with out.open("wb") as file:

        class Writer(module.IStreamWriter):  # type: ignore[name-defined,misc]
            def __init__(self) -> None:
                module.IStreamWriter.__init__(self)

            def write(self, data: Any) -> int:
                try:
                    return file.write(data)
                except OSError as error:  # an exception must not cross the builder's C++
                    failures.append(error)
                    return 0

        built = builder.build_serialized_network_to_stream(network, config, Writer())
        if failures:
            raise BuildError(f"{out}: the engine cannot be written: {failures[0]}", "free some disk space")
        if not built:
            raise _failed("the builder failed", log)
        file.flush()
        os.fsync(file.fileno())


def _io(network: Any) -> dict[str, dict[str, object]]:
    tensors = [("input", network.get_input(i)) for i in range(network.num_inputs)]
    tensors += [("output", network.get_output(i)) for i in range(network.num_outputs)]
    return {t.name: {"mode": mode, "dtype": t.dtype.name, "shape": list(t.shape)} for mode, t in tensors}


def _check_engine(info: EngineInfo, target: Target, shapes: Mapping[str, object], num_plugin_nodes: int,
                  embedded: PluginLibrary | None) -> None:
    expect_plugin_nodes(info, num_plugin_nodes)
    if set(info.compute_capabilities) != set(target.compute_capabilities):
        raise BuildError(f"the engine is for compute capabilities {list(info.compute_capabilities)}, target '{target.name}' has "
                         f"{list(target.compute_capabilities)}")
    if set(info.io_names) != set(shapes):
        raise BuildError(f"the engine has inputs and outputs {list(info.io_names)}, the graph has {list(shapes)}")
    if info.runtime == "tensorrt_rtx" and info.plugin_library_sha256 != (embedded.sha256 if embedded else ""):
        raise BuildError(f"the engine embeds a plugin library with sha256 '{info.plugin_library_sha256}', not the one given")


def _failed(what: str, log: LogLines, details: list[str] | None = None) -> BuildError:
    """One error with what the plugin said, then the parser, then the builder; without repeats, dumps and noise."""
    said = [clean(text) for text in [*(details or []), *log.errors]]
    plugin = [text for text in said if text.startswith(PLUGIN_NAME)]
    seen = [text for text in dict.fromkeys([*plugin, *said]) if text and "--- Begin node" not in text and "--- End node" not in text]
    return BuildError(f"{what}: " + ("; ".join(seen) if seen else "it gave no reason"),
                      "the message names the node; 'ecmfq-export inspect model.onnx' shows the graph")
