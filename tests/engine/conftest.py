"""One engine for three architectures, built once for all tests that read it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from ecmfq_export.engine.build import build_engine
from ecmfq_export.engine.engine_file import EngineInfo
from ecmfq_export.engine.plugin_library import find_plugin_library
from ecmfq_export.target import load_target
from tests.engine.small_graphs import decoder, profiles


@pytest.fixture(scope="session")
def library() -> Path:
    return find_plugin_library()


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory, library: Path) -> tuple[Path, EngineInfo]:
    """A two-layer decoder for target 'rtx': the engine's path and what build_engine returned."""
    pytest.importorskip("tensorrt_rtx")
    folder = tmp_path_factory.mktemp("engine")
    graph = decoder(folder / "model.onnx")
    info = build_engine(graph, load_target("rtx"), folder / "decoder.engine", profiles=profiles(graph), plugin_library=library,
                        log_path=folder / "build.log")
    return folder / "decoder.engine", info


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory, library: Path) -> tuple[Path, EngineInfo]:
    """One layer with group multipliers, the library beside the engine and not in it, so it has 2 MB and not 20."""
    pytest.importorskip("tensorrt_rtx")
    folder = tmp_path_factory.mktemp("small")
    graph = decoder(folder / "model.onnx", layers=1, group_size=128)
    target = load_target("rtx-50")
    target = dataclasses.replace(target, engine=dataclasses.replace(target.engine, plugin="beside", timing_cache=True))  # as on a device
    info = build_engine(graph, target, folder / "decoder.engine", profiles=profiles(graph), plugin_library=library,
                        timing_cache=folder / "timing.cache")
    return folder / "decoder.engine", info
