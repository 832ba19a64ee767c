"""Compile the kernels for every SM and print what each one uses: registers, shared memory, spills, tensor-core and 16-byte instructions.

    python benchmarks/kernels/resource_table.py                     # all SMs, a Markdown table
    python benchmarks/kernels/resource_table.py --sm 87 --json out.json
    python benchmarks/kernels/resource_table.py --show out.json     # print it again

Needs nvcc, and cuobjdump with nvdisasm beside it (CUDA toolkit, or `pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm`). No GPU.
Exits with 1 when a kernel spills or a GEMM has no IMMA.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

PLUGINS = Path(__file__).resolve().parents[2] / "plugins"
ALL_SMS = (80, 86, 87, 89, 90, 100, 110, 120, 121)
# Shared memory is dynamic, so it is not in the binary; these are the launches' figures for 128 experts (see the kernels' headers).
DYNAMIC_SHARED = {"gemm_prefill": 3 * 12288 + 512 + 129 * 4, "gemm_decode 8": 4096, "gemm_decode 32": 16384, "prepare": 128,
                  "quantize_intermediate": 128, "sum_slots": 0}
THREADS = {"gemm_prefill": 256, "gemm_decode": 128, "prepare": 256, "quantize_intermediate": 128, "sum_slots": 128}


def find_tool(name: str, given: str | None) -> str:
    """The tool's path: as given, on PATH, or inside an installed nvidia package."""
    candidates = [given, shutil.which(name)]
    for folder in sys.path:
        candidates += [str(p) for p in Path(folder or ".").glob(f"nvidia/*/bin/{name}")]
    for candidate in candidates:
        if candidate and os.access(candidate, os.X_OK):
            return candidate
    sys.exit(f"{name} not found: give --{name}, or install the CUDA toolkit or the PyPI package nvidia-cuda-{name}")


def run(command: list[str], **extra: object) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, **extra).stdout


def kernel_name(mangled: str) -> str:
    """A short name: kernel, which GEMM, groups, layout, tokens."""
    kernel = re.search(r"\d+((?:gemm_\w+?|prepare|quantize_intermediate|sum_slots))_kernel", mangled)
    if not kernel:
        return mangled
    name = kernel[1]
    if not name.startswith("gemm"):
        return f"{name} {'fp16' if '7Float16' in mangled else 'bf16' if '8BFloat16' in mangled else 'fp32'}"
    parts = [name]
    tokens = re.search(r"Li(\d+)EEE", mangled)
    if tokens:
        parts.append(str(8 * int(tokens[1])))
    parts.append("gate_up" if "4GemmE0" in mangled else "down")
    parts.append("grouped" if "ELb1E" in mangled else "channel")
    layout = re.search(r"12WeightLayoutE(\d)", mangled)
    if layout:
        parts.append("mma_s8" if layout[1] == "1" else "row_major")
    return " ".join(parts)


def measure(sms: list[int], nvcc: str, cuobjdump: str) -> tuple[list[dict[str, object]], dict[str, float]]:
    """One row a kernel and SM, and the CPU seconds that each file took for all SMs."""
    rows, seconds = [], {}
    env = dict(os.environ, PATH=f"{Path(cuobjdump).parent}{os.pathsep}{os.environ['PATH']}")
    with tempfile.TemporaryDirectory() as work:
        for source in sorted((PLUGINS / "src").glob("*.cu")):
            fat = Path(work) / f"{source.stem}.fatbin"
            targets = [f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in sms]
            before = os.times()
            run([nvcc, "-std=c++17", "-O3", "--threads=4", f"-I{PLUGINS / 'include'}", f"-I{PLUGINS / 'capi'}", *targets, "-fatbin",
                 str(source), "-o", str(fat)])
            after = os.times()
            seconds[source.name] = after.children_user + after.children_system - before.children_user - before.children_system
            usage, code = read_usage(run([cuobjdump, "--dump-resource-usage", str(fat)], env=env)), Counter()
            if not usage:
                continue
            code = read_code(run([cuobjdump, "-sass", str(fat)], env=env))
            for key, used in usage.items():
                rows.append({"sm": key[0], "kernel": kernel_name(key[1]), **used, **code[key]})
    return sorted(rows, key=lambda r: (str(r["kernel"]), int(r["sm"]))), seconds


def read_usage(text: str) -> dict[tuple[int, str], dict[str, int]]:
    usage, sm, function = {}, 0, ""
    for line in text.splitlines():
        if found := re.search(r"arch = sm_(\d+)", line):
            sm = int(found[1])
        elif found := re.search(r"Function (\S+):", line):
            function = found[1]
        elif found := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            usage[sm, function] = {"registers": int(found[1]), "stack": int(found[2]), "static_shared": int(found[3])}
    return usage


def read_code(text: str) -> dict[tuple[int, str], dict[str, int]]:
    counts: dict[tuple[int, str], Counter[str]] = defaultdict(Counter)
    sm, function = 0, ""
    for line in text.splitlines():
        if found := re.search(r"arch = sm_(\d+)", line):
            sm = int(found[1])
        elif found := re.search(r"Function : (\S+)", line):
            function = found[1]
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", line):
            op = found[1]
            key = counts[sm, function]
            key["instructions"] += 1
            key["imma"] += op.startswith("IMMA")
            key["ldg128"] += op.startswith("LDG.") and ".128" in op
            key["ldgsts128"] += op.startswith("LDGSTS") and ".128" in op
            key["lds"] += op.startswith("LDS") and not op.startswith("LDGSTS")
            key["local"] += op.startswith(("LDL", "STL"))
    return {key: dict(value) for key, value in counts.items()}


def blocks_on_an_sm(row: dict[str, object], shared: int) -> int:
    """By registers, threads (1536 on SM86, 87, 89, 110, 12x, else 2048), shared memory (100 KB on SM86, 89, 12x, else 164 or more)."""
    sm, name = int(row["sm"]), str(row["kernel"]).split()[0]
    threads = THREADS[name]
    registers = -(-int(row["registers"]) // 8) * 8 * threads
    small = sm in (86, 87, 89, 110, 120, 121)
    kilobytes = 100 if sm in (86, 89, 120, 121) else 164
    return min(65536 // registers, (1536 if small else 2048) // threads, kilobytes * 1024 // (shared + 1024))


def print_table(rows: list[dict[str, object]]) -> list[str]:
    """Print one line a kernel; returns what is wrong: spills, or a GEMM without tensor-core instructions."""
    sms = sorted({int(r["sm"]) for r in rows})
    print("| kernel | shared bytes | IMMA | LDG.128 | LDGSTS.128 | stack, local | " + " | ".join(f"SM {sm}" for sm in sms) + " |")
    print("|---" * (6 + len(sms)) + "|")
    bad = []
    for name in dict.fromkeys(str(r["kernel"]) for r in rows):
        same = {int(r["sm"]): r for r in rows if r["kernel"] == name}
        shared = next(v for k, v in DYNAMIC_SHARED.items() if name.startswith(k))
        spread = []
        for field in ("imma", "ldg128", "ldgsts128"):
            values = sorted({int(r[field]) for r in same.values()})
            spread.append(str(values[0]) if len(values) == 1 else f"{values[0]}-{values[-1]}")
        local = max(int(r["stack"]) + int(r["local"]) for r in same.values())
        cells = [f"{same[sm]['registers']} / {blocks_on_an_sm(same[sm], shared)}" for sm in sms]
        print(f"| {name} | {shared} | {' | '.join(spread)} | {local} | {' | '.join(cells)} |")
        bad += [f"{name} sm_{sm}: {r['local']} local accesses, {r['imma']} IMMA" for sm, r in same.items()
                if r["local"] or (name.startswith("gemm") and not r["imma"])]
    return bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sm", type=int, nargs="*", default=list(ALL_SMS))
    parser.add_argument("--nvcc")
    parser.add_argument("--cuobjdump")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--show", type=Path, help="print the table of an earlier --json; compiles nothing")
    args = parser.parse_args()
    if args.show:
        report = json.loads(args.show.read_text())
    else:
        nvcc, cuobjdump = find_tool("nvcc", args.nvcc), find_tool("cuobjdump", args.cuobjdump)
        rows, seconds = measure(args.sm, nvcc, cuobjdump)
        report = {"rows": rows, "compile_cpu_seconds": seconds}
        if args.json:
            args.json.write_text(json.dumps(report, indent=1) + "\n")
    bad = print_table(report["rows"])
    seconds = report["compile_cpu_seconds"]
    cpu = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    print(f"\nA cell is registers a thread / blocks that fit on an SM. Compile time in CPU seconds: {cpu}; "
          f"{sum(seconds.values()):.0f} s in all.")
    for line in bad:
        print(f"BAD: {line}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
