"""Finding, reading and checking the plugin library, and the alias that the RTX parser needs."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ecmfq_export import compiled_library
from ecmfq_export.engine import plugin_library
from ecmfq_export.engine.plugin_library import check_plugin_library, find_plugin_library, read_plugin_library
from ecmfq_export.engine.soname_shim import alias_object
from ecmfq_export.errors import BuildError


def test_library_has_kernels_and_no_foreign_dependency(library: Path) -> None:
    facts = check_plugin_library(library)
    assert facts.platform == f"linux-{platform.machine()}"
    assert facts.compute_capabilities and set(facts.compute_capabilities) <= {80, 86, 87, 89, 90, 100, 110, 120, 121}
    if shutil.which("ldd"):
        needed = subprocess.run(["ldd", str(library)], capture_output=True, text=True, check=True).stdout
        assert "libcudart" not in needed and "libnvinfer" not in needed and "libstdc++" not in needed


def test_hash_is_checked(library: Path) -> None:
    check_plugin_library(library, read_plugin_library(library).sha256)
    with pytest.raises(BuildError, match="the manifest says 00"):
        check_plugin_library(library, "00" * 32)


def test_library_of_another_platform(library: Path, tmp_path: Path) -> None:
    data = bytearray(library.read_bytes())
    data[18:20] = (183 if platform.machine() == "x86_64" else 62).to_bytes(2, "little")
    (tmp_path / "other.so").write_bytes(data)
    with pytest.raises(BuildError, match="this machine is linux-"):
        check_plugin_library(tmp_path / "other.so")


def test_library_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "libother.so").write_bytes(alias_object("libother.so", "libc.so.6", platform.machine()))
    with pytest.raises(BuildError, match="cannot be loaded as a plugin library"):
        check_plugin_library(tmp_path / "libother.so")


def test_no_library_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_library.ecmfq_export, "__path__", [str(tmp_path / "ecmfq_export")])
    monkeypatch.setattr(compiled_library.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(BuildError, match="neither in"):
        find_plugin_library()
    newest = tmp_path / "build" / "plugins" / plugin_library.LIBRARY_NAME
    newest.parent.mkdir(parents=True)
    newest.write_bytes(b"x")
    assert find_plugin_library() == newest


def test_alias_is_found_by_its_name_and_leads_to_the_needed_library(tmp_path: Path) -> None:
    """In a fresh process: after loading the alias, dlopen of the name that no file has gives libc's symbols."""
    (tmp_path / "alias").write_bytes(alias_object("libecmfq_no_such_name.so", "libz.so.1", platform.machine()))
    script = ("import ctypes, sys; ctypes.CDLL(sys.argv[1]); z = ctypes.CDLL('libecmfq_no_such_name.so'); "
              "z.zlibVersion.restype = ctypes.c_char_p; print(z.zlibVersion().decode())")
    result = subprocess.run([sys.executable, "-c", script, str(tmp_path / "alias")], capture_output=True, text=True, check=False)
    if "libz.so.1" in result.stderr:
        pytest.skip("no libz.so.1 on this machine")
    assert result.returncode == 0 and result.stdout.startswith("1."), result.stderr


def test_alias_for_an_unknown_machine() -> None:
    with pytest.raises(BuildError, match="riscv64"):
        alias_object("a.so", "b.so", "riscv64")


@pytest.mark.tensorrt
def test_parsing_a_plugin_node_aborts_without_the_alias(library: Path, tmp_path: Path) -> None:
    """Why the alias exists: the day this fails, TensorRT-RTX has stopped needing it and it can go."""
    pytest.importorskip("tensorrt_rtx")
    from tests.engine.small_graphs import decoder

    graph = decoder(tmp_path / "model.onnx", layers=1)
    script = (
        "import sys, tensorrt_rtx as trt\n"
        "if sys.argv[3] == 'alias':\n"
        "    from ecmfq_export.engine.soname_shim import provide_unversioned_name\n"
        "    provide_unversioned_name(); provide_unversioned_name()\n"
        "logger = trt.Logger(trt.Logger.ERROR)\n"
        "builder = trt.Builder(logger); builder.get_plugin_registry().load_library(sys.argv[2])\n"
        "network = builder.create_network(0)\n"
        "print(trt.OnnxParser(network, logger).parse_from_file(sys.argv[1]), flush=True)\n"
    )
    command = [sys.executable, "-c", script, str(graph), str(library)]
    with_alias = subprocess.run([*command, "alias"], capture_output=True, text=True, check=False)
    assert with_alias.returncode == 0 and with_alias.stdout.strip() == "True", with_alias.stderr
    without = subprocess.run([*command, "none"], capture_output=True, text=True, check=False)
    assert without.returncode < 0
