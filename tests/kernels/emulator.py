"""Builds the kernels for the CPU (tests/kernels/emulation) and runs cases on them."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ecmfq_export.quant.kernel_layout import prepack_mma_s8
from tests.kernels.reference import DTYPES, Case, Result

ROOT = Path(__file__).resolve().parents[2]
PLUGINS = ROOT / "plugins"
EMULATION = Path(__file__).resolve().parent / "emulation"
ROW_MAJOR, MMA_S8 = 0, 1
DECODE_8, DECODE_32, PREFILL = 0, 1, 2

_FLAGS = ["-std=c++17", "-g1", "-ffp-contract=off", "-fPIC", "-DECMFQ_EMULATION", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
_SANITIZE = ["-O1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


class EmulationError(AssertionError):
    """The emulated kernels did something wrong: a sanitizer report or a broken rule of the machine; the text says which."""


def compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++")


def build(kind: str, plugins: Path = PLUGINS) -> Path:
    """Build the ``server`` (an executable under AddressSanitizer and UBSan), the ``library`` (plain, for ctypes), the ``plugin`` (the
    same with plugins/trt) or ``plugin_enqueue`` (the host program of benchmarks/kernels that drives it).

    Objects and results are cached in the temporary directory under a hash of their preprocessed sources.
    """
    cache = Path(tempfile.gettempdir()) / f"ecmfq-emulation-{os.getuid()}"
    cache.mkdir(exist_ok=True)
    with (cache / "lock").open("w") as lock:  # parallel workers: one compiles, the others find it done
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _build(kind, plugins, cache)


def _build(kind: str, plugins: Path, cache: Path) -> Path:
    options = _SANITIZE if kind == "server" else ["-O1"]
    includes = [plugins / "include", plugins / "capi", EMULATION, EMULATION / "cuda_on_host"]
    command = [compiler(), *_FLAGS, *options, *(f"-I{folder}" for folder in includes), "-x", "c++"]
    kernels = sorted([*(plugins / "src").glob("*.cu"), *(plugins / "capi").glob("*.cu"), EMULATION / "emulation.cpp"])
    sources = {
        "server": [*kernels, EMULATION / "server.cpp"],
        "library": [*kernels, EMULATION / "layout_probe.cpp"],
        "plugin": [*kernels, *(p for p in sorted((plugins / "trt").glob("*.cpp")) if p.stem != "abi_conformance")],
        "plugin_enqueue": [ROOT / "benchmarks" / "kernels" / "plugin_enqueue.cpp"],
    }[kind]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda source: _object(command, source, cache), sources))
    digest = hashlib.sha256(" ".join([kind, *(o.name for o in objects)]).encode()).hexdigest()[:20]
    target = cache / f"{kind}-{digest}"
    if not target.exists():
        link = [*options, "-shared"] if kind in ("library", "plugin") else options
        _make(target, lambda out: _run([compiler(), *link, *map(str, objects), "-o", out, "-ldl"]))
    return target


def _object(command: list[str], source: Path, cache: Path) -> Path:
    text = _run([*command, "-E", "-P", str(source)])
    flags = " ".join(part for part in command if not part.startswith("-I"))
    target = cache / f"{source.stem}-{hashlib.sha256((flags + text).encode()).hexdigest()[:20]}.o"
    if not target.exists():
        _make(target, lambda out: _run([*command, "-c", str(source), "-o", out]))
    return target


def _make(target: Path, write: Callable[[str], object]) -> None:
    """Write beside and rename, so that a parallel test run never sees half a file."""
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        out = Path(work) / target.name
        write(str(out))
        os.replace(out, target)


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout


@dataclass(frozen=True)
class Forced:
    """Plan fields to use instead of the planner's; ``tiling`` -1 goes through the C ABI and its planner."""

    tiling: int = -1
    term_columns: int = 0
    persistent_blocks: int = 0
    seed: int = 1


def request_bytes(case: Case, layout: int, forced: Forced = Forced()) -> bytes:
    """A case as server.cpp (and benchmarks/kernels/plugin_enqueue.cpp) reads it; weights are prepacked here when the layout asks for it."""
    tokens, hidden = case.hidden_states.shape
    group = -1 if case.gate_up_multiplier is None else 128
    header = np.array([tokens, case.num_experts, case.topk_ids.shape[1], hidden, case.intermediate_size, group, case.dtype_code, layout,
                       forced.tiling, forced.term_columns, forced.persistent_blocks, forced.seed, 0, 0, 0, 0], np.int32)
    gate_up, down = case.gate_up_qweight, case.down_qweight
    if layout == MMA_S8:
        gate_up, down = prepack_mma_s8(gate_up, True), prepack_mma_s8(down, False)
    parts = [header, case.hidden_states, case.topk_ids, case.topk_weights, gate_up, case.gate_up_scale, case.gate_up_multiplier,
             down, case.down_scale, case.down_multiplier]
    return b"".join(np.ascontiguousarray(part).tobytes() for part in parts if part is not None)


class Emulator:
    """A server process; one process runs many cases. Close it, or use it as a context manager."""

    def __init__(self, executable: Path) -> None:
        self._executable = executable
        self.streamed_bytes = 0
        """Bytes of weights that the last case's decode kernels read."""
        self._start()

    def _start(self) -> None:
        self._log = tempfile.TemporaryFile()
        self._process = subprocess.Popen([str(self._executable)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log)

    def __enter__(self) -> Emulator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process; a leak or another late report raises EmulationError."""
        self._process.stdin.close()
        self._process.stdout.close()
        if self._process.wait(timeout=60):
            raise EmulationError(self._report())
        self._log.close()

    def run(self, case: Case, layout: int, forced: Forced = Forced()) -> Result:
        """Run one case; raises EmulationError with the report when the process dies (the next call starts another) or refuses."""
        if self._process.poll() is not None:
            self._start()
        tokens, hidden = case.hidden_states.shape
        top_k, experts, inter = case.topk_ids.shape[1], case.num_experts, case.intermediate_size
        try:
            self._process.stdin.write(request_bytes(case, layout, forced))
            self._process.stdin.flush()
        except BrokenPipeError:
            raise EmulationError(self._report()) from None
        status = int(self._read(np.int32, (1,))[0])
        if status:
            raise EmulationError(f"status {status}")
        self.streamed_bytes = int(self._read(np.int64, (1,))[0])
        output = self._read(DTYPES[case.dtype_code], (tokens, hidden))
        act_q = self._read(np.int8, (tokens, hidden))
        act_scale = self._read(np.float32, (tokens,))
        offsets = self._read(np.int32, (experts + 1,))
        row_pair = self._read(np.int32, (tokens * top_k,))
        inter_q = self._read(np.int8, (tokens * top_k, inter))
        inter_scale = self._read(np.float32, (tokens * top_k,))
        rows = int(offsets[-1])
        return Result(output, _natural_order(act_q), act_scale, offsets, row_pair[:rows], _natural_order(inter_q[:rows]),
                      inter_scale[:rows])

    def _read(self, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
        wanted = int(np.prod(shape)) * np.dtype(dtype).itemsize
        data = self._process.stdout.read(wanted)
        if len(data) != wanted:
            raise EmulationError(self._report())
        return np.frombuffer(data, np.uint8).view(dtype).reshape(shape)

    def _report(self) -> str:
        self._process.wait(timeout=60)
        self._log.seek(0)
        return f"exit code {self._process.returncode}\n{self._log.read().decode(errors='replace')[-6000:]}"


def _natural_order(q: np.ndarray) -> np.ndarray:
    """Undo layout.cuh's activation_position: within 8 columns, even ones first, then odd ones."""
    halves = q.reshape(q.shape[0], q.shape[1] // 8, 2, 4)
    return halves.swapaxes(2, 3).reshape(q.shape)
