"""The GPU check's own code, as far as a CPU can run it: the layer class on host memory, routings, floors, verdicts, and its refusal."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import numpy as np
import pytest

from benchmarks.kernels import benchmark, roofline
from benchmarks.kernels.device_layer import MMA_S8, ROW_MAJOR, DeviceLayer
from benchmarks.kernels.gpu_check import SMALL_CASES, attempt
from tests.kernels import emulator as em
from tests.kernels.c_abi import load
from tests.kernels.cases import make_case
from tests.kernels.reference import routed_moe

FACTS = {"compute_capability": 87, "num_sms": 16, "max_smem_per_block": 49152}


class HostBlock:
    """Host memory with a device buffer's face."""

    def __init__(self, nbytes: int) -> None:
        self._raw = np.empty(nbytes + 256, np.uint8)
        self._start = -self._raw.ctypes.data % 256
        self._nbytes = nbytes
        self.address = self._raw.ctypes.data + self._start

    @property
    def view(self) -> np.ndarray:
        return self._raw[self._start:self._start + self._nbytes]

    def download(self, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
        return self.view.view(dtype).reshape(shape).copy()


class HostMemory:
    stream = None

    def upload(self, array: np.ndarray) -> HostBlock:
        block = HostBlock(array.nbytes)
        block.view[:] = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        return block

    def allocate(self, nbytes: int) -> HostBlock:
        return HostBlock(nbytes)

    def synchronize(self) -> None:
        pass


@pytest.mark.skipif(em.compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("index", [0, 1, 2, 4, 6])
def test_device_layer_on_host_memory(index: int) -> None:
    shape, layout = SMALL_CASES[index]
    case = make_case(shape)
    layer = DeviceLayer(load(em.build("library")), HostMemory(), FACTS, case, layout)
    layer.launch()
    assert layer.output().tobytes() == routed_moe(case).output.tobytes()
    layer.with_ids(np.full_like(case.topk_ids, -1))()
    assert not layer.output().astype(np.float32).any()


@pytest.mark.skipif(em.compiler() is None, reason="no C++ compiler")
def test_a_refusal_is_a_sentence() -> None:
    case = make_case(SMALL_CASES[0][0])
    with pytest.raises(RuntimeError, match="no kernel for this device"):
        DeviceLayer(load(em.build("library")), HostMemory(), FACTS | {"compute_capability": 75}, case, ROW_MAJOR)


@pytest.mark.skipif(em.compiler() is None, reason="no C++ compiler")
def test_the_plugin_runs_the_kernels(tmp_path) -> None:
    """The program that drives enqueue through IPluginV3 on a GPU, with the emulated kernels behind the real plugin."""
    cases = [(make_case(shape), layout) for shape, layout in SMALL_CASES]
    requests, outputs = tmp_path / "cases.bin", tmp_path / "outputs.bin"
    requests.write_bytes(b"".join(em.request_bytes(case, layout) for case, layout in cases))
    done = subprocess.run([str(em.build("plugin_enqueue")), str(em.build("plugin")), str(requests), str(outputs)], capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert outputs.read_bytes() == b"".join(routed_moe(case).output.tobytes() for case, _ in cases)


def test_small_cases_reach_every_tiling_mode_and_layout() -> None:
    library = ctypes.CDLL(str(em.build("library")))
    seen = set()
    for shape, layout in SMALL_CASES:
        tiling, columns = ctypes.c_int32(), ctypes.c_int32()
        library.probe_plan(shape.num_tokens, shape.num_experts, shape.top_k, shape.hidden_size, shape.intermediate_size,
                           ctypes.byref(tiling), ctypes.byref(columns))
        seen.add((tiling.value, shape.group_size))
        assert shape.top_k <= shape.num_experts and layout in (ROW_MAJOR, MMA_S8)
    assert seen == {(tiling, group) for tiling in range(3) for group in (-1, 128)}


@pytest.mark.parametrize("kind", benchmark.ROUTINGS)
def test_routings(kind: str) -> None:
    for layer in roofline.LAYERS:
        ids = benchmark.make_routing(layer, 200, kind, np.random.default_rng(0))
        assert ids.shape == (200, layer.top_k) and ids.dtype == np.int32 and ids.min() >= 0 and ids.max() < layer.num_experts
        assert all(len(set(row)) == layer.top_k for row in ids.tolist())
        if layer.shared:
            assert (ids[:, -layer.shared:] >= layer.num_experts - layer.shared).all()
    counts = np.bincount(ids.reshape(-1))
    assert (counts.max() > 3 * np.median(counts)) or kind == "uniform"


def test_floors_by_hand() -> None:
    qwen = roofline.QWEN3_VL_30B_A3B
    assert qwen.expert_bytes() == 3 * 2048 * 768 // 2 + 4 * (1536 + 2048)
    assert qwen.expert_bytes(128) - qwen.expert_bytes() == 3 * 2048 * 768 // 128
    assert qwen.expected_experts(1) == pytest.approx(8) and qwen.expected_experts(10_000) == pytest.approx(128)
    assert roofline.KIMI_VL_A3B.expected_experts(1) == pytest.approx(8)
    memory, arithmetic = roofline.floor_microseconds(qwen, 1, bandwidth=100.0, int8=1.0)
    assert memory == pytest.approx((8 * qwen.expert_bytes() + 4 * 2048 + 64) / 1e5)
    assert arithmetic == pytest.approx(8 * 6 * 2048 * 768 / 1e6)


def test_verdicts() -> None:
    row = {"layer": "x", "group_size": -1, "tokens": 4, "routing": "uniform", "w4a8_us": 10.0, "of_bandwidth": 0.75, "of_int8_peak": 0.01,
           "bf16_grouped_mm_us": 50.0, "bf16_expert_loop_us": 31.0, "int4_weight_only_loop_us": 12.0}
    prefill = row | {"tokens": 1024, "of_int8_peak": 0.3}
    unknown = row | {"bf16_grouped_mm_us": "no CUDA", "bf16_expert_loop_us": "no CUDA"}
    verdicts = benchmark.judge([row, prefill, unknown, row | {"tokens": 64}, row | {"group_size": 128}])
    assert [v["reached"] for v in verdicts] == [True, False, None]
    assert verdicts[0]["speedup_over_bf16"] == pytest.approx(3.1)


def test_a_failed_step_is_recorded() -> None:
    assert attempt(lambda: {"a": 1}) == {"status": "passed", "a": 1}
    failed = attempt(lambda: 1 / 0)
    assert failed["status"] == "failed" and "ZeroDivisionError" in failed["error"]


def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path) -> None:
    try:
        ctypes.CDLL("libcuda.so.1")
        pytest.skip("this machine has a CUDA driver")
    except OSError:
        pass
    out = tmp_path / "result.json"
    command = [sys.executable, "benchmarks/kernels/gpu_check.py", "--out", str(out)]
    done = subprocess.run(command, cwd=em.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "no CUDA driver" in done.stderr and not out.exists()
