"""The kernels on a GPU, against NumPy bit for bit. Not run on the machines of this project so far: see docs/kernels.md.

    pytest -m gpu tests/kernels
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.kernels.device_layer import MMA_S8, ROW_MAJOR, DeviceLayer, build_library
from benchmarks.kernels.driver import CudaError, Device
from tests.kernels.c_abi import load
from tests.kernels.cases import ROUTINGS, Shape, make_case, with_values
from tests.kernels.reference import routed_moe

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def device() -> Device:
    try:
        return Device()
    except CudaError as error:
        pytest.skip(f"no GPU: {error}")


@pytest.fixture(scope="module")
def library(device: Device, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ctypes.CDLL]:
    work: Path = tmp_path_factory.mktemp("kernels")
    yield load(build_library(device.facts().compute_capability, False, work))


def facts(device: Device) -> dict[str, int]:
    f = device.facts()
    return {"compute_capability": f.compute_capability, "num_sms": f.num_sms, "max_smem_per_block": f.max_smem_per_block}


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    grouped = draw(st.booleans())
    unit = 128 if grouped else 32
    experts = draw(st.integers(1, 40))
    return Shape(draw(st.one_of(st.integers(1, 16), st.integers(17, 600))), experts, draw(st.integers(1, min(experts, 8))),
                 unit * draw(st.integers(1, 1024 // unit)), unit * draw(st.integers(1, 1024 // unit)), 128 if grouped else -1,
                 draw(st.integers(0, 1)), draw(st.sampled_from(ROUTINGS)), draw(st.integers(0, 2**32 - 1)))


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(shape=shapes(), layout=st.sampled_from([ROW_MAJOR, MMA_S8]))
def test_every_bit_equals_the_reference(library: ctypes.CDLL, device: Device, shape: Shape, layout: int) -> None:
    case = make_case(shape)
    layer = DeviceLayer(library, device, facts(device), case, layout)
    layer.launch()
    assert layer.output().tobytes() == routed_moe(case).output.tobytes()


@pytest.mark.parametrize("tokens", [1, 8, 33, 257])
@pytest.mark.parametrize("group_size", [-1, 128])
@pytest.mark.parametrize("hidden,inter", [(2048, 768), (2048, 1408)])
def test_sizes_of_real_models(library: ctypes.CDLL, device: Device, hidden: int, inter: int, group_size: int, tokens: int) -> None:
    """Qwen3-VL-30B-A3B's and Kimi-VL's widths with fewer experts, to keep NumPy's share short."""
    case = make_case(Shape(tokens, 8, 4, hidden, inter, group_size))
    layer = DeviceLayer(library, device, facts(device), case, MMA_S8)
    layer.launch()
    assert layer.output().tobytes() == routed_moe(case).output.tobytes()


@pytest.mark.parametrize("tokens", [5, 20, 200])
def test_a_non_finite_value_stays_in_its_token(library: ctypes.CDLL, device: Device, tokens: int) -> None:
    case = with_values(make_case(Shape(tokens, 4, 2, 256, 128)), 3, 17, float("nan"))
    layer = DeviceLayer(library, device, facts(device), case, MMA_S8)
    layer.launch()
    got, want = layer.output(), routed_moe(case).output
    others = [t for t in range(tokens) if t != 3]
    assert (got[3] != got[3]).all() and got[others].tobytes() == want[others].tobytes()


def test_a_captured_graph_gives_the_same(library: ctypes.CDLL, device: Device) -> None:
    case = make_case(Shape(40, 16, 4, 512, 256))
    layer = DeviceLayer(library, device, facts(device), case, MMA_S8)
    device.captured([layer.launch] * 3)()
    assert layer.output().tobytes() == routed_moe(case).output.tobytes()
