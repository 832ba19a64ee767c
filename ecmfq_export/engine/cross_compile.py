"""The plugin library for a device of another platform (Jetson, DGX Spark), compiled on this machine and kept.

Needs Debian's cross compiler, CMake and Ninja; NVIDIA's runtime for the device (and nvcc, where this machine has none) comes from
PyPI. What is missing is said by name with the line that installs it: a bundle is never made without a library it should have.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ecmfq_export.engine import cuda_packages
from ecmfq_export.engine.plugin_library import (
    LIBRARY_NAME,
    PluginLibrary,
    check_plugin_library,
    find_plugin_library,
    host_platform,
    read_plugin_library,
)
from ecmfq_export.errors import BuildError
from ecmfq_export.target import Target, list_targets, load_target

_PACKAGE = Path(__file__).resolve().parents[1]
_SOURCES = (_PACKAGE / "plugins", _PACKAGE.parent / "plugins")  # of an installed package; of a source tree
_CROSS = {"linux-aarch64": ("aarch64-linux-gnu-g++", "aarch64.cmake", ("aarch64-linux", "sbsa-linux"))}
_OLDEST_GCC, _NEWEST_GCC = 9, {12: 13, 13: 15}  # versions of g++ that nvcc of a major version takes


@dataclass(frozen=True)
class Tool:
    """A program that cross compiling needs: its name, where it is (empty: nowhere), what it is for, and what installs it."""

    name: str
    path: str
    purpose: str
    install: str


def library_for(target: Target, note: Callable[[str], None] = lambda _: None) -> PluginLibrary:
    """The library that `target`'s device loads: this installation's own where the platform is the same, else a cross-compiled one.

    Args:
        note: told when a compilation starts; it takes half a minute.

    Raises:
        BuildError: a tool is missing (each by name), the compilation failed, or the library has no kernels for the target.
    """
    if target.platform == host_platform():
        library = check_plugin_library(find_plugin_library())
    else:
        library = cross_compile(target.platform, target.compute_capabilities, note)
    require_kernels(library, target)
    return library


def require_kernels(library: PluginLibrary, target: Target) -> None:
    """Refuse a library without machine code for one of the target's SM versions.

    Raises:
        BuildError: with the versions it has.
    """
    missing = [sm for sm in target.compute_capabilities if sm not in library.compute_capabilities]
    if missing:
        raise BuildError(f"{library.path} has kernels for SM {', '.join(map(str, library.compute_capabilities)) or 'none'}, target "
                         f"'{target.name}' needs {', '.join(map(str, missing))}",
                         f"pip install . -C cmake.define.ECMFQ_CUDA_ARCHS={','.join(map(str, target.compute_capabilities))}")


def cross_tools(platform: str) -> list[Tool]:
    """The programs that compiling for `platform` needs on this machine.

    Raises:
        BuildError: nothing here compiles for that platform.
    """
    if platform not in _CROSS:
        raise BuildError(f"a plugin library for {platform} cannot be compiled on {host_platform()}",
                         f"make the bundle on a {platform} machine, or pass --no-build")
    compiler = _CROSS[platform][0]
    debian = compiler.removesuffix("-g++")
    found = next((path for name in _compiler_names(compiler) if (path := shutil.which(name))), "")
    return [
        Tool(compiler, found, f"compiles the plugin's host code for {platform}", f"apt-get install g++-{debian}"),
        Tool("cmake", _program("cmake"), "drives the compilation", "pip install 'cmake>=3.22'"),
        Tool("ninja", _program("ninja"), "drives the compilation", "pip install ninja"),
    ]


def plugin_sources() -> Path:
    """The folder ``plugins`` of the source tree, or its copy in an installed package.

    Raises:
        BuildError: neither is there.
    """
    for folder in _SOURCES:
        if (folder / "CMakeLists.txt").is_file():
            return folder
    raise BuildError(f"the plugin's sources are neither in {_SOURCES[0]} nor in {_SOURCES[1]}", "install ecmfq-export again")


def source_files(folder: Path) -> list[Path]:
    """What the library is compiled from, in the order of names. (``host`` is another library, for the machine that quantizes.)"""
    return sorted(path for path in folder.rglob("*")
                  if path.suffix in (".cu", ".cuh", ".cpp", ".h", ".cmake", ".txt") and path.relative_to(folder).parts[0] != "host")


def cross_compile(platform: str, compute_capabilities: tuple[int, ...], note: Callable[[str], None] = lambda _: None) -> PluginLibrary:
    """Compile the library for `platform`, with kernels for `compute_capabilities` and for every bundled target of that platform.

    It is kept under a hash of sources, compilers and SM versions, so a second call compiles nothing.

    Raises:
        BuildError: see :func:`library_for`.
    """
    tools = cross_tools(platform)
    missing = [tool for tool in tools if not tool.path]
    if missing:
        raise BuildError(f"the plugin library for {platform} cannot be compiled here; missing: "
                         + "; ".join(f"{tool.name} ({tool.purpose})" for tool in missing),
                         "; ".join(dict.fromkeys(tool.install for tool in missing))
                         + "; or pass --no-build, for a bundle without engines and without a plugin library")
    cxx, cmake, ninja = (tool.path for tool in tools)
    compiler = _inspect_nvcc(_nvcc())
    _check_host_compiler(cxx, compiler.cuda)
    wanted = _wanted_archs(platform, compute_capabilities, compiler)
    sources = plugin_sources()
    digest = hashlib.sha256("\0".join([platform, compiler.cuda, _version(cxx), ",".join(map(str, wanted))]).encode())
    for path in source_files(sources):
        digest.update(f"{path.relative_to(sources)}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    folder = cuda_packages.cache_folder() / "plugin-library" / digest.hexdigest()[:20]
    kept = folder / LIBRARY_NAME
    runtime = _runtime(compiler, platform)
    with cuda_packages.exclusively(folder):
        if not kept.is_file():
            note(f"compiling the plugin library for {platform}, SM {' '.join(map(str, wanted))}: half a minute, kept in {folder}")
            with tempfile.TemporaryDirectory() as work:
                settings = {"CMAKE_TOOLCHAIN_FILE": sources / _CROSS[platform][1], "CMAKE_CXX_COMPILER": cxx,
                            "CMAKE_MAKE_PROGRAM": ninja, "CMAKE_CUDA_COMPILER": compiler.nvcc, "ECMFQ_CUDA_INCLUDE": compiler.include,
                            "ECMFQ_CUDA_LIB": runtime, "ECMFQ_CUDA_ARCHS": ";".join(map(str, wanted)), "TENSORRT_INCLUDE_DIR": ""}
                _run([cmake, "-S", str(sources), "-B", work, "-G", "Ninja", *(f"-D{key}={value}" for key, value in settings.items())])
                _run([cmake, "--build", work])
                built = read_plugin_library(Path(work) / LIBRARY_NAME)
                if built.platform != platform or set(built.compute_capabilities) != set(wanted):
                    raise BuildError(f"the compiled library is for {built.platform}, SM {list(built.compute_capabilities)}; wanted: "
                                     f"{platform}, SM {list(wanted)}", f"{cxx} is no compiler for {platform}")
                shutil.copyfile(built.path, kept.with_suffix(".partial"))
                kept.with_suffix(".partial").rename(kept)
    return read_plugin_library(kept)


def _program(name: str) -> str:
    """On PATH, or beside this Python: `pip install cmake` puts it there, and not every venv that is used is activated."""
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent)) or ""


def _compiler_names(plain: str) -> list[str]:
    """The distribution's default first, then named versions: a default may be too new for an older CUDA."""
    own = os.environ.get("ECMFQ_CROSS_CXX")
    return [own] if own else [plain, *(f"{plain}-{version}" for version in range(15, 8, -1))]


def _nvcc() -> str:
    """nvcc of this machine, of a source tree's build, or of PyPI."""
    places = [os.environ.get("CUDACXX")]
    places += [str(Path(root) / "bin" / "nvcc") for root in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")) if root]
    kept = _PACKAGE.parent / "build" / "cuda-compiler" / "bin" / "nvcc"  # plugins/pip_backend.py keeps it there
    places += [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc", str(kept)]
    found = next((place for place in places if place and Path(place).is_file()), None)
    return found or str(cuda_packages.fetch_compiler(host_platform()) / "bin" / "nvcc")


@dataclass(frozen=True)
class _Compiler:
    """An nvcc: its version (``13.0``), its toolkit's folder, the folder of its headers, the SM versions that it compiles for."""

    nvcc: str
    cuda: str
    top: Path
    include: Path
    able: frozenset[int]


def _inspect_nvcc(nvcc: str) -> _Compiler:
    release = re.search(r"release (\d+\.\d+)", _run([nvcc, "--version"]))
    # nvcc itself says where its toolkit lies; the one on PATH may be a script or a link.
    top = re.search(r"^#\$ TOP=(.+)$", _run([nvcc, "--dryrun", "-x", "cu", os.devnull]), re.MULTILINE)
    root = Path(top[1]).resolve() if top else Path("/usr")
    folders = [root / "include", root / "targets" / f"{host_platform().removeprefix('linux-')}-linux" / "include", Path("/usr/include")]
    include = next((folder for folder in folders if (folder / "cuda_runtime.h").is_file()), None)
    if release is None or include is None:
        raise BuildError(f"{nvcc} does not say its version, or has no headers beside it", "let CUDACXX name nvcc of a whole CUDA toolkit")
    able = frozenset(int(sm) for sm in re.findall(r"sm_(\d+)\b", _run([nvcc, "--list-gpu-code"])))
    return _Compiler(nvcc, release[1], root, include, able)


def _runtime(compiler: _Compiler, platform: str) -> Path:
    """The folder of the device's ``libcudart_static.a``: in the toolkit (NVIDIA's cross packages), or from PyPI."""
    for name in _CROSS[platform][2]:
        folder = compiler.top / "targets" / name / "lib"
        if (folder / "libcudart_static.a").is_file():
            return folder
    return cuda_packages.fetch_runtime(compiler.cuda, platform)


def _check_host_compiler(cxx: str, cuda: str) -> None:
    version, newest = int(_version(cxx).split(".")[0]), _NEWEST_GCC.get(int(cuda.split(".")[0]))
    if newest is not None and not _OLDEST_GCC <= version <= newest:
        raise BuildError(f"{cxx} is version {version}, nvcc {cuda} takes {_OLDEST_GCC} to {newest}",
                         f"apt-get install g++-{newest}-aarch64-linux-gnu, and let ECMFQ_CROSS_CXX name it")


def _wanted_archs(platform: str, own: tuple[int, ...], compiler: _Compiler) -> list[int]:
    lacking = sorted(set(own) - compiler.able)
    if lacking:
        raise BuildError(f"{compiler.nvcc} cannot compile for SM {', '.join(map(str, lacking))}, only for {sorted(compiler.able)}",
                         "let CUDACXX name nvcc of a CUDA that knows them (13.0 knows all)")
    bundled = (load_target(name) for name in list_targets())
    of_platform = {sm for target in bundled if target.platform == platform for sm in target.compute_capabilities}
    return sorted(set(own) | of_platform & compiler.able)


def _version(cxx: str) -> str:
    return _run([cxx, "-dumpfullversion"]).strip()


def _run(command: list[str]) -> str:
    """Both streams of a program, one after the other; nvcc's dry run speaks on the second.

    Raises:
        BuildError: it failed; with its error lines.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run: {error}", "repair or reinstall it") from error
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines()
        errors = [line.strip() for line in lines if re.search(r"\b(error|fatal)\b", line, re.IGNORECASE)] or lines[-3:]
        raise BuildError(f"'{' '.join(map(str, command[:3]))} ...' failed: {' | '.join(errors[:4])}",
                         "the message is the compiler's; run the command to see all of it: " + " ".join(command))
    return done.stdout + done.stderr
