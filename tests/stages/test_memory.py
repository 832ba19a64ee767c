"""Peak memory is that of one layer, whatever the number of layers: read from the kernel, in a process of its own."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from ecmfq_export import workflow
from ecmfq_export.progress import Silent
from ecmfq_export.stages.resources import Resources
from tests.forking import fork
from tests.stages.common import SETTINGS, make_pool
from tests.tiny_models import make_qwen3_vl_moe

CONFIG = replace(SETTINGS, smoothing="smoothquant", weighting="rho_g_phi", num_samples=4)
EXPERTS, HIDDEN, INNER = 32, 256, 192
M_MMAP_THRESHOLD = -3  # malloc.h
LAYER_BYTES = 4 * EXPERTS * 3 * HIDDEN * INNER


def peak_of(action: Callable[[], object]) -> int:
    """Bytes by which the largest resident memory of a forked child exceeds what it began with."""
    reading, writing = os.pipe()
    pid = fork()  # collects garbage first
    if pid == 0:
        code = 1
        try:
            # Freed tensors go back to the system: what the heap keeps in pieces is not the stage's memory.
            ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
            before = _status("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")
            action()
            os.write(writing, str(_status("VmHWM") - before).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as stream:
        text = stream.read()
    assert os.waitpid(pid, 0)[1] == 0
    return int(text)


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads peak memory from Linux's /proc")
def test_four_times_the_layers_take_no_more_memory(tmp_path: Path) -> None:
    pool, peaks = make_pool(tmp_path / "pool", size=8), {}
    for layers in (2, 8):
        model = make_qwen3_vl_moe(tmp_path / f"model{layers}", hidden_size=HIDDEN, moe_intermediate_size=INNER, num_experts=EXPERTS,
                                  num_hidden_layers=layers, dtype=torch.bfloat16)
        run = partial(workflow.quantize_model, model, pool, tmp_path / f"out{layers}" / "quantized", CONFIG, Silent(), Resources(0))
        peaks[layers] = peak_of(run)
    assert peaks[2] > LAYER_BYTES, "the meter sees a layer"
    assert peaks[8] < peaks[2] + LAYER_BYTES, f"{peaks} bytes, a layer has {LAYER_BYTES}"
