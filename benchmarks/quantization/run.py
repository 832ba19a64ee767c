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


class Report:
    """The sides' figures, written after each, so that an interrupted run leaves what it has."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        line = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
        self.processor = line.split(":")[1].strip()
        self.sides: dict[str, dict] = {}
        self._date = datetime.date.today().isoformat()
        name = re.sub(r"[^a-z0-9]+", "-", self.processor.lower()).strip("-")
        self.path = RESULTS / f"{self._date}-faq-layer-{name}-{threads}-threads.json"

    def side(self, label: str, python: str, script: str, *arguments: object) -> None:
        """Run one side and keep its last line."""
        print(f"{script} {' '.join(map(str, arguments))} ...", file=sys.stderr, flush=True)
        environment = {**os.environ, "OMP_NUM_THREADS": str(self._threads)}
        command = [python, str(HERE / script), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            raise SystemExit(f"{script} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        self.sides[label] = json.loads(done.stdout.strip().splitlines()[-1])
        report = {"date": self._date, "processor": self.processor, "threads": self._threads, "sides": self.sides}
        self.path.write_text(json.dumps(report, indent=1) + "\n")

    def table(self) -> str:
        """Times scaled to the whole layer; on one thread core time, else wall time."""
        floor = self.sides["floor"]
        clock = "core_seconds" if self._threads == 1 else "seconds"
        lines = [f"{self.processor}, {self._threads} threads; best product {floor['best rate'] / 1e9:.0f} GFLOP/s",
                 f"floor: {floor['arithmetic seconds']:.1f} s (arithmetic), {floor['library seconds']:.1f} s (library), "
                 f"{floor['FAQ seconds']:.1f} s (with what only FAQ computes)",
                 f"| side | experts run | Hessians, s | rounding, s | layer, s ({clock.replace('_', ' ')}) | times library floor | "
                 "times FAQ's floor | peak beside weights and results, GB | error of gate_up, down | cores of other processes |",
                 "|---" * 10 + "|"]
        for label, found in self.sides.items():
            if label == "floor":
                continue
            hessians, rounding = (EXPERTS / found["experts"] * found[clock][part] for part in ("hessians", "rounding"))
            total = hessians + rounding
            cells = [label, str(found["experts"]), f"{hessians:.1f}", f"{rounding:.1f}", f"{total:.1f}",
                     f"{total / floor['library seconds']:.2f}",
                     f"{total / floor['FAQ seconds']:.2f}" if label.startswith("ours") else "",
                     f"{(found['peak_bytes'] - found['result_bytes']) / 1e9:.2f}",
                     ", ".join(f"{error:.2e}" for error in found["error"]), f"{found['others']:.2f}"]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)


def main() -> None:
    """Run everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=EXPERTS, help="of ours and of llm-compressor (default 128)")
    parser.add_argument("--part", type=int, default=8, help="experts of the runs that show how time grows")
    parser.add_argument("--batch", type=int, default=4, help="experts that llm-compressor takes at a time")
    parser.add_argument("--first", type=int, default=4, help="experts of the runs without batches")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)),
                        help="of every side; 1 compares core time, which other work on the machine does not change")
    parser.add_argument("--llmcompressor", metavar="PYTHON")
    parser.add_argument("--gptqmodel", metavar="PYTHON")
    args = parser.parse_args()
    report = Report(args.threads)
    report.side("floor", sys.executable, "floor.py", "--experts", EXPERTS)
    if args.part != args.experts:
        report.side("ours, a part", sys.executable, "ours.py", "--experts", args.part)
    report.side("ours", sys.executable, "ours.py", "--experts", args.experts)
    if args.llmcompressor:
        if args.part != args.experts:
            report.side("llm-compressor, a part", args.llmcompressor, "peers.py", "llmcompressor", "--experts", args.part,
                        "--batch", args.batch)
        report.side("llm-compressor", args.llmcompressor, "peers.py", "llmcompressor", "--experts", args.experts, "--batch", args.batch)
        report.side("llm-compressor, one at a time", args.llmcompressor, "peers.py", "llmcompressor", "--experts", args.part,
                    "--first", args.first, "--batch", 1)
    if args.gptqmodel:
        report.side("GPTQModel", args.gptqmodel, "peers.py", "gptqmodel", "--experts", args.part, "--first", args.first)
    report.side("ours with the cross term", sys.executable, "ours.py", "--experts", args.part, "--cross")
    print(report.table())
    print(report.path)


if __name__ == "__main__":
    main()
