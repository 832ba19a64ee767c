"""The library in the plugin registries of TensorRT-RTX 1.7 and of TensorRT 11, without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROBE = Path(__file__).resolve().parent / "registry_probe.py"
ALLOWED = {  # what the message must say besides the node's name
    "top_k": "attribute 'top_k' is 9; allowed: 1 to 8",
    "num_experts": "attribute 'num_experts' is 0; allowed: 1 to 4096",
    "activation": "attribute 'activation' is 'relu'; allowed: 'silu_glu'",
    "weight_layout": "attribute 'weight_layout' is 'column_major'; allowed: 'row_major', 'mma_s8'",
    "group_size": "attribute 'group_size' is 64; allowed: -1, 128",
    "abi_version": "attribute 'abi_version' is 2; allowed: 1",
    "hidden_size": "attribute 'hidden_size' is 257; allowed: multiples of 2",
    "intermediate_size": "attribute 'intermediate_size' is -4; allowed: 2 to 65536",
    "unknown": "unknown attribute 'colour'",
    "missing": "attribute 'top_k' is missing",
}


@pytest.fixture(scope="module", params=["tensorrt_rtx", "tensorrt_lean"])
def probe(request: pytest.FixtureRequest, library: Path) -> tuple[str, dict[str, Any], str]:
    pytest.importorskip(request.param)
    # A process each: the two have the same symbols, and a broken plugin would take the test run with it.
    result = subprocess.run([sys.executable, str(PROBE), request.param, str(library)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return request.param, json.loads(result.stdout.splitlines()[-1]), result.stderr


@pytest.mark.tensorrt
def test_creator(probe: tuple[str, dict[str, Any], str]) -> None:
    _, seen, _ = probe
    assert seen["handle"] and seen["created"]
    assert seen["creators"] == [["EcmfqRoutedMoE", "1", ""]]
    assert seen["kinds"] == ["PLUGIN_V3ONE_CORE", "PLUGIN_V3ONE_BUILD", "PLUGIN_V3ONE_RUNTIME"]


@pytest.mark.tensorrt
def test_fields(probe: tuple[str, dict[str, Any], str]) -> None:
    _, seen, _ = probe
    strings = {"activation", "weight_layout"}
    names = {"abi_version", "num_experts", "top_k", "hidden_size", "intermediate_size", "group_size"}
    assert seen["fields"] == {**dict.fromkeys(names, "INT32"), **dict.fromkeys(strings, "CHAR")}
    assert not seen["engine_fields_without_checksum"]


@pytest.mark.tensorrt
def test_wrong_attributes_are_refused_with_the_reason(probe: tuple[str, dict[str, Any], str]) -> None:
    """TensorRT-RTX hands the message to its logger; the lean registry has no logger without a driver, so it is on stderr."""
    module, seen, stderr = probe
    assert set(seen["refused"]) == set(ALLOWED)
    for case, (refused, message) in seen["refused"].items():
        text = message if module == "tensorrt_rtx" else stderr
        assert refused, case
        assert f"EcmfqRoutedMoE node 'probe/moe': {ALLOWED[case]}" in text, case
