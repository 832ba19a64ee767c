"""Reading an engine's bytes back, and refusing bytes that are no whole engine."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from ecmfq_export.engine.engine_file import EngineInfo, read_engine_file
from ecmfq_export.errors import BuildError

pytestmark = pytest.mark.tensorrt


def test_sections_fill_the_file(built: tuple[Path, EngineInfo]) -> None:
    _, info = built
    assert set(info.sections) == {"PLGN", "ENGN", "WGHT"}
    assert info.bytes - 200 <= sum(info.sections.values()) <= info.bytes
    assert info.runtime == "tensorrt_rtx" and info.runtime_version.startswith("1.7.1")


@pytest.mark.parametrize("kept", [0, 3, 64, 200, -1])
def test_truncated(small: tuple[Path, EngineInfo], tmp_path: Path, kept: int) -> None:
    data = small[0].read_bytes()
    (tmp_path / "x.engine").write_bytes(data[:kept])
    with pytest.raises(BuildError, match="truncated or damaged|no TensorRT-RTX engine"):
        read_engine_file(tmp_path / "x.engine")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="cannot be read"):
        read_engine_file(tmp_path / "none.engine")


def test_damaged_bytes_never_crash_the_reader(small: tuple[Path, EngineInfo], tmp_path: Path) -> None:
    """Header and section table, byte by byte: either the same facts, other facts, or a BuildError; nothing else."""
    data = bytearray(small[0].read_bytes())
    generator = random.Random(5)
    path = tmp_path / "x.engine"
    refused = 0
    for _ in range(60):
        spoiled = bytearray(data)
        spoiled[generator.randrange(0, 112)] ^= 1 << generator.randrange(8)
        path.write_bytes(spoiled)
        try:
            read_engine_file(path)
        except BuildError:
            refused += 1
    assert refused > 10


def test_plugin_layers_of_a_plan_are_counted_once() -> None:
    """What TensorRT's inspector lists of an engine with two profiles; written by hand, since no such engine could be made here."""
    from ecmfq_export.engine.trt_plan import plugin_layers

    def layer(name: str, kind: str, **more: str) -> dict[str, str]:
        return {"Name": name, "LayerType": kind, **more}

    own = {"PluginType": "EcmfqRoutedMoE"}
    nodes, count = plugin_layers([layer("layers.0.moe", "PluginV3", **own), layer("gemm", "CaskGemm"), "a layer without details",
                                  layer("layers.0.moe [profile 1]", "PluginV3", **own), layer("other", "PluginV2", PluginType="Other")])
    assert [(node.layer, node.plugin) for node in nodes] == [("layers.0.moe", "EcmfqRoutedMoE")] and count == 2
