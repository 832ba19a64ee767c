"""What a bundle gets for a device that builds its own engines: library, script, text; and the script really run, with a trtexec of ours."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from ecmfq_export import bundle
from ecmfq_export.engine import bundle_engines
from ecmfq_export.engine.bundle_engines import PREPARED, build_engines, engine_parts
from ecmfq_export.engine.cross_compile import plugin_sources
from ecmfq_export.engine.device import Device, current_device
from ecmfq_export.engine.device_kit import runs_on_oldest
from ecmfq_export.engine.engine_file import EngineInfo, PluginNode
from ecmfq_export.engine.plugin_library import PluginLibrary, find_plugin_library, host_platform, read_plugin_library
from ecmfq_export.engine.profiles import profile_shapes
from ecmfq_export.errors import BuildError
from ecmfq_export.progress import Silent
from ecmfq_export.target import Target, load_target
from tests import aarch64
from tests.engine.small_graphs import RANGES, decoder

pytestmark = pytest.mark.skipif(current_device() is not None, reason="this machine has a GPU: it might build")


@pytest.fixture(scope="module")
def onnx_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``onnx`` directory of a bundle, with a small decoder and a graph without plugin nodes in the tower's place."""
    directory = tmp_path_factory.mktemp("bundle") / "onnx"
    config = {"attention": "onnx24", "weight_layout": "mma_s8", "dtype": "float16"}
    with bundle.write_stage(directory, "onnx", config, {}) as (work, info):
        for name, moe in (("decoder", True), ("vision", False)):
            (work / name).mkdir()
            decoder(work / name / "model.onnx", layers=1, moe=moe)
        info.update(num_plugin_nodes=1, dim_ranges={name: list(values) for name, values in RANGES.items()})
    return directory


def _here(name: str) -> Target:
    """A bundled target whose devices are of this machine's platform, so that no cross compiler is needed."""
    return dataclasses.replace(load_target(name), platform=host_platform())


@pytest.fixture(scope="module")
def prepared(onnx_dir: Path) -> Path:
    return build_engines(onnx_dir, onnx_dir.parent / "engines" / "h100", _here("h100"), Silent())


def test_library_and_manifest(prepared: Path) -> None:
    manifest = bundle.read_manifest(prepared, PREPARED)
    bundle.verify(prepared, manifest)
    facts = manifest.info["plugin_library"]
    assert facts["platform"] == host_platform() and 90 in facts["compute_capabilities"]
    assert facts["sha256"] == bundle.sha256_file(prepared / "libecmfq_plugin.so") == bundle.sha256_file(find_plugin_library())
    assert manifest.info["memory"]["weights"] > 0
    text = (prepared / "README.txt").read_text()
    assert facts["sha256"] in text and "sh build.sh" in text and "10.15 to 11.x" in text


def test_script_builds_both_engines_with_the_profiles(prepared: Path, onnx_dir: Path, tmp_path: Path) -> None:
    """The script as it is, from another folder, with a program in trtexec's place that checks its files and makes an engine."""
    fake = tmp_path / "trtexec"
    fake.write_text('#!/bin/sh\nset -e\nfor a in "$@"; do case "$a" in\n  --onnx=*|--dynamicPlugins=*) test -f "${a#*=}" ;;\n'
                    '  --saveEngine=*) echo engine > "${a#*=}" ;;\nesac; done\nprintf "%s\\n" "$@" >> "$RECORD"\n')
    fake.chmod(0o755)
    record = tmp_path / "record"
    environment = {**os.environ, "TRTEXEC": str(fake), "RECORD": str(record)}
    subprocess.run(["sh", str(prepared / "build.sh")], check=True, env=environment, cwd=tmp_path, capture_output=True)
    calls = record.read_text().split("--onnx=")[1:]
    assert len(calls) == 2 and (prepared / "decoder.engine").is_file() and (prepared / "vision.engine").is_file()
    for call, part, plugin in zip(calls, ("decoder", "vision"), (True, False), strict=True):
        first, _, second = call.partition("--profile=1\n")  # of the decoder alone: one token a sequence
        options, decode = ({key: value for key, _, value in (line.lstrip("-").partition("=") for line in text.splitlines())}
                           for text in (first, second))
        assert options.get("dynamicPlugins") == ("./libecmfq_plugin.so" if plugin else None)
        assert options["timingCacheFile"] == "timing.cache"
        assert "--stronglyTyped" in call.splitlines() and "--skipInference" in call.splitlines()
        assert _shapes(options) == profile_shapes(onnx_dir / part / "model.onnx", RANGES)
        assert (part == "decoder") == ("profile" in options) == bool(decode)
        if decode:
            assert _shapes(decode) == profile_shapes(onnx_dir / part / "model.onnx", {**RANGES, "seq": (1, 1, 1)})
    for part in ("decoder", "vision"):
        (prepared / f"{part}.engine").unlink()


def test_a_library_compiled_on_the_device_comes_first(prepared: Path, onnx_dir: Path, tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """By the script, and by a build on the device; the bundle's own file keeps its hash."""
    folder = tmp_path / "engines" / "h100"
    shutil.copytree(prepared, folder)
    shutil.copyfile(find_plugin_library(), folder / "libecmfq_plugin.local.so")
    (tmp_path / "trtexec").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "trtexec").chmod(0o755)
    done = subprocess.run(["sh", str(folder / "build.sh")], check=True, env={**os.environ, "TRTEXEC": str(tmp_path / "trtexec")},
                          capture_output=True, text=True)
    assert done.stdout.count("--dynamicPlugins=./libecmfq_plugin.local.so") == 1 and "=./libecmfq_plugin.so" not in done.stdout
    monkeypatch.setattr(bundle_engines, "current_device", lambda: Device("H100", 90, 132, 1 << 36, "12.6"))
    assert bundle_engines._shipped_library(folder, _here("h100"), Silent()) == folder / "libecmfq_plugin.local.so"
    bundle.verify(folder, bundle.read_manifest(folder))


def _shapes(options: dict[str, str]) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Tensor to its three shapes, from trtexec's options."""
    kinds = [dict(item.split(":") for item in options[name].split(",")) for name in ("minShapes", "optShapes", "maxShapes")]
    return {name: tuple(tuple(map(int, kind[name].split("x"))) for kind in kinds) for name in kinds[0]}


def test_nothing_is_written_twice(prepared: Path, onnx_dir: Path) -> None:
    stamp = (prepared / "manifest.json").stat().st_mtime_ns
    build_engines(onnx_dir, prepared, _here("h100"), Silent())
    assert (prepared / "manifest.json").stat().st_mtime_ns == stamp


def test_form_that_the_target_does_not_take(onnx_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="exported with attention = onnx24, target jetson-orin needs decomposed"):
        build_engines(onnx_dir, tmp_path / "jetson-orin", load_target("jetson-orin"), Silent())


def test_engines_that_do_not_fit_are_refused_before_anything_is_written(onnx_dir: Path, tmp_path: Path) -> None:
    target = _here("h100")
    small = dataclasses.replace(target, limits=dataclasses.replace(target.limits, memory_bytes=1000))
    with pytest.raises(BuildError, match=r"target 'h100' has 0.00 GiB, the engines need .*weights .*KV cache"):
        build_engines(onnx_dir, tmp_path / "h100", small, Silent())
    assert not (tmp_path / "h100").exists()


def test_memory_of_the_device_at_hand_counts(onnx_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device of the target's kind that has less memory than the target says."""
    monkeypatch.setattr(bundle_engines, "current_device", lambda: Device("small H100", 90, 100, 1000, "13.0"))
    with pytest.raises(BuildError, match="this device has 0.00 GiB, the engines need"):
        build_engines(onnx_dir, tmp_path / "h100", _here("h100"), Silent())


@pytest.mark.parametrize(("driver", "own"), [("13.1", False), ("12.6", True)])
def test_on_the_device_itself(prepared: Path, onnx_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, driver: str,
                              own: bool) -> None:
    """A device of the target's kind at hand and the builder replaced: which library, profiles and files a build on the device takes.

    The library that the bundle carries is used where the driver loads it; else this installation's own, and that is said.
    """
    folder = tmp_path / "engines" / "h100"
    shutil.copytree(prepared, folder)
    calls: list[dict[str, object]] = []

    def build(graph: Path, target: Target, out: Path, **options: object) -> EngineInfo:
        calls.append(options)
        out.write_bytes(b"engine")
        Path(str(options["timing_cache"])).write_bytes(b"times")
        count = int(graph.parent.name == "decoder")
        nodes = (PluginNode("layers.0.moe", "EcmfqRoutedMoE", "1", "", {}),) * count
        return EngineInfo(out.name, 6, "", "tensorrt", "10.15", (90,), {}, (), nodes, count, "")

    device = Device("H100", 90, 132, 1 << 36, driver)
    monkeypatch.setattr(bundle_engines, "current_device", lambda: device)
    monkeypatch.setattr(bundle_engines, "build_engine", build)
    library = dataclasses.replace(read_plugin_library(folder / "libecmfq_plugin.so"), cuda="13.0")
    monkeypatch.setattr(bundle_engines, "check_plugin_library", lambda path, sha256: library)
    notes: list[str] = []

    class Notes(Silent):
        def note(self, text: str) -> None:
            notes.append(text)

    assert build_engines(onnx_dir, folder, _here("h100"), Notes()) == folder
    decoder, vision = calls
    assert (decoder["plugin_library"] == find_plugin_library()) == own == any("driver of H100 takes 12.6" in note for note in notes)
    assert decoder["decode_profile"] and vision["decode_profile"] is None
    manifest = bundle.read_manifest(folder, "build")
    assert {"decoder.engine", "vision.engine", "libecmfq_plugin.so", "build.sh", "README.txt", "timing.cache"} <= set(manifest.files)
    assert manifest.info["decoder"]["runtime"] == "tensorrt"


def test_both_engines_are_counted(onnx_dir: Path) -> None:
    from ecmfq_export.engine.device_kit import total_needs

    parts, _ = engine_parts(onnx_dir, load_target("h100"))
    total = total_needs(parts)
    assert total.total == parts["decoder"].needs.total + parts["vision"].needs.total
    assert f"{total.weights / 2**30:.2f} GiB" in str(total) and "scratch known after the build" in str(total)


def test_kit_for_another_platform(onnx_dir: Path, tmp_path: Path) -> None:
    """The cross-compiled library and, where the target admits an older CUDA, the sources to compile on the device."""
    aarch64.require_tools()
    notes: list[str] = []

    class Notes(Silent):
        def note(self, text: str) -> None:
            notes.append(text)

    target = load_target("jetson-orin-trt11")
    folder = build_engines(onnx_dir, tmp_path / "new", target, Notes())
    facts = bundle.read_manifest(folder, PREPARED).info["plugin_library"]
    assert (facts["platform"], facts["sha256"]) == ("linux-aarch64", bundle.sha256_file(folder / "libecmfq_plugin.so"))
    assert 87 in facts["compute_capabilities"] and facts["cuda"].startswith("13")
    assert not (folder / "plugin-src").exists() and not any("plugin-src" in note for note in notes)
    old = dataclasses.replace(target, kernel=dataclasses.replace(target.kernel, cuda="12.6"))
    folder = build_engines(onnx_dir, tmp_path / "old", old, Notes())
    copied = {path.relative_to(folder / "plugin-src") for path in (folder / "plugin-src").rglob("*") if path.is_file()}
    assert {Path("CMakeLists.txt"), Path("capi/ecmfq.cu"), Path("src/rows.cu"), Path("trt/exports.cpp")} <= copied
    assert all((plugin_sources() / path).read_bytes() == (folder / "plugin-src" / path).read_bytes() for path in copied)
    assert '-DECMFQ_CUDA_ARCHS="87"' in (folder / "README.txt").read_text() and any("plugin-src" in note for note in notes)


def test_which_libraries_run_on_the_oldest_system() -> None:
    library = PluginLibrary(Path("x.so"), "00", 1, "linux-aarch64", (87,), "13.0", "2.35")
    assert not runs_on_oldest(library, load_target("jetson-orin")) and runs_on_oldest(library, load_target("jetson-orin-trt11"))
    assert runs_on_oldest(dataclasses.replace(library, cuda="12.9"), load_target("jetson-orin"))
