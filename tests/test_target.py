"""Targets: all bundled files load; what is wrong in one of one's own is named."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from ecmfq_export.errors import UserError
from ecmfq_export.target import list_targets, load_target

BUNDLED = Path(__file__).resolve().parents[1] / "targets"


def test_bundled_targets() -> None:
    names = list_targets()
    assert set(names) == {path.stem for path in BUNDLED.glob("*.toml")}
    assert {"rtx", "l4", "a100", "a10", "rtx-30", "rtx-40", "rtx-50", "rtx-pro", "dgx-spark", "h100", "h200", "b200", "jetson-orin",
            "jetson-thor"} <= set(names)
    for name in names:
        target = load_target(name)
        assert target.name == name and target.dtype == "float16"
        assert target.kv_cache == {"onnx24": "in_place", "decomposed": "copy"}[target.attention]
        json.dumps(dataclasses.asdict(target))
    assert load_target("rtx").compute_capabilities == (86, 89, 120)
    assert load_target("jetson-orin").attention == "decomposed" and load_target("jetson-orin").engine.build == "on-device"
    assert load_target("jetson-thor").compute_capabilities == (110,)


def test_unknown_target_names_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"'jetson-nano' is not known\n.*a10, a100, b200"):
        load_target("jetson-nano")


def test_own_file(tmp_path: Path) -> None:
    text = (BUNDLED / "l4.toml").read_text().replace('name = "l4"', 'name = "mine"').replace("max_batch = 4", "max_batch = 2")
    (tmp_path / "mine.toml").write_text(text)
    assert load_target(tmp_path / "mine.toml").limits.max_batch == 2


@pytest.mark.parametrize(("old", "new", "message"), [
    ('name = "l4"', 'name = "l4"\ncolour = 1', "unknown key 'colour'"),
    ("max_batch", "max_batches", "unknown key 'limits.max_batches'"),
    ('platform = "linux-x86_64"', "", "key 'platform' is missing"),
    ("max_batch = 4", "max_batch = 4.5", "'limits.max_batch' is 4.5"),
    ("max_batch = 4", "max_batch = true", "'limits.max_batch' is True"),
    ("max_batch = 4", "max_batch = 0", "'limits.max_batch' is 0"),
    ("[89]", "[]", "at least one"),
    ("[89]", "[89, 89]", "repeats"),
    ("[89]", "[90]", "compute capability 90 has no kernel or no engine with tensorrt_rtx"),
    ("tensorrt_rtx", "tensorflow", "'engine.runtime' is 'tensorflow'"),
    ("host-aot", "on-device", "tensorrt_rtx builds host-aot"),
    ('"in_place"', '"copy"', "attention 'onnx24' with kv_cache 'copy'"),
    ("timing_cache = false", "timing_cache = 0", "'engine.timing_cache' is 0"),
    ("decode_profile = false", "decode_profile = true", "decode_profile or timing_cache with runtime 'tensorrt_rtx'"),
    ('cuda = "13.0"', 'cuda = "thirteen"', "'thirteen' is not a version"),
    ("[kernel]", "[kernels]", "unknown key 'kernels'"),
    ("[limits]", "limits = [", "not valid TOML"),
    ('name = "l4"', 'name = "l5"', "name is 'l5'"),
])
def test_mistakes_in_a_file(tmp_path: Path, old: str, new: str, message: str) -> None:
    (tmp_path / "l4.toml").write_text((BUNDLED / "l4.toml").read_text().replace(old, new, 1))
    with pytest.raises(UserError) as caught:
        load_target(tmp_path / "l4.toml")
    assert message in str(caught.value)


def test_attention_that_the_parser_does_not_know_yet(tmp_path: Path) -> None:
    text = (BUNDLED / "jetson-orin.toml").read_text().replace('"decomposed"', '"onnx24"').replace('"copy"', '"in_place"')
    (tmp_path / "jetson-orin.toml").write_text(text)
    with pytest.raises(UserError, match=r"TensorScatter since 10\.15"):
        load_target(tmp_path / "jetson-orin.toml")
