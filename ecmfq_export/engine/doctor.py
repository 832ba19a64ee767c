"""What this machine can build and run, what it lacks, and the line that installs it. Never raises: every answer is a check."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from ecmfq_export.engine.cross_compile import cross_tools
from ecmfq_export.engine.device import Device, current_device
from ecmfq_export.engine.plugin_library import ABI_VERSION, check_plugin_library, find_plugin_library, host_platform
from ecmfq_export.engine.trt_module import INSTALL
from ecmfq_export.errors import UserError
from ecmfq_export.target import list_targets, load_target

_FREE_BYTES = 10 * 2**30


@dataclass(frozen=True)
class Check:
    """One line of ``ecmfq-export doctor``.

    Attributes:
        name: what was looked for.
        ok: whether it is there.
        detail: what was found, or what it is needed for.
        fix: the line that installs it; empty where nothing is missing.
    """

    name: str
    ok: bool
    detail: str
    fix: str = ""


def collect() -> list[Check]:
    """Look at everything, in the order in which a user would need it."""
    device = current_device()
    library, kernels = _plugin_library()
    checks = [
        Check("python", sys.version_info >= (3, 11), f"{platform.python_version()}, {platform.system()} {platform.machine()}",
              "use Python 3.11 or newer"),
        _package("torch", "quantize", "pip install 'torch==2.13.0'"),
        _package("transformers", "read checkpoints", "pip install 'transformers~=5.23.0'"),
        _package("onnxruntime", "validate and run on the CPU", "pip install 'onnxruntime~=1.32'"),
        _package("tensorrt_rtx", "build engines without a GPU", INSTALL["tensorrt_rtx"], "tensorrt-rtx"),
        _package("tensorrt", "build engines on a Jetson, H100, B200 (on the device itself)", INSTALL["tensorrt"]),
        _package("tensorrt_lean", "run the plugin tests against TensorRT 11", "pip install tensorrt-lean-cu13",
                 "tensorrt-lean-cu13"),
        library,
        _nvcc(),
        *_cross_compilers(),
        _device(device),
        _disk(),
    ]
    return [*checks, *_targets({check.name: check.ok for check in checks}, kernels, device)]


def _package(module: str, purpose: str, fix: str, distribution: str | None = None) -> Check:
    # Found, not imported: importing torch takes seconds, and a broken TensorRT may abort.
    if importlib.util.find_spec(module) is None:
        return Check(module, False, f"not installed; needed to {purpose}", fix)
    try:
        version = metadata.version(distribution or module)
    except metadata.PackageNotFoundError:
        version = "version unknown"
    return Check(module, True, version)


def _plugin_library() -> tuple[Check, tuple[int, ...]]:
    """The library and the SM versions that it has kernels for."""
    try:
        library = check_plugin_library(find_plugin_library())
    except UserError as error:
        return Check("plugin library", False, error.what, error.fix), ()
    archs = " ".join(map(str, library.compute_capabilities))
    detail = f"{library.path} ({library.bytes / 2**20:.1f} MiB, ABI {ABI_VERSION}, SM {archs})"
    return Check("plugin library", True, detail), library.compute_capabilities


def _nvcc() -> Check:
    path = shutil.which("nvcc") or next((str(p) for p in [Path("/usr/local/cuda/bin/nvcc")] if p.is_file()), None)
    if path is None:
        return Check("nvcc", True, "none; 'pip install .' takes the compiler from PyPI (about 110 MB, for the build alone)")
    try:
        text = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        return Check("nvcc", False, f"{path}: {error}", "remove it from PATH, or repair the CUDA toolkit")
    version = next((part.strip() for part in text.replace("\n", ",").split(",") if part.strip().startswith("release")), "")
    return Check("nvcc", True, f"{path} {version}")


def _cross_compilers() -> list[Check]:
    """What the plugin library of targets of other platforms is compiled with."""
    checks = []
    for platform_name, names in sorted(_foreign_targets().items()):
        try:
            tools = cross_tools(platform_name)
        except UserError as error:
            checks.append(Check(f"plugin library for {platform_name}", False, error.what, error.fix))
            continue
        checks += [Check(tool.name, bool(tool.path), tool.path or f"not found; {tool.purpose}: export for {', '.join(names)}", tool.install)
                   for tool in tools]
    return checks


def _foreign_targets() -> dict[str, list[str]]:
    """Platform to its bundled targets, this machine's own left out."""
    found: dict[str, list[str]] = {}
    for name in list_targets():
        where = load_target(name).platform
        if where != host_platform():
            found.setdefault(where, []).append(name)
    return found


def _device(device: Device | None) -> Check:
    if device is None:
        return Check("GPU", False, "no CUDA driver or no device; engines for tensorrt_rtx targets build without one, none runs",
                     "install NVIDIA's driver on a machine with a GPU")
    return Check("GPU", True, f"{device.name}, SM {device.compute_capability}, {device.memory_bytes / 2**30:.1f} GiB, driver for "
                              f"CUDA {device.driver}")


def _disk() -> Check:
    free = shutil.disk_usage(Path.cwd()).free
    return Check("disk", free >= _FREE_BYTES, f"{free / 2**30:.1f} GiB free in {Path.cwd()}",
                 "a bundle needs about 1.5 times the checkpoint's size")


def _targets(have: dict[str, bool], kernels: tuple[int, ...], device: Device | None) -> list[Check]:
    """Which targets' engines this machine can build, and which it can run."""
    buildable, elsewhere, runnable = [], [], []
    for name in list_targets():
        target = load_target(name)
        here = device is not None and device.compute_capability in target.compute_capabilities
        compiled = set(target.compute_capabilities) <= set(kernels)
        can_build = compiled and have[target.engine.runtime] and (target.engine.build == "host-aot" or here)
        (buildable if can_build else elsewhere).append(name)
        if here and have[target.engine.runtime]:
            runnable.append(name)
    return [
        Check("can build for", bool(buildable), ", ".join(buildable) or "no target",
              "" if buildable else f"{INSTALL['tensorrt_rtx']}, and 'pip install .' for the plugin library"),
        Check("must build elsewhere", True, ", ".join(elsewhere) or "no target"),
        Check("can run engines of", bool(runnable), ", ".join(runnable) or "no target",
              "" if runnable else "ONNX Runtime runs every bundle: ecmfq-export run"),
    ]
