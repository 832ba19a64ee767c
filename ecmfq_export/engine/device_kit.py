"""What a bundle carries for a device that builds its own engines: the plugin library, a script with the exact trtexec lines, and a text.

    engines/<target>/libecmfq_plugin.so   for the device's platform and SM version
    engines/<target>/build.sh             builds decoder.engine and vision.engine with trtexec; nothing of this package is needed
    engines/<target>/README.txt           what the library is, what it needs, how much memory the engines need
    engines/<target>/plugin-src/          the library's sources, where the target admits systems that the library does not run on
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ecmfq_export.engine.cross_compile import plugin_sources, source_files
from ecmfq_export.engine.memory import MemoryNeeds, Shapes, check_memory
from ecmfq_export.engine.plugin_library import LIBRARY_NAME, LOCAL_LIBRARY_NAME, PluginLibrary
from ecmfq_export.engine.trtexec import TIMING_CACHE, build_script, trtexec_arguments
from ecmfq_export.target import Target

SCRIPT, TEXT, SOURCES = "build.sh", "README.txt", "plugin-src"


@dataclasses.dataclass(frozen=True)
class Part:
    """One graph of the bundle: where it lies relative to the engine folder, its profiles, its plugin nodes, its memory."""

    onnx: PurePosixPath
    profiles: tuple[Mapping[str, Shapes], ...]
    num_plugin_nodes: int
    needs: MemoryNeeds


def runs_on_oldest(library: PluginLibrary, target: Target) -> bool:
    """Whether the oldest CUDA driver that the target admits loads this library's kernels."""
    return not library.cuda or _major(library.cuda) <= _major(target.kernel.cuda)


def arguments_of(parts: Mapping[str, Part], target: Target) -> dict[str, list[str]]:
    """trtexec's arguments for each part, paths relative to the engine folder."""
    return {name: trtexec_arguments(part.onnx, PurePosixPath(f"{name}.engine"), part.profiles,
                                    plugin_library=PurePosixPath(LIBRARY_NAME) if part.num_plugin_nodes else None,
                                    timing_cache=PurePosixPath(TIMING_CACHE) if target.engine.timing_cache else None)
            for name, part in parts.items()}


def write_kit(folder: Path, target: Target, library: PluginLibrary, parts: Mapping[str, Part]) -> dict[str, Any]:
    """Write the files into `folder` and return facts for its manifest.

    Raises:
        BuildError: both engines together need more memory than the target has.
    """
    needs = total_needs(parts)
    check_memory(needs, target, what="the engines need")
    shutil.copyfile(library.path, folder / LIBRARY_NAME)
    lines = arguments_of(parts, target)
    script = folder / SCRIPT
    script.write_text(build_script(lines, f"Builds the engines of this bundle on the device itself: {target.description}.\n"
                                          f"TRTEXEC=/path/to/trtexec sh {SCRIPT}   where trtexec is elsewhere. See {TEXT}."),
                      encoding="utf-8")
    script.chmod(0o755)
    oldest = runs_on_oldest(library, target)
    if not oldest:
        sources = plugin_sources()
        for path in source_files(sources):
            copy = folder / SOURCES / path.relative_to(sources)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    (folder / TEXT).write_text(_text(target, library, needs, oldest), encoding="utf-8")
    facts = {key: value for key, value in dataclasses.asdict(library).items() if key != "path"}
    return {"plugin_library": {**facts, "file": LIBRARY_NAME}, "memory": dataclasses.asdict(needs), "trtexec": lines}


def total_needs(parts: Mapping[str, Part]) -> MemoryNeeds:
    """Of all parts loaded together."""
    needs = MemoryNeeds(0, 0, 0)
    for part in parts.values():
        needs = needs + part.needs
    return needs


def _text(target: Target, library: PluginLibrary, needs: MemoryNeeds, oldest: bool) -> str:
    sms = ", ".join(map(str, library.compute_capabilities))
    own = ", ".join(map(str, target.compute_capabilities))
    text = f"""\
{target.name}: {target.description}

Engines for this device are built on it. Copy the whole bundle there, then one of:

  sh {SCRIPT}
      with TensorRT's trtexec ({target.engine.min_version} to {target.engine.max_version}.x); needs nothing else

  ecmfq-export build BUNDLE --target {target.name}
      the same, read back and checked; needs Python 3.11 or newer, TensorRT's Python bindings and ecmfq-export, installed from its
      source tree without CUDA's compiler: pip install SOURCE_TREE -C cmake.define.ECMFQ_LIBRARY=$PWD/{LIBRARY_NAME}

Memory: {needs} (the target leaves {target.limits.memory_bytes / 2**30:.1f} GiB to the engines).

{LIBRARY_NAME}: {library.platform}, SM {sms}, {library.bytes} bytes
  sha256 {library.sha256}
  needs glibc {library.glibc or "of any version"} or newer"""
    if library.cuda:
        text += f" and a driver for CUDA {_major(library.cuda)} or newer (it was compiled with CUDA {library.cuda})"
    text += "\n"
    if not oldest:
        text += f"""
Systems with an older driver (this target admits CUDA {target.kernel.cuda}) load none of its kernels. Compile it there before building
engines, with the system's own nvcc (CUDA {target.kernel.cuda}) and CMake 3.22 or newer; it takes a minute:

  cmake -S {SOURCES} -B /tmp/ecmfq_plugin -DECMFQ_CUDA_ARCHS="{own.replace(", ", ";")}" -DCMAKE_CUDA_COMPILER=/usr/local/cuda/bin/nvcc
  cmake --build /tmp/ecmfq_plugin
  cp /tmp/ecmfq_plugin/{LIBRARY_NAME} {LOCAL_LIBRARY_NAME}

{SCRIPT} and 'ecmfq-export' take {LOCAL_LIBRARY_NAME} before {LIBRARY_NAME}.
"""
    return text


def _major(version: str) -> int:
    return int(version.split(".")[0])
