"""The plugin's host code under the address and undefined-behaviour sanitizers, driven as TensorRT would drive it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

PLUGINS = Path(__file__).resolve().parents[2] / "plugins"
HOST = Path(__file__).resolve().parent / "host"
# Needs CUDA's headers; the stub has its one function.
WITH_CUDA = {"device_facts.cpp", "abi_conformance.cpp"}


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler on this machine (apt install g++)")
    program = tmp_path_factory.mktemp("host") / "plugin_host"
    sources = [HOST / "plugin_host.cpp", HOST / "ecmfq_stub.cpp"]
    sources += [path for path in sorted((PLUGINS / "trt").glob("*.cpp")) if path.name not in WITH_CUDA]
    command = [compiler, "-std=c++17", "-g1", "-O0", "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined",
               "-fno-sanitize-recover=all", *map(str, sources), "-o", str(program), "-ldl"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return program


def _run(host: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(host), *arguments], capture_output=True, text=True, errors="replace", check=False, timeout=300)


def test_fields_survive_serialization(host: Path) -> None:
    """Two group modes, two layouts: write, read, clone; one changed value under the old checksum is refused."""
    result = _run(host, "roundtrip")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr.count("the engine's fields are damaged") == 4


def test_interfaces(host: Path) -> None:
    result = _run(host, "run")
    assert result.returncode == 0, result.stdout + result.stderr


def test_ten_thousand_damaged_fields(host: Path) -> None:
    """No mutation crashes the plugin, reads outside a buffer, or makes an engine run with sizes other than its own."""
    result = _run(host, "fuzz", "20261123", "10000")
    assert result.returncode == 0, result.stdout + result.stderr[-4000:]
    assert result.stdout.startswith("10000 mutations")
    accepted = int(result.stdout.split(",")[1].split()[0])
    assert accepted < 1000, "most damage must be noticed"
    assert "ERROR" not in result.stderr and "runtime error" not in result.stderr


def test_layers_of_the_sources() -> None:
    """trt/ holds no kernel, capi/ and src/ see no TensorRT, include/ sees CUDA alone."""
    for path in PLUGINS.rglob("*.[ch]*"):
        text = path.read_text(encoding="utf-8")
        folder = path.relative_to(PLUGINS).parts[0]
        includes = [line.split()[1] for line in text.splitlines() if line.startswith("#include")]
        if folder == "trt":
            assert "__global__" not in text.replace("`__global__`", ""), path
        else:
            assert not any("NvInfer" in name or "trt_abi" in name for name in includes), path
