"""Export checkpoints of real layer shapes and growing depth, and write down time and peak memory, whole and by stage.

    python benchmarks/sizes/run.py --layers 4 8 16 --work /tmp/sizes --out benchmarks/results/DATE-sizes-CPU.json
    python benchmarks/sizes/run.py --layers 16 --memory-max 8G --work /tmp/sizes --out ...      # the kernel holds it to that

Each depth gets a checkpoint (see checkpoint.py), exported by the command line in a process of its own to a bundle with a
built engine; both are deleted afterwards. Calibration is kept to a few short samples: their number adds to the time of every
layer by the same factor and to no peak. Results are added to the file run by run, so an interrupted series can go on; under "fit" are
straight lines through the depths (see fit.py) for each choice of settings. Random weights may fail a threshold of the report, which ends
the command with an error behind a finished bundle: "finished" and "passed" say what was.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT)]  # run as a file, not as a module

from checkpoint import write_checkpoint  # noqa: E402
from fit import summarize, table  # noqa: E402
from limits import limited, parse_size  # noqa: E402
from measure import run_measured  # noqa: E402

DEFAULTS = ["num_samples=8", "weighting=rho_g_phi", "smoothing=none"]
"""Few samples, one weighting of the four that are compared by default, and no search for scales."""


def make_pool(path: Path, size: int) -> Path:
    """The first `size` samples of the bundled calibration data, by absolute image paths."""
    source = ROOT / "calib_data"
    rows = [json.loads(line) for line in (source / "samples.jsonl").read_text(encoding="utf-8").splitlines()[:size]]
    for row in rows:
        if row.get("image"):
            row["image"] = str((source / row["image"]).resolve())
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def tree_bytes(directory: Path) -> dict[str, int]:
    """Bytes of each part of a bundle."""
    parts = [*(directory / "stages").glob("*"), directory / "onnx", *(directory / "engines").glob("*"), directory / "report"]
    return {part.relative_to(directory).as_posix(): sum(f.stat().st_size for f in part.rglob("*") if f.is_file())
            for part in sorted(parts) if part.is_dir()}


def run_one(layers: int, args: argparse.Namespace) -> dict[str, Any]:
    """One depth: make, export, measure, delete."""
    model, bundle = args.work / f"model{layers}", args.work / f"bundle{layers}"
    if not (model / "config.json").is_file():
        shutil.rmtree(model, ignore_errors=True)
        write_checkpoint(model, layers, small=args.small)
    pool = make_pool(args.work / "pool.jsonl", args.pool)
    shutil.rmtree(bundle, ignore_errors=True)
    settings = dict(item.split("=", 1) for item in args.set)
    command = [sys.executable, "-m", "ecmfq_export.cli", "export", str(model), "--data", str(pool), "--target", args.target,
               "-o", str(bundle), "--max-seq-len", str(args.max_seq_len), "--max-batch", "1", *shlex.split(args.options)]
    for name, value in settings.items():
        command += ["--set", f"{name}={value}"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    with limited(command, args.memory_max) as (held, limit):
        cost = run_measured(held, args.work / f"export{layers}.log", bundle, environment)
    report = bundle / "report" / "report.json"
    finished = (bundle / "manifest.json").is_file()  # written last
    if not finished:
        print(f"{layers} layers: exit code {cost.returncode}; see {args.work / f'export{layers}.log'}", file=sys.stderr)
    row = {"layers": layers, "returncode": cost.returncode, "finished": finished,
           "passed": json.loads(report.read_text())["passed"] if report.is_file() else None,
           "shapes": "small" if args.small else "Qwen3-VL-30B-A3B",
           "checkpoint_bytes": sum(f.stat().st_size for f in model.iterdir()), "bundle_bytes": tree_bytes(bundle),
           "settings": settings, "pool": args.pool, "max_seq_len": args.max_seq_len, "target": args.target, "options": args.options,
           "load_average": os.getloadavg()[1], "limit": limit or None, **cost.as_dict()}
    if not args.keep:
        shutil.rmtree(model)
        shutil.rmtree(bundle, ignore_errors=True)
    return row


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return {"date": datetime.date.today().isoformat(), "cpu": cpu, "cores": os.cpu_count(), "python": platform.python_version(),
            "commit": commit, "threads": os.environ.get("OMP_NUM_THREADS", "all")}


def fits(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A summary for each choice of shapes, settings and options that two depths or more were run with."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        choice = {name: run[name] for name in ("shapes", "settings", "options", "pool", "max_seq_len")} | {"limit": bool(run.get("limit"))}
        groups.setdefault(json.dumps(choice, sort_keys=True), []).append(run)
    found = [(json.loads(choice), summarize(group)) for choice, group in groups.items()]
    return [choice | summary for choice, summary in found if summary is not None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--work", type=Path, required=True, help="scratch: about 2.2 GB a layer and 8 GB")
    parser.add_argument("--out", type=Path, required=True, help="results, JSON; rows are added")
    parser.add_argument("--target", default="rtx")
    parser.add_argument("--pool", type=int, default=12, help="calibration samples to choose from")
    parser.add_argument("--max-seq-len", type=int, default=1024)
    parser.add_argument("--set", nargs="+", default=DEFAULTS, metavar="KEY=VALUE", help=f"settings (default: {' '.join(DEFAULTS)})")
    parser.add_argument("--options", default="--expert-weights inputs", metavar="TEXT",
                        help="further options of export, one text (default: '--expert-weights inputs')")
    parser.add_argument("--memory-max", type=parse_size, metavar="SIZE",
                        help="run the export in a control group of so much memory, page cache included")
    parser.add_argument("--small", action="store_true", help="layers of a thirtieth of the size, see checkpoint.py")
    parser.add_argument("--keep", action="store_true", help="keep checkpoints and bundles")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    for layers in args.layers:
        data = json.loads(args.out.read_text()) if args.out.is_file() else {"machine": machine(), "runs": []}
        data["runs"].append(run_one(layers, args))
        data["fit"] = fits(data["runs"])
        args.out.write_text(json.dumps(data, indent=1) + "\n")
        print(json.dumps(data["runs"][-1]), flush=True)
    for fit in data["fit"]:
        print(f"\n{fit['shapes']}, {fit['settings']}, {fit['options']}\n{table(fit)}")


if __name__ == "__main__":
    main()
