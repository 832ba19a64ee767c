"""The library for linux-aarch64: what its file says, and its host side run under qemu-user against this machine's own library."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from ecmfq_export.engine.cross_compile import cross_tools
from ecmfq_export.engine.plugin_library import PluginLibrary, find_plugin_library
from ecmfq_export.quant.kernel_layout import prepack_mma_s8
from tests import aarch64

PLUGINS = Path(__file__).resolve().parents[2] / "plugins"
EMULATION = Path(__file__).resolve().parents[1] / "kernels" / "emulation"
HOST = Path(__file__).resolve().parent / "host"
FLAGS = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-DECMFQ_EMULATION",
         *(f"-I{folder}" for folder in (PLUGINS / "include", PLUGINS / "capi", EMULATION, EMULATION / "cuda_on_host"))]


@pytest.fixture(scope="module")
def cross() -> PluginLibrary:
    return aarch64.library()


def _compile(compiler: str, out: Path, *arguments: str) -> Path:
    done = subprocess.run([compiler, *FLAGS, *arguments, "-o", str(out), "-ldl"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out


def _cross_cxx() -> str:
    aarch64.require_tools()
    return cross_tools(aarch64.PLATFORM)[0].path


def _lines(*command: str | Path, with_messages: bool = False) -> list[str]:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, errors="replace", check=False, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout.splitlines() + (done.stderr.splitlines() if with_messages else [])


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _compile(_cross_cxx(), tmp_path_factory.mktemp("probe") / "aarch64", str(HOST / "library_probe.cpp"))


@pytest.fixture(scope="module")
def own_probe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ on this machine")
    return _compile(compiler, tmp_path_factory.mktemp("probe") / "own", str(HOST / "library_probe.cpp"))


def test_architecture_and_kernels(cross: PluginLibrary) -> None:
    assert cross.platform == "linux-aarch64"
    assert cross.compute_capabilities == (87, 110, 121), "every bundled target of that platform"
    assert cross.cuda.split(".")[0] >= "13"
    assert tuple(map(int, cross.glibc.split("."))) <= (2, 35), "JetPack 6 is Ubuntu 22.04"


def test_binutils_say_the_same(cross: PluginLibrary) -> None:
    """readelf, as a second witness: the machine, a fat binary, and nothing needed but the C library."""
    readelf = shutil.which("aarch64-linux-gnu-readelf") or shutil.which("readelf")
    if readelf is None:
        pytest.skip("no readelf on this machine")
    text = "\n".join(_lines(readelf, "-W", "--file-header", "--dynamic", "--section-headers", cross.path))
    assert "AArch64" in text and "DYN (Shared object file)" in text and ".nv_fatbin" in text
    needed = [line.split("[")[1].rstrip("]") for line in text.splitlines() if "(NEEDED)" in line]
    assert set(needed) <= {"libc.so.6", "ld-linux-aarch64.so.1", "libm.so.6"}


def test_file_names_the_architecture(cross: PluginLibrary) -> None:
    if shutil.which("file") is None:
        pytest.skip("no file(1) on this machine")
    [line] = _lines("file", "--brief", cross.path)
    assert "ELF 64-bit LSB shared object, ARM aarch64" in line


def test_cuobjdump_lists_the_same_kernels(cross: PluginLibrary) -> None:
    """CUDA's own reader, where the toolkit is: one set of machine code for each compute capability."""
    if shutil.which("cuobjdump") is None:
        pytest.skip("no cuobjdump on this machine")
    found = {int(sm) for line in _lines("cuobjdump", "--list-elf", cross.path) for sm in re.findall(r"\bsm_(\d+)", line)}
    assert tuple(sorted(found)) == cross.compute_capabilities


def test_host_side_answers_as_on_this_machine(cross: PluginLibrary, probe: Path, own_probe: Path) -> None:
    """The C ABI's checks, workspace sizes and sentences, creators, fields and their checksum, refusals, shape checks: line by line."""
    there = _lines(*aarch64.emulator(), probe, cross.path, with_messages=True)
    here = _lines(own_probe, find_plugin_library(), with_messages=True)
    assert len(here) > 700 and any("configure 0, workspace" in line for line in here)
    assert sum(line.endswith("refused") for line in here) == 7
    assert sum("node 'probe/moe': attribute" in line for line in here) == 7, "each refusal with its sentence"
    assert there == here


def test_packing_is_python_s(probe: Path) -> None:
    """The kernels' index math, compiled for aarch64 (where a plain char has no sign), against its definition."""
    lines = _lines(*aarch64.emulator(), probe)
    seen = 0
    for line in lines:
        head, _, values = line.partition(":")
        if head.startswith("canonical"):
            gate_up, rows, cols = map(int, head.split()[1:])
            weights = np.random.default_rng(rows).integers(-128, 128, (1, rows, cols // 2)).astype(np.int8)
            canonical = np.array(values.split(), np.int64)
            assert np.array_equal(weights.reshape(-1)[canonical], prepack_mma_s8(weights, bool(gate_up)).reshape(-1))
            seen += 1
        elif head == "words":
            for item in values.split():
                word, even, odd = map(int, item.split("/"))
                nibbles = [(word >> 4 * i & 15) - 16 * (word >> 4 * i + 3 & 1) for i in range(8)]
                assert np.array([even, odd], np.uint32).view(np.int8).tolist() == [16 * n for n in nibbles[0::2] + nibbles[1::2]]
                seen += 1
    assert seen == 6 + 64


def test_damaged_fields(cross: PluginLibrary, tmp_path: Path) -> None:
    """The real library under qemu, driven as TensorRT would: fields survive serialization, damaged ones are refused."""
    program = _compile(_cross_cxx(), tmp_path / "host", str(HOST / "plugin_host.cpp"), f"-L{cross.path.parent}", "-lecmfq_plugin",
                       f"-Wl,-rpath,{cross.path.parent}")
    assert _lines(*aarch64.emulator(), program, "roundtrip") == ["round trip holds"]
    (summary,) = _lines(*aarch64.emulator(), program, "fuzz", "20261126", "2000")
    assert summary.startswith("2000 mutations")
    assert int(summary.split(",")[1].split()[0]) < 200, "most damage must be noticed"
