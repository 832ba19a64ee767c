"""FAQ's weighted GPTQ of one MoE layer (Qwen3-VL-30B-A3B's shape, random weights) against public GPTQs and against a floor.

    python -m venv peers && peers/bin/pip install llmcompressor==0.14.0.1                    # environments of the peers
    python -m venv peers2 && peers2/bin/pip install gptqmodel==7.7.0
    python benchmarks/quantization/run.py --llmcompressor peers/bin/python --gptqmodel peers2/bin/python

Every side is a process of its own on the same weights, tokens, routing and token weights, one after the other. A table is printed,
and all figures go to ``benchmarks/results``. Nothing else should run meanwhile: the column "others" says how many cores other
processes used.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from problem import EXPERTS  # noqa: E402

RESULTS = HERE.parent / "results"


def side(python: str, script: str, *arguments: object) -> dict:
    """Run one side and read its last line."""
    print(f"{script} {' '.join(map(str, arguments))} ...", file=sys.stderr, flush=True)
    done = subprocess.run([python, str(HERE / script), *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{script} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def row(name: str, found: dict, floor: dict) -> str:
    """One line of the table; times are scaled to the whole layer."""
    scale = EXPERTS / found["experts"]
    seconds = [scale * found["seconds"][part] for part in ("hessians", "rounding")]
    total = sum(seconds)
    beside = (found["peak_bytes"] - found["result_bytes"]) / 1e9
    cells = [name, str(found["experts"]), f"{seconds[0]:.1f}", f"{seconds[1]:.1f}", f"{total:.1f}",
             f"{total / floor['library seconds']:.2f}", f"{total / floor['arithmetic seconds']:.2f}", f"{beside:.2f}",
             ", ".join(f"{error:.2e}" for error in found["error"]), f"{found['others']:.2f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Run everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=EXPERTS, help="of ours and of the faster peer (default 128)")
    parser.add_argument("--part", type=int, default=8, help="experts of the slower runs, whose time is scaled to 128")
    parser.add_argument("--llmcompressor", metavar="PYTHON")
    parser.add_argument("--gptqmodel", metavar="PYTHON")
    args = parser.parse_args()
    sides = {"floor": side(sys.executable, "floor.py", "--experts", EXPERTS),
             "ours": side(sys.executable, "ours.py", "--experts", args.experts),
             "ours, a part": side(sys.executable, "ours.py", "--experts", args.part),
             "ours with the cross term, a part": side(sys.executable, "ours.py", "--experts", args.part, "--cross")}
    if args.llmcompressor:
        parts = {batch: side(args.llmcompressor, "peers.py", "llmcompressor", "--experts", args.part, "--batch", batch) for batch in (1, 4)}
        batch = min(parts, key=lambda batch: sum(parts[batch]["seconds"].values()))
        sides |= {f"llm-compressor, batches of {batch}, a part": found for batch, found in parts.items()}
        sides["llm-compressor"] = side(args.llmcompressor, "peers.py", "llmcompressor", "--experts", args.experts, "--batch", batch)
    if args.gptqmodel:
        sides["GPTQModel, a part"] = side(args.gptqmodel, "peers.py", "gptqmodel", "--experts", args.part)
    processor = next(line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    report = {"date": datetime.date.today().isoformat(), "processor": processor, "cores": len(os.sched_getaffinity(0)), "sides": sides}
    name = re.sub(r"[^a-z0-9]+", "-", processor.lower()).strip("-")
    path = RESULTS / f"{report['date']}-faq-layer-{name}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    floor = sides.pop("floor")
    print(f"{processor}, {report['cores']} cores; best product {floor['best rate'] / 1e9:.0f} GFLOP/s")
    print(f"floor: {floor['arithmetic seconds']:.1f} s (arithmetic), {floor['library seconds']:.1f} s (library); "
          f"the search of scales beside it: {floor['scale search seconds']:.1f} s")
    print("| side | experts run | Hessians, s | rounding, s | layer, s | times library floor | times arithmetic floor | "
          "peak beside weights and results, GB | error of gate_up, down | others |")
    print("|---" * 10 + "|")
    for label, found in sides.items():
        print(row(label, found, floor))
    print(path)


if __name__ == "__main__":
    main()
