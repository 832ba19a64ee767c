"""Engines of a bundle are checked by their files alone, before a native library sees them."""

from __future__ import annotations

import json
import random
import shutil
import struct
from pathlib import Path

import pytest

from ecmfq_export import bundle
from ecmfq_export.engine.device import Device
from ecmfq_export.engine.engine_directory import check_runs_here, open_engines
from ecmfq_export.engine.plugin_library import ABI_VERSION, LIBRARY_NAME
from ecmfq_export.errors import BuildError, BundleError
from tests.fuzz.mutations import mutate_json
from tests.fuzz.sandbox import outcome

ELF = b"\x7fELF\x02" + bytes(13) + struct.pack("<H", 62) + bytes(64)


@pytest.fixture
def engines(tmp_path: Path) -> Path:
    """A build's directory as workflow.build_engines writes it; the engines themselves are never opened here."""
    with bundle.write_stage(tmp_path / "rtx", "build", {}, {}) as (work, info):
        info["plugin_abi"] = ABI_VERSION
        (work / LIBRARY_NAME).write_bytes(ELF)
        for part in ("decoder", "vision"):
            (work / f"{part}.engine").write_bytes(part.encode())
            info[part] = {"runtime": "tensorrt_rtx", "runtime_version": "1.7.1.116", "compute_capabilities": [86, 89],
                          "plugin_nodes": [{}] if part == "decoder" else [], "sha256": bundle.sha256_file(work / f"{part}.engine"),
                          "plugin_library_sha256": bundle.sha256_file(work / LIBRARY_NAME) if part == "decoder" else ""}  # fmt: skip
    return tmp_path / "rtx"


def _edit(engines: Path, change) -> None:
    path = engines / bundle.MANIFEST
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_what_is_told(engines: Path) -> None:
    records = open_engines(engines)
    assert records["decoder"].num_plugin_nodes == 1
    assert records["decoder"].plugin_library == engines / LIBRARY_NAME
    gpu = Device("x", 89, 1, 1, "13.0")
    check_runs_here(records["decoder"], "1.7.1", gpu)
    check_runs_here(records["decoder"], "1.7.1.200", gpu)
    for version, device, words in (("1.7.2", gpu, "1.7.2"), ("1.7.1", None, "none"), ("1.7.1", Device("y", 87, 1, 1, ""), "87")):
        with pytest.raises(BuildError, match=words):
            check_runs_here(records["decoder"], version, device)


@pytest.mark.parametrize(("change", "error", "words"), [
    (lambda d: d["info"].update(plugin_abi=ABI_VERSION + 1), BuildError, "ABI"),
    (lambda d: d["info"].pop("plugin_abi"), BuildError, "ABI"),
    (lambda d: d["info"].pop("vision"), BundleError, "describes no engine 'vision'"),
    (lambda d: d["info"]["decoder"].update(sha256="0" * 64), BundleError, "not the engine"),
    (lambda d: d["info"]["decoder"].update(plugin_library_sha256="0" * 64), BundleError, "not the library"),
    (lambda d: d["info"]["decoder"].update(runtime="pickle"), BundleError, "pickle"),
    (lambda d: d["info"]["decoder"].update(compute_capabilities=["86"]), BundleError, "86"),
    (lambda d: d["files"].update({"decoder.engine": "0" * 64}), BundleError, "sha256"),
])  # fmt: skip
def test_what_does_not_hold(change, error, words: str, engines: Path) -> None:
    _edit(engines, change)
    with pytest.raises(error, match=words):
        open_engines(engines)


def test_a_library_that_is_none(engines: Path) -> None:
    (engines / LIBRARY_NAME).write_bytes(b"#!/bin/sh\n" * 20)
    _edit(engines, lambda d: d["files"].update({LIBRARY_NAME: bundle.sha256_file(engines / LIBRARY_NAME)}))
    with pytest.raises(BuildError, match="shared object"):
        open_engines(engines)


def test_damaged_manifests(engines: Path, tmp_path: Path) -> None:
    """300 of them: our errors, or what was there."""
    original = json.loads((engines / bundle.MANIFEST).read_text())
    refused = 0
    for case in range(300):
        data, _ = mutate_json(random.Random(case), original)
        (engines / bundle.MANIFEST).write_bytes(data)
        refused += outcome(engines, lambda: open_engines(engines)) is not None
    assert refused > 150
    shutil.rmtree(engines)
