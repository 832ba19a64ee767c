"""What cross compiling says when something is missing or does not fit; the compiled library itself is in tests/plugins/test_aarch64.py."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from ecmfq_export.engine import cross_compile, cuda_packages
from ecmfq_export.engine.build import check_driver
from ecmfq_export.engine.cross_compile import library_for, require_kernels
from ecmfq_export.engine.device import Device
from ecmfq_export.engine.doctor import collect
from ecmfq_export.engine.plugin_library import PluginLibrary, host_platform, read_plugin_library
from ecmfq_export.errors import BuildError
from ecmfq_export.target import load_target
from tests import aarch64

needs_other_host = pytest.mark.skipif(host_platform() == aarch64.PLATFORM, reason="this machine is an aarch64 one")


@needs_other_host
def test_missing_tools_are_named_with_their_install_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_compile.shutil, "which", lambda name, path=None: "/usr/bin/cmake" if name == "cmake" else None)
    with pytest.raises(BuildError) as caught:
        library_for(load_target("jetson-orin"))
    assert "missing: aarch64-linux-gnu-g++ (compiles the plugin's host code for linux-aarch64); ninja (drives" in caught.value.what
    assert "cmake (" not in caught.value.what
    assert caught.value.fix.startswith("apt-get install g++-aarch64-linux-gnu; pip install ninja; or pass --no-build")


@needs_other_host
def test_doctor_lists_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_compile.shutil, "which", lambda name, path=None: None)
    checks = {check.name: check for check in collect()}
    assert not checks["aarch64-linux-gnu-g++"].ok and checks["aarch64-linux-gnu-g++"].fix == "apt-get install g++-aarch64-linux-gnu"
    assert "jetson-orin" in checks["aarch64-linux-gnu-g++"].detail and "dgx-spark" in checks["aarch64-linux-gnu-g++"].detail
    assert {"cmake", "ninja"} <= set(checks)


def test_platform_that_nothing_compiles_for() -> None:
    with pytest.raises(BuildError, match=r"plugin library for linux-riscv64 cannot be compiled.*\n.*linux-riscv64 machine"):
        cross_compile.cross_tools("linux-riscv64")


def test_cuda_12_has_no_static_runtime_on_pypi() -> None:
    with pytest.raises(BuildError, match=r"no static CUDA 12\.6 runtime for linux-aarch64\n.*cuda-cross-aarch64"):
        cuda_packages.fetch_runtime("12.6", "linux-aarch64")


def test_packages_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ECMFQ_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(BuildError, match=r"nvidia-cuda-runtime==13\.0\.\* for linux-aarch64 cannot be fetched") as caught:
        cuda_packages.fetch_runtime("13.0", "linux-aarch64")
    assert "'nvidia-cuda-runtime==13.0.*'" in caught.value.fix
    assert not [path for path in tmp_path.iterdir() if path.is_dir()], "nothing half-made is left"


def test_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("ECMFQ_CACHE", str(tmp_path / "file"))
    with pytest.raises(BuildError, match="cannot be written.*\n.*ECMFQ_CACHE"):
        cuda_packages.fetch_runtime("13.0", "linux-aarch64")


@pytest.mark.parametrize(("gcc", "cuda", "fits"), [("12.2.0", "12.6", True), ("14.1.0", "12.6", False), ("14.1.0", "13.0", True),
                                                   ("8.3.0", "13.0", False), ("16.0.0", "13.0", False)])
def test_compilers_that_nvcc_does_not_take(monkeypatch: pytest.MonkeyPatch, gcc: str, cuda: str, fits: bool) -> None:
    monkeypatch.setattr(cross_compile, "_version", lambda cxx: gcc)
    if fits:
        cross_compile._check_host_compiler("g++", cuda)
        return
    with pytest.raises(BuildError, match=rf"g\+\+ is version {gcc.split('.')[0]}, nvcc {cuda} takes 9 to \d+\n.*ECMFQ_CROSS_CXX"):
        cross_compile._check_host_compiler("g++", cuda)


def test_sm_that_the_compiler_does_not_know() -> None:
    compiler = cross_compile._Compiler("nvcc", "12.6", Path("/"), Path("/"), frozenset({80, 87, 90}))
    assert cross_compile._wanted_archs("linux-aarch64", (87,), compiler) == [87], "bundled targets it does not know are left out"
    with pytest.raises(BuildError, match=r"cannot compile for SM 110, only for \[80, 87, 90\]"):
        cross_compile._wanted_archs("linux-aarch64", (110,), compiler)


def _library(**changes: object) -> PluginLibrary:
    plain = PluginLibrary(Path("libecmfq_plugin.so"), "00", 1, "linux-aarch64", (87, 110), "13.0", "2.35")
    return dataclasses.replace(plain, **changes)


def test_kernels_of_the_target() -> None:
    require_kernels(_library(), load_target("jetson-thor"))
    with pytest.raises(BuildError, match=r"kernels for SM 87, 110, target 'dgx-spark' needs 121"):
        require_kernels(_library(), load_target("dgx-spark"))


def test_driver_that_is_too_old() -> None:
    """What JetPack 6 would meet with a library of CUDA 13: said before building, not by a kernel that does not load."""
    orin = Device("Orin", 87, 16, 1 << 36, "12.6")
    with pytest.raises(BuildError, match=r"compiled with CUDA 13\.0, the driver of Orin takes 12\.6\n.*ECMFQ_CUDA_ARCHS=87"):
        check_driver(_library(), orin)
    check_driver(_library(cuda="12.9"), orin)
    check_driver(_library(cuda=""), orin)
    check_driver(_library(), dataclasses.replace(orin, driver="13.2"))


def test_second_call_compiles_nothing() -> None:
    first = aarch64.library()
    notes: list[str] = []
    again = library_for(load_target("jetson-thor"), notes.append)
    assert again == first == read_plugin_library(first.path) and not notes
