"""One routed MoE layer on a device, through the C ABI: upload, run, download. The same class runs on host memory in the CPU tests."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np

from ecmfq_export.quant.kernel_layout import prepack_mma_s8
from tests.kernels.c_abi import ABI_VERSION, STATUS, EcmfqMoeParams
from tests.kernels.reference import DTYPES, Case

PLUGINS = Path(__file__).resolve().parents[2] / "plugins"
ROW_MAJOR, MMA_S8 = 0, 1


class Memory(Protocol):
    """A place for tensors: driver.Device, or host memory in tests."""

    stream: ctypes.c_void_p

    def upload(self, array: np.ndarray) -> Block: ...
    def allocate(self, nbytes: int) -> Block: ...
    def synchronize(self) -> None: ...


class Block(Protocol):
    address: int

    def download(self, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray: ...


class DeviceLayer:
    """A case's tensors on the device and a call that runs the layer on the memory's stream.

    Args:
        library: from tests.kernels.c_abi.load.
        facts: compute_capability, num_sms, max_smem_per_block.
    """

    def __init__(self, library: ctypes.CDLL, memory: Memory, facts: dict[str, int], case: Case, layout: int) -> None:
        self._library, self._memory = library, memory
        self.tokens, self.hidden = case.hidden_states.shape
        self._dtype = DTYPES[case.dtype_code]
        gate_up, down = case.gate_up_qweight, case.down_qweight
        if layout == MMA_S8:
            gate_up, down = prepack_mma_s8(gate_up, True), prepack_mma_s8(down, False)
        grouped = case.gate_up_multiplier is not None
        tensors = {"hidden_states": case.hidden_states, "topk_ids": case.topk_ids, "topk_weights": case.topk_weights,
                   "gate_up_qweight": gate_up, "gate_up_scale": case.gate_up_scale, "down_qweight": down, "down_scale": case.down_scale}
        if grouped:
            tensors |= {"gate_up_multiplier": case.gate_up_multiplier, "down_multiplier": case.down_multiplier}
        self._blocks = {name: memory.upload(array) for name, array in tensors.items()}
        self._blocks["output"] = memory.allocate(case.hidden_states.nbytes)
        self._params = EcmfqMoeParams(
            abi_version=ABI_VERSION, struct_size=ctypes.sizeof(EcmfqMoeParams), num_tokens=self.tokens, num_experts=case.num_experts,
            top_k=case.topk_ids.shape[1], hidden_size=self.hidden, intermediate_size=case.intermediate_size,
            group_size=128 if grouped else -1, activation=0, dtype=case.dtype_code, weight_layout=layout,
            **facts, **{name: block.address for name, block in self._blocks.items()})
        size = ctypes.c_size_t()
        self._check(library.ecmfq_routed_moe_workspace_size(ctypes.byref(self._params), ctypes.byref(size)))
        self.workspace_bytes = size.value
        self._workspace = memory.allocate(size.value)

    def _check(self, status: int) -> None:
        if status != STATUS["OK"]:
            raise RuntimeError(f"ecmfq: {self._library.ecmfq_status_string(status).decode()}")

    def launch(self) -> None:
        """Put the layer on the stream."""
        self._check(self._library.ecmfq_routed_moe(ctypes.byref(self._params), self._workspace.address, self.workspace_bytes,
                                                   self._memory.stream))

    def with_ids(self, topk_ids: np.ndarray) -> Callable[[], None]:
        """A launch with another routing; everything else, the workspace too, is shared."""
        block = self._memory.upload(topk_ids)
        params = EcmfqMoeParams.from_buffer_copy(self._params)
        params.topk_ids = block.address

        def launch(_keep: Block = block) -> None:
            self._check(self._library.ecmfq_routed_moe(ctypes.byref(params), self._workspace.address, self.workspace_bytes,
                                                       self._memory.stream))

        return launch

    def output(self) -> np.ndarray:
        self._memory.synchronize()
        return self._blocks["output"].download(self._dtype, (self.tokens, self.hidden))


def build_library(compute_capability: int, with_plugin: bool, work: Path | None = None) -> Path:
    """Compile plugins/src and plugins/capi (and plugins/trt) for one SM with nvcc; returns the shared library.

    Raises:
        RuntimeError: no nvcc, or it failed (with its output).
    """
    nvcc = os.environ.get("NVCC") or shutil.which("nvcc")
    if nvcc is None:
        raise RuntimeError("nvcc not found: put it on PATH or name it in NVCC")
    folder = work or Path(tempfile.mkdtemp(prefix="ecmfq-gpu-"))
    target = folder / "libecmfq_plugin.so"
    sources = [*sorted((PLUGINS / "src").glob("*.cu")), *sorted((PLUGINS / "capi").glob("*.cu"))]
    if with_plugin:
        sources += [p for p in sorted((PLUGINS / "trt").glob("*.cpp")) if p.stem != "abi_conformance"]
    command = [nvcc, "-shared", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-std=c++17", "-O3", "-lineinfo",
               f"-gencode=arch=compute_{compute_capability},code=sm_{compute_capability}", "--cudart=static",
               f"-I{PLUGINS / 'include'}", f"-I{PLUGINS / 'capi'}", *map(str, sources), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return target
