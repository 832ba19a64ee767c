"""A bundle's engines: built on this machine, or prepared for the device that builds them itself."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from ecmfq_export import bundle
from ecmfq_export.engine.build import build_engine, check_driver
from ecmfq_export.engine.cross_compile import library_for
from ecmfq_export.engine.device import current_device
from ecmfq_export.engine.device_kit import Part, runs_on_oldest, total_needs, write_kit
from ecmfq_export.engine.engine_file import expect_plugin_nodes
from ecmfq_export.engine.expert_weights import CHOICES, ENGINE, INPUTS
from ecmfq_export.engine.memory import check_memory, memory_needs
from ecmfq_export.engine.plugin_library import (
    ABI_VERSION,
    LIBRARY_NAME,
    LOCAL_LIBRARY_NAME,
    check_plugin_library,
    find_plugin_library,
    host_platform,
    read_plugin_library,
)
from ecmfq_export.engine.profiles import decode_ranges, profile_shapes
from ecmfq_export.engine.trtexec import TIMING_CACHE
from ecmfq_export.errors import BuildError, BundleError, UserError
from ecmfq_export.progress import Progress
from ecmfq_export.target import Target

BUILT, PREPARED = "build", "device"
"""Stages of an engine folder: with engines, or with what a device needs to build them."""


def build_engines(onnx_dir: Path, out_dir: Path, target: Target, progress: Progress, *, verbose: bool = False,
                  expert_weights: str = ENGINE) -> Path:
    """Build the decoder's and the vision tower's engine, and put the plugin library beside them.

    Where the target's engines are built on the device and this is not one, `out_dir` gets what the device needs instead
    (:mod:`ecmfq_export.engine.device_kit`), as stage :data:`PREPARED`.

    Args:
        onnx_dir: the bundle's ``onnx``.
        out_dir: the bundle's ``engines/<target>``; replaced when everything is there.
        expert_weights: ``engine``, or ``inputs``: the decoder engine takes them from the bundle's files when it is opened
            (:mod:`ecmfq_export.engine.expert_weights`).

    Raises:
        BuildError: this machine cannot build for the target, a build failed, or the engine that came out does not hold one
            plugin node for each routed MoE layer.
    """
    require_weights(target, expert_weights)
    parts, manifest = engine_parts(onnx_dir, target)
    needs, device = total_needs(parts), current_device()
    own = device.memory_bytes if device is not None and device.compute_capability in target.compute_capabilities else None
    progress.note(f"memory: {needs}; {target.name} leaves {target.limits.memory_bytes / 2**30:.1f} GiB to engines"
                  + (f", this device has {own / 2**30:.1f}" if own else ""))
    check_memory(needs, target, own, "the engines need")
    if builds_here(target):
        return _build(onnx_dir, out_dir, target, parts, manifest, progress, verbose, expert_weights)
    return _prepare(onnx_dir, out_dir, target, parts, manifest, progress)


def builds_here(target: Target) -> bool:
    """Whether this machine makes the target's engines: any does ahead of time, only the device itself where it builds its own."""
    device = current_device()
    return target.engine.build == "host-aot" or device is not None and device.compute_capability in target.compute_capabilities


def require_weights(target: Target, expert_weights: str) -> None:
    """Refuse weights as inputs where trtexec would build the engine: it leaves every weight of the graph inside.

    Raises:
        UserError: an unknown choice.
        BuildError: the target's engines are not built on this machine.
    """
    if expert_weights not in CHOICES:
        raise UserError(f"expert weights '{expert_weights}'", f"one of {', '.join(CHOICES)}")
    if expert_weights == INPUTS and not builds_here(target):
        raise BuildError(f"engines for {target.name} are built on the device, and trtexec leaves expert weights in the engine",
                         f"leave --expert-weights {INPUTS} out, or give it to 'ecmfq-export build' on the device")


def engine_parts(onnx_dir: Path, target: Target) -> tuple[dict[str, Part], bundle.Manifest]:
    """The bundle's graphs, checked against the target, and the manifest of `onnx_dir`.

    Raises:
        BuildError: the graphs were exported in another form than the target takes.
        BundleError: a file is missing or changed.
    """
    manifest = bundle.open_stage(onnx_dir, "onnx")
    if manifest.config.get("flavour") == "ort":
        raise BuildError(f"{onnx_dir} holds graphs for ONNX Runtime alone (--flavour ort)", f"export again with --target {target.name}")
    for key, wanted in (("attention", target.attention), ("weight_layout", target.kernel.weight_layout), ("dtype", target.dtype)):
        if manifest.config.get(key) != wanted:
            raise BuildError(f"{onnx_dir} was exported with {key} = {manifest.config.get(key)}, target {target.name} needs {wanted}",
                             f"export again with --target {target.name} (into another bundle to keep both)")
    ranges, num_plugin_nodes = onnx_facts(manifest, onnx_dir)
    parts = {}
    for name, nodes in (("decoder", num_plugin_nodes), ("vision", 0)):
        graph = onnx_dir / name / "model.onnx"
        profiles = [profile_shapes(graph, ranges)]
        needs = memory_needs(graph, profiles[0])
        if name == "decoder" and target.engine.decode_profile:
            profiles.append(profile_shapes(graph, decode_ranges(ranges)))
        parts[name] = Part(PurePosixPath("../../onnx") / name / "model.onnx", tuple(profiles), nodes, needs)
    return parts, manifest


def onnx_facts(manifest: bundle.Manifest, onnx_dir: Path) -> tuple[dict[str, tuple[int, int, int]], int]:
    """What building engines takes from the manifest of the graphs: ranges of the symbolic dimensions, and how many plugin nodes.

    Raises:
        BundleError: a fact that is missing or of another form.
    """
    ranges, nodes = manifest.info.get("dim_ranges"), manifest.info.get("num_plugin_nodes")
    if not isinstance(ranges, dict) or not ranges or type(nodes) is not int or not 0 <= nodes < 2**20 or any(
        not isinstance(values, list) or len(values) != 3 or any(type(value) is not int or not 1 <= value < 2**31 for value in values)
        for values in ranges.values()
    ):
        raise BundleError(f"{onnx_dir / bundle.MANIFEST}: dim_ranges or num_plugin_nodes is missing or wrong", "export again")
    return {name: (values[0], values[1], values[2]) for name, values in ranges.items()}, nodes


def _prepare(onnx_dir: Path, out_dir: Path, target: Target, parts: Mapping[str, Part], manifest: bundle.Manifest,
             progress: Progress) -> Path:
    library = library_for(target, progress.note)
    config = {"target": dataclasses.asdict(target), "ranges": manifest.info["dim_ranges"]}
    inputs = {"onnx": bundle.fingerprint(onnx_dir), "plugin_library": library.sha256}
    if not bundle.is_current(out_dir, PREPARED, config, inputs):
        with bundle.write_stage(out_dir, PREPARED, config, inputs) as (work, info):
            info.update(write_kit(work, target, library, parts), plugin_abi=ABI_VERSION)
    progress.note(f"engines for {target.name} are built on the device: copy the bundle there and run 'sh build.sh' in engines/"
                  f"{target.name}, or 'ecmfq-export build BUNDLE --target {target.name}'; 'build --trtexec' prints the exact lines")
    if not runs_on_oldest(library, target):
        progress.note(f"the plugin library is compiled with CUDA {library.cuda}; a device with CUDA {target.kernel.cuda} compiles it from "
                      f"engines/{target.name}/plugin-src first: README.txt there has the lines")
    return out_dir


def _build(onnx_dir: Path, out_dir: Path, target: Target, parts: Mapping[str, Part], manifest: bundle.Manifest, progress: Progress,
           verbose: bool, expert_weights: str) -> Path:
    library = _shipped_library(out_dir, target, progress) or find_plugin_library()
    there = read_plugin_library(library) if target.platform == host_platform() else library_for(target, progress.note)
    config = {"target": dataclasses.asdict(target), "ranges": manifest.info["dim_ranges"]}
    if expert_weights != ENGINE:
        config["expert_weights"] = expert_weights
    inputs = {"onnx": bundle.fingerprint(onnx_dir), "plugin_library": bundle.sha256_file(library), "device_library": there.sha256}
    if bundle.is_current(out_dir, BUILT, config, inputs):
        progress.note(f"{out_dir}: up to date")
        return out_dir
    with bundle.write_stage(out_dir, BUILT, config, inputs) as (work, info):
        info["plugin_abi"] = ABI_VERSION
        if target.engine.build == "on-device":
            info.update(write_kit(work, target, there, parts))
        else:
            shutil.copyfile(there.path, work / LIBRARY_NAME)
        if (out_dir / TIMING_CACHE).is_file():
            shutil.copyfile(out_dir / TIMING_CACHE, work / TIMING_CACHE)
        for name, part in progress.track(parts.items(), f"build engines for {target.name}", total=len(parts)):
            engine = build_engine(onnx_dir / name / "model.onnx", target, work / f"{name}.engine", profiles=part.profiles[0],
                                  decode_profile=next(iter(part.profiles[1:]), None), plugin_library=library,
                                  device_library=there.path, timing_cache=work / TIMING_CACHE,
                                  log_path=work / f"{name}.build.log", verbose=verbose,
                                  expert_weights=expert_weights if name == "decoder" else ENGINE)
            expect_plugin_nodes(engine, part.num_plugin_nodes)
            info[name] = dataclasses.asdict(engine)
    return out_dir


def _shipped_library(out_dir: Path, target: Target, progress: Progress) -> Path | None:
    """The library for the device it is built on: compiled there (``LOCAL_LIBRARY_NAME``), or the bundle's where the driver loads it.

    Raises:
        BuildError: its hash is not the manifest's.
    """
    device = current_device()
    if target.engine.build != "on-device" or device is None or not (out_dir / bundle.MANIFEST).is_file():
        return None
    local = out_dir / LOCAL_LIBRARY_NAME
    if local.is_file():
        progress.note(f"{local} is taken: it was compiled on this device")
        return check_plugin_library(local).path
    library = check_plugin_library(out_dir / LIBRARY_NAME, bundle.read_manifest(out_dir).files.get(LIBRARY_NAME))
    try:
        check_driver(library, device)
    except BuildError as error:
        progress.note(f"{error.what}; this installation's own library is taken")
        return None
    return library.path
