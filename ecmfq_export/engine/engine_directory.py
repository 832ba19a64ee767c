"""Engines of a bundle, checked before TensorRT or the dynamic loader sees them: both run code that lies in these files.

In this order: the manifest and every hash, what the manifest says of each engine, the plugin's ABI, the runtime's version, the
GPU's compute capability. Hashes tell that nothing changed since the build; they do not tell who built. A bundle from a stranger holds
a stranger's program: ``engine_host_code_allowed`` and the plugin library run it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ecmfq_export import bundle
from ecmfq_export.engine.device import Device
from ecmfq_export.engine.plugin_library import ABI_VERSION, LIBRARY_NAME, read_plugin_library
from ecmfq_export.errors import BuildError, BundleError

BUILT, PREPARED = "build", "device"
PARTS = ("decoder", "vision")
_AGAIN = "build the engines again: ecmfq-export build BUNDLE --target NAME"


@dataclass(frozen=True)
class EngineRecord:
    """What a build wrote down of one engine, checked against the files.

    Attributes:
        path: the engine file.
        runtime, runtime_version: what built it, and can load it.
        compute_capabilities: GPUs that it runs on.
        num_plugin_nodes: layers of our plugin in it.
        plugin_library: the library beside it; None where it is embedded or not needed.
        weight_inputs: names of the graph's weights that it takes as inputs.
    """

    path: Path
    runtime: str
    runtime_version: str
    compute_capabilities: tuple[int, ...]
    num_plugin_nodes: int
    plugin_library: Path | None
    weight_inputs: tuple[str, ...] = ()


def open_engines(directory: Path) -> dict[str, EngineRecord]:
    """The engines of a finished build, by part, after everything that files alone can tell was checked; nothing is loaded.

    A directory that was prepared for a device has none: what trtexec builds there is in no manifest, and TensorRT alone checks it.

    Raises:
        BundleError: a file is missing or changed, or the manifest does not describe its engines.
        BuildError: the plugin has another ABI than this version of ecmfq-export.
    """
    manifest = bundle.read_manifest(directory)
    if manifest.stage not in (BUILT, PREPARED):
        raise BundleError(f"{directory} is a '{manifest.stage}' directory", f"expected one of {BUILT}, {PREPARED}")
    bundle.verify(directory, manifest)
    abi = manifest.info.get("plugin_abi")
    if type(abi) is not int or abi != ABI_VERSION:
        raise BuildError(f"{directory} was built with plugin ABI {abi}, this version of ecmfq-export has {ABI_VERSION}", _AGAIN)
    library = directory / LIBRARY_NAME if LIBRARY_NAME in manifest.files else None
    if library is not None:
        read_plugin_library(library)
    return {part: _record(directory, part, manifest, library) for part in PARTS} if manifest.stage == BUILT else {}


def check_runs_here(record: EngineRecord, version: str, device: Device | None) -> None:
    """Whether this machine's runtime and GPU are those that an engine was built for.

    Args:
        version: of the installed ``tensorrt`` or ``tensorrt_rtx``; an engine is loaded by the version that built it.

    Raises:
        BuildError: another version, no GPU, or one of another compute capability.
    """
    if _release(version) != _release(record.runtime_version):
        raise BuildError(f"{record.path} was built by {record.runtime} {record.runtime_version}, version {version} is installed",
                         f"install that version, or {_AGAIN}")
    if device is None or device.compute_capability not in record.compute_capabilities:
        found = "none" if device is None else f"{device.name} with {device.compute_capability}"
        raise BuildError(f"{record.path} needs a GPU of compute capability {list(record.compute_capabilities)}; found: {found}",
                         "without such a GPU, ONNX Runtime runs the bundle: ecmfq-export run")


def _release(version: str) -> list[str]:
    return re.findall(r"\d+", version)[:3]


def _record(directory: Path, part: str, manifest: bundle.Manifest, library: Path | None) -> EngineRecord:
    facts: Any = manifest.info.get(part)
    name = f"{part}.engine"
    if not isinstance(facts, dict) or name not in manifest.files:
        raise BundleError(f"{directory / bundle.MANIFEST} describes no engine '{part}'", _AGAIN)
    forms = {"runtime": str, "runtime_version": str, "compute_capabilities": list, "plugin_nodes": list, "sha256": str,
             "plugin_library_sha256": str}  # fmt: skip
    for key, form in forms.items():
        if not isinstance(facts.get(key), form):
            raise BundleError(f"{directory / bundle.MANIFEST}: {part}.{key} is {str(facts.get(key))[:80]!r}", _AGAIN)
    capabilities = facts["compute_capabilities"]
    if facts["runtime"] not in ("tensorrt", "tensorrt_rtx") or any(type(sm) is not int for sm in capabilities):
        raise BundleError(f"{directory / bundle.MANIFEST}: {part} is for {facts['runtime']} on {capabilities}", _AGAIN)
    if facts["sha256"] != manifest.files[name]:
        raise BundleError(f"{directory / name} is not the engine that the build described", _AGAIN)
    used = facts["plugin_library_sha256"]
    if library is not None and used and manifest.files[LIBRARY_NAME] != used:
        raise BundleError(f"{library} is not the library that {name} was built with", _AGAIN)
    return EngineRecord(directory / name, facts["runtime"], facts["runtime_version"], tuple(capabilities), len(facts["plugin_nodes"]),
                        library, _weight_inputs(directory, part, facts))


def _weight_inputs(directory: Path, part: str, facts: dict[str, Any]) -> tuple[str, ...]:
    """Names of weights that are inputs; their places are read from the graph itself, which is checked."""
    build = facts.get("build", {})
    names = build.get("weight_inputs", {}) if isinstance(build, dict) else None
    if not isinstance(names, dict):
        raise BundleError(f"{directory / bundle.MANIFEST}: {part}.build.weight_inputs is {str(names)[:80]!r}", _AGAIN)
    return tuple(names)
