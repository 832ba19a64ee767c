"""Build backend of `pip install .`: scikit-build-core, plus a CUDA compiler from PyPI on a machine that has none.

The compiler's packages are about 110 MB, so they become build requirements only where no nvcc is found.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scikit_build_core import build as _build
from scikit_build_core.build import (  # noqa: F401  (hooks of PEP 517 and 660 that need nothing of ours)
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

# One minor version for all of them: cicc (nvvm), ptxas (nvcc) and the headers (crt, cccl, runtime) belong together.
_COMPILER = [f"{name}>=13.0.48,<13.1" for name in ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm",
                                                    "nvidia-cuda-runtime", "nvidia-cuda-cccl")]


# Kept from one install to the next, because pip throws the build environment away and scikit-build-core then clears CMake's cache:
# the compiler, and the compiled library under a hash of everything that it was made from. So a second `pip install .` of the
# same tree neither downloads a compiler nor compiles a kernel.
_KEPT = Path("build") / "cuda-compiler"
_LIBRARIES = Path("build") / "plugin-library"
_IN_WHEEL = "ecmfq_export/_lib/libecmfq_plugin.so"


def _installed_nvcc() -> Path | None:
    """nvcc of a CUDA toolkit on this machine (CUDACXX, CUDA_HOME, CUDA_PATH, PATH, the usual folder), or the kept one."""
    places = [os.environ.get("CUDACXX")]
    places += [str(Path(root) / "bin" / "nvcc") for root in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")) if root]
    places += [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc", str(_KEPT.resolve() / "bin" / "nvcc")]
    return next((Path(place) for place in places if place and Path(place).is_file()), None)


def _packaged_nvcc() -> Path | None:
    """nvcc of the nvidia-cuda-nvcc package in the build environment, moved to where it can be kept."""
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        source = Path(folder) / "cu13"
        if not (source / "bin" / "nvcc").is_file():
            continue
        partial = _KEPT.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(source, partial, copy_function=_link_or_copy)
        (partial / "lib64").symlink_to("lib")  # nvcc.profile of 13.0 looks there
        partial.rename(_KEPT)
        return _KEPT.resolve() / "bin" / "nvcc"
    return None


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


def _use_compiler() -> None:
    nvcc = _installed_nvcc() or _packaged_nvcc()
    if nvcc is None:
        raise SystemExit("no CUDA compiler: neither nvcc on this machine nor PyPI's nvidia-cuda-nvcc in the build environment.\n"
                         "  fix: let pip isolate the build, or: pip install " + " ".join(f"'{p}'" for p in _COMPILER))
    os.environ["CUDACXX"] = str(nvcc)


def _kept_library(config_settings: Any) -> Path:
    """Where the library of these sources, settings and this compiler is kept."""
    digest = hashlib.sha256()
    for path in sorted(path for path in Path("plugins").rglob("*") if path.is_file() and not {"__pycache__", "host"} & set(path.parts)):
        digest.update(f"{path}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    version = subprocess.run([os.environ["CUDACXX"], "--version"], capture_output=True, text=True, check=True).stdout
    digest.update(json.dumps([version, platform.machine(), config_settings], sort_keys=True, default=str).encode())
    return _LIBRARIES / digest.hexdigest()[:20] / Path(_IN_WHEEL).name


def _given_library(config_settings: Any) -> str:
    """A compiled library that the user names (one that a bundle carries): then nothing is compiled."""
    return str((config_settings or {}).get("cmake.define.ECMFQ_LIBRARY", ""))


def _build_with(hook: Callable[[Any], str], directory: str, config_settings: Any) -> str:
    """Run a hook of scikit-build-core with the kept library, or keep the one that it compiles."""
    given = _given_library(config_settings)
    if given:
        if not Path(given).is_file():
            raise SystemExit(f"no plugin library at {given}")
        return hook({**config_settings, "cmake.define.ECMFQ_LIBRARY": str(Path(given).resolve())})
    _use_compiler()
    kept = _kept_library(config_settings)
    if kept.is_file():
        print(f"plugin library: {kept} is up to date")
        return hook({**(config_settings or {}), "cmake.define.ECMFQ_LIBRARY": str(kept.resolve())})
    name = hook(config_settings)
    kept.parent.mkdir(parents=True, exist_ok=True)
    partial = kept.with_suffix(".partial")
    with zipfile.ZipFile(Path(directory) / name) as wheel:
        partial.write_bytes(wheel.read(_IN_WHEEL))
    partial.chmod(0o755)
    partial.rename(kept)
    return name


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    requires = _build.get_requires_for_build_wheel(config_settings)
    return requires + ([] if _installed_nvcc() or _given_library(config_settings) else _COMPILER)


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    requires = _build.get_requires_for_build_editable(config_settings)
    return requires + ([] if _installed_nvcc() or _given_library(config_settings) else _COMPILER)


def build_wheel(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    return _build_with(lambda settings: _build.build_wheel(wheel_directory, settings, metadata_directory), wheel_directory,
                       config_settings)


def build_editable(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    return _build_with(lambda settings: _build.build_editable(wheel_directory, settings, metadata_directory), wheel_directory,
                       config_settings)
