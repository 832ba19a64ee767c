"""Build backend of `pip install .`: scikit-build-core, plus a CUDA compiler from PyPI on a machine that has none.

The compiler's packages are about 110 MB, so they become build requirements only where no nvcc is found.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
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


# Kept from one install to the next: a build environment is thrown away, and with it the paths in CMake's cache and in ninja's
# dependencies. So the second `pip install .` of a tree neither downloads the compiler nor compiles a kernel again.
_KEPT = Path("build") / "cuda-compiler"


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


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    requires = _build.get_requires_for_build_wheel(config_settings)
    return requires + ([] if _installed_nvcc() else _COMPILER)


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    requires = _build.get_requires_for_build_editable(config_settings)
    return requires + ([] if _installed_nvcc() else _COMPILER)


def build_wheel(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    _use_compiler()
    return _build.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    _use_compiler()
    return _build.build_editable(wheel_directory, config_settings, metadata_directory)
