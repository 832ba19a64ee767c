"""The GPU check: build for the GPU at hand, test, sanitize, benchmark; results as JSON under benchmarks/results.

    python benchmarks/kernels/gpu_check.py               # everything; expect tens of minutes
    python benchmarks/kernels/gpu_check.py --quick       # small shapes and few token counts
    python benchmarks/kernels/gpu_check.py --steps build tests plugin

Needs an NVIDIA driver, nvcc, and this package with its test extra. compute-sanitizer and a torch with CUDA are used if they are there;
what is missing is written down as skipped, with the reason. The exit code is 1 when a step failed, 2 when there is no GPU.

Steps:
    build      kernels and plugin for this SM, and the program that drives the plugin
    tests      pytest -m gpu tests/kernels: every bit against NumPy
    plugin     enqueue through the IPluginV3 interface, every bit against NumPy
    sanitize   compute-sanitizer memcheck, racecheck, initcheck and synccheck over that program
    repeats    the same bits 100 times
    engine     a whole TensorRT-RTX or TensorRT engine of a tiny model against ONNX Runtime; on a GPU without an engine of its own SM
               (90, say) one built for SM 80 is tried and what the runtime says is written down
    benchmark  the layers of Qwen3-VL-30B-A3B and Kimi-VL against torch's bf16 and int4 and against the roofline
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # run as a file, not as a module

import numpy as np  # noqa: E402

from benchmarks.kernels import baselines, benchmark  # noqa: E402
from benchmarks.kernels.device_layer import MMA_S8, ROW_MAJOR, DeviceLayer, build_library  # noqa: E402
from benchmarks.kernels.driver import CudaError, Device  # noqa: E402
from tests.kernels.c_abi import load  # noqa: E402
from tests.kernels.cases import Shape, make_case  # noqa: E402
from tests.kernels.emulator import request_bytes  # noqa: E402
from tests.kernels.reference import DTYPES, Case, routed_moe  # noqa: E402

STEPS = ("build", "tests", "plugin", "sanitize", "repeats", "engine", "benchmark")
RESULTS = ROOT / "benchmarks" / "results"

# One for each tiling, group mode, layout and dtype: small enough for racecheck, which slows a kernel a hundred times.
SMALL_CASES = (
    (Shape(1, 8, 2, 96, 64), MMA_S8),
    (Shape(7, 8, 3, 256, 128, group_size=128, dtype=1), MMA_S8),
    (Shape(20, 16, 4, 96, 160, routing="skewed"), MMA_S8),
    (Shape(30, 16, 4, 256, 128, group_size=128), ROW_MAJOR),
    (Shape(100, 3, 2, 288, 160, dtype=1), MMA_S8),
    (Shape(130, 2, 2, 256, 384, group_size=128, routing="hot"), MMA_S8),
    (Shape(70, 2, 2, 160, 96, routing="padded"), ROW_MAJOR),
)


class Skipped(Exception):
    """A step that cannot run here; the text says why."""


class Check:
    """The device, the built files, and one method a step; each returns what goes into the JSON."""

    def __init__(self, device: Device, work: Path, quick: bool) -> None:
        self.device, self.work, self.quick = device, work, quick
        self.facts = device.facts()
        self._library_path: Path | None = None

    def library_path(self) -> Path:
        if self._library_path is None:
            self._library_path = build_library(self.facts.compute_capability, True, self.work)
        return self._library_path

    def abi_facts(self) -> dict[str, int]:
        return {"compute_capability": self.facts.compute_capability, "num_sms": self.facts.num_sms,
                "max_smem_per_block": self.facts.max_smem_per_block}

    def build(self) -> dict[str, object]:
        path = self.library_path()
        program = self.work / "plugin_enqueue"
        _run([shutil.which("nvcc") or "nvcc", "-std=c++17", "--cudart=static", "-Xcompiler", "-fno-rtti",
              str(ROOT / "benchmarks" / "kernels" / "plugin_enqueue.cpp"), "-o", str(program), "-ldl"])
        return {"library_bytes": path.stat().st_size}

    def tests(self) -> dict[str, object]:
        done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/kernels"], cwd=ROOT, capture_output=True,
                              text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stdout[-4000:] + done.stderr[-2000:])
        return {"pytest": done.stdout.strip().splitlines()[-1]}

    def plugin(self) -> dict[str, object]:
        cases = [(make_case(shape), layout) for shape, layout in SMALL_CASES]
        outputs = self._enqueue([], cases)
        for (case, layout), got in zip(cases, outputs, strict=True):
            if got.tobytes() != routed_moe(case).output.tobytes():
                raise RuntimeError(f"the plugin's output differs from the reference: {case.hidden_states.shape}, layout {layout}")
        return {"cases": len(cases), "equal": "every bit"}

    def _enqueue(self, prefix: list[str], cases: list[tuple[Case, int]]) -> list[np.ndarray]:
        program = self.work / "plugin_enqueue"
        if not program.exists():
            self.build()
        requests, answers = self.work / "cases.bin", self.work / "outputs.bin"
        requests.write_bytes(b"".join(request_bytes(case, layout) for case, layout in cases))
        _run([*prefix, str(program), str(self.library_path()), str(requests), str(answers)])
        data, outputs = answers.read_bytes(), []
        for case, _ in cases:
            size = case.hidden_states.nbytes
            outputs.append(np.frombuffer(data[:size], np.uint8).view(DTYPES[case.dtype_code]).reshape(case.hidden_states.shape))
            data = data[size:]
        return outputs

    def sanitize(self) -> dict[str, object]:
        sanitizer = shutil.which("compute-sanitizer")
        if sanitizer is None:
            raise Skipped("compute-sanitizer is not on PATH (it comes with the CUDA toolkit)")
        cases = [(make_case(shape), layout) for shape, layout in SMALL_CASES]
        tools = ("memcheck", "racecheck", "initcheck", "synccheck")
        for tool in tools:
            self._enqueue([sanitizer, f"--tool={tool}", "--error-exitcode=9"], cases)
        return {"tools": tools, "cases": len(cases), "errors": 0}

    def repeats(self) -> dict[str, object]:
        library = load(self.library_path())
        for shape in (Shape(8, 32, 4, 512, 256), Shape(64, 32, 4, 512, 256), Shape(600, 16, 4, 512, 256, routing="skewed")):
            layer = DeviceLayer(library, self.device, self.abi_facts(), make_case(shape), MMA_S8)
            seen = set()
            for _ in range(100):
                layer.launch()
                seen.add(layer.output().tobytes())
            if len(seen) != 1:
                raise RuntimeError(f"{len(seen)} different outputs in 100 runs of {shape}")
        return {"runs": 100, "shapes": 3, "different_outputs": 0}

    def engine(self) -> dict[str, object]:
        try:
            from benchmarks.kernels import engine_check
        except ImportError as error:
            raise Skipped(f"{error}; install this package with its test extra") from error
        return engine_check.run(self.work / "engine", self.facts.compute_capability)

    def benchmark(self) -> dict[str, object]:
        return benchmark.run(load(self.library_path()), self.device, self.abi_facts(), self.facts.l2_bytes, self.quick)


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}\n{(done.stdout + done.stderr)[-6000:]}")
    return done.stdout


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "platform": platform.platform(), "machine": platform.machine()}
    try:
        versions["nvcc"] = _run(["nvcc", "--version"]).strip().splitlines()[-1]
    except (OSError, RuntimeError) as error:
        versions["nvcc"] = f"unknown: {error}"
    try:
        versions["torch"] = baselines.torch_with_cuda().__version__
    except baselines.Unavailable as error:
        versions["torch"] = str(error)
    try:
        fields = "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,driver_version,temperature.gpu"
        versions["nvidia-smi"] = f"{fields}: " + _run(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]).strip()
    except (OSError, RuntimeError) as error:
        versions["nvidia-smi"] = f"unknown: {error}"
    try:
        versions["commit"] = _run(["git", "-C", str(ROOT), "rev-parse", "HEAD"]).strip()
    except (OSError, RuntimeError):
        versions["commit"] = "unknown"
    return versions


def attempt(step: Callable[[], dict[str, object]]) -> dict[str, object]:
    try:
        return {"status": "passed", **step()}
    except Skipped as reason:
        return {"status": "skipped", "reason": str(reason)}
    except Exception:
        return {"status": "failed", "error": traceback.format_exc()[-6000:]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--quick", action="store_true", help="small shapes and few token counts")
    parser.add_argument("--out", type=Path, help="the JSON file (default: benchmarks/results/DATE-kernels-GPU.json)")
    args = parser.parse_args()
    try:
        device = Device()
        facts = device.facts()
    except CudaError as error:
        print(f"gpu_check: {error}. Run it on a machine with an NVIDIA GPU; nothing was checked.", file=sys.stderr)
        return 2
    now = datetime.datetime.now(datetime.UTC)
    report: dict[str, object] = {"date": now.isoformat(timespec="seconds"), "gpu": asdict(facts), "versions": _versions(),
                                 "quick": args.quick, "steps": {}}
    out = args.out or RESULTS / f"{now:%Y-%m-%d}-kernels-{facts.name.lower().replace(' ', '-')}.json"
    with tempfile.TemporaryDirectory(prefix="ecmfq-gpu-") as work:
        check = Check(device, Path(work), args.quick)
        for name in args.steps:
            result = attempt(getattr(check, name))
            report["steps"][name] = result
            print(f"{name}: {result['status']}" + (f" ({result['reason']})" if "reason" in result else ""), flush=True)
            if result["status"] == "failed":
                print(result["error"], file=sys.stderr)
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(report, indent=1, default=str) + "\n")  # after every step: a killed run keeps what it has
    print(f"written: {out}")
    return int(any(step["status"] == "failed" for step in report["steps"].values()))


if __name__ == "__main__":
    sys.exit(main())
