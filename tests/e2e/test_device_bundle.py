"""Exporting for a device of another platform that builds its own engines, by the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ecmfq_export import bundle
from ecmfq_export.cli import main
from ecmfq_export.engine.plugin_library import read_plugin_library
from tests import aarch64
from tests.e2e.conftest import command_line
from tests.tiny_models import make_qwen3_vl_moe


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen3_vl_moe(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    aarch64.require_tools()
    output = tmp_path_factory.mktemp("out") / "bundle"
    done = command_line("export", str(checkpoint), "--method", "rtn", "--target", "jetson-orin", "-o", str(output))
    assert done.returncode == 0, done.stderr + done.stdout
    assert "built on the device" in done.stderr and "memory: " in done.stderr and "plugin-src" in done.stderr
    return output


def test_the_bundle_carries_the_library_for_the_device(exported: Path) -> None:
    manifest = bundle.read_manifest(exported, "bundle")
    bundle.verify(exported, manifest)
    folder = exported / "engines" / "jetson-orin"
    assert {f"engines/jetson-orin/{name}" for name in ("libecmfq_plugin.so", "build.sh", "README.txt", "plugin-src/CMakeLists.txt",
                                                       "manifest.json")} <= set(manifest.files)
    said = bundle.read_manifest(folder, "device").info["plugin_library"]
    library = read_plugin_library(folder / "libecmfq_plugin.so")
    assert said["platform"] == library.platform == "linux-aarch64"
    assert 87 in library.compute_capabilities and tuple(said["compute_capabilities"]) == library.compute_capabilities
    assert said["sha256"] == library.sha256 == manifest.files["engines/jetson-orin/libecmfq_plugin.so"]


def test_trtexec_lines_are_those_of_the_script(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", str(exported), "--target", "jetson-orin", "--trtexec"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("trtexec ")]
    script = (exported / "engines" / "jetson-orin" / "build.sh").read_text()
    assert len(lines) == 2 and "--dynamicPlugins=./libecmfq_plugin.so" in lines[0]
    said = script.replace('"--dynamicPlugins=$PLUGIN"', "--dynamicPlugins=./libecmfq_plugin.so")  # or one compiled on the device
    assert all(line.removeprefix("trtexec ") in said for line in lines)


def test_running_engines_that_are_not_built_yet(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(exported), "--prompt", "x", "--target", "jetson-orin"]) == 2
    assert "no engine at" in capsys.readouterr().err


@pytest.mark.skipif(os.uname().machine == "aarch64", reason="nothing is cross-compiled on this machine")
def test_missing_tools_are_named_before_any_work(checkpoint: Path, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PATH": str(tmp_path)}
    command = [sys.executable, "-m", "ecmfq_export.cli", "export", str(checkpoint), "--method", "rtn", "--target", "jetson-orin", "-o"]
    done = subprocess.run([*command, str(tmp_path / "bundle")], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2, done.stderr
    assert "aarch64-linux-gnu-g++" in done.stderr and "apt-get install g++-aarch64-linux-gnu" in done.stderr and "--no-build" in done.stderr
    assert not (tmp_path / "bundle").exists()


def test_doctor_lists_the_cross_compiler(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    names = {check["name"] for check in json.loads(capsys.readouterr().out)}
    assert os.uname().machine == "aarch64" or {"aarch64-linux-gnu-g++", "cmake", "ninja"} <= names
