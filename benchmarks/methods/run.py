"""Run methods over models, stress forms and seeds, and keep one row a run.

    python benchmarks/methods/run.py --split test --seeds 0 1 2                  # the main comparison
    python benchmarks/methods/run.py --split validation --variants ablations     # choices are made here

A run quantizes one model with one method and seed through the package's own stages and evaluates the quantized checkpoint.
Finished runs are kept (``--out``, one JSON file each), so that an interrupted comparison continues where it was. The seed
draws the calibration pool (half of the split's samples) and is the methods' own seed.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from variants import ABLATIONS, METHODS, STRESSES, settings_of  # noqa: E402

POOL_SHARE = 0.5
SEED_FREE = ("rtn",)
"""Methods that read no calibration data: one run stands for every seed."""


@dataclass(frozen=True)
class Job:
    """Every run on one form of one model: what the floating-point model answers is computed once for all of them."""

    model: str
    stress: str
    variants: tuple[str, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """What all jobs share."""

    testbed: Path
    split: str
    out: Path
    work: Path
    settings: dict[str, Any]
    candidates: int


def checkpoint_of(plan: Plan, model: str, stress: str) -> Path:
    """Where the test bed keeps a form of a model."""
    return plan.testbed / "checkpoints" / model if stress == "plain" else plan.testbed / "stressed" / f"{model}.{stress}"


def row_path(plan: Plan, model: str, stress: str, variant: str, seed: int) -> Path:
    """The result file of one run."""
    slug = "".join(c if c.isalnum() else "_" for c in variant)
    extra = "".join(f".{k}-{v}" for k, v in sorted(plan.settings.items()))
    return plan.out / plan.split / f"{model}.{stress}" / f"{slug}{extra}.seed{seed}.json"


def draw_pool(plan: Plan, family_data: Path, seed: int) -> Path:
    """Half of the calibration samples, drawn by the seed, as a JSONL file with absolute image paths."""
    source = family_data / "calibration"
    path = plan.work / "pools" / f"{family_data.name}.seed{seed}.jsonl"
    if not path.exists():
        rows = [json.loads(line) for line in (source / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
        kept = sorted(random.Random(seed).sample(range(len(rows)), round(POOL_SHARE * len(rows))))
        for row in rows:
            if row.get("image"):
                row["image"] = str((source / row["image"]).resolve())
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(f".{os.getpid()}")
        beside.write_text("".join(json.dumps(rows[i]) + "\n" for i in kept), encoding="utf-8")
        beside.rename(path)
    return path


def run_job(plan: Plan, job: Job) -> None:
    """Every missing run of a job."""
    import torch

    torch.set_num_threads(1)
    from ecmfq_export.models.moe_vlm import open_model
    from ecmfq_export.progress import Silent
    from ecmfq_export.validate.evaluation.evalset import prepare
    from ecmfq_export.validate.evaluation.run import evaluate

    missing = [(variant, seed) for variant in job.variants for seed in (job.seeds[:1] if variant in SEED_FREE else job.seeds)
               if not row_path(plan, job.model, job.stress, variant, seed).exists()]
    if not missing:
        return
    fp_dir = checkpoint_of(plan, job.model, job.stress)
    data = plan.testbed / "data"
    evalset = prepare(fp_dir, data / plan.split, candidates=plan.candidates)
    model = open_model(fp_dir)
    reference = evaluate(model, evalset)
    floating = row_path(plan, job.model, job.stress, "float", 0)
    write_row(floating, {"model": job.model, "stress": job.stress, "variant": "float", "seed": 0,
                         "headlines": reference.headlines(), "items": reference.items})
    for variant, seed in missing:
        started = time.perf_counter()
        path = row_path(plan, job.model, job.stress, variant, seed)
        work = plan.work / f"{job.model}.{job.stress}" / f"seed{seed}"
        quantized, facts = quantize(plan, fp_dir, draw_pool(plan, data, seed), work, variant, seed, Silent())
        middle = time.perf_counter()
        result = evaluate(open_model(quantized), evalset, reference=reference, resamples=0)
        shutil.rmtree(quantized)
        row = {"model": job.model, "stress": job.stress, "variant": variant, "seed": seed, **facts,
               "quantize_s": middle - started, "evaluate_s": time.perf_counter() - middle,
               "headlines": result.headlines(), "items": result.items}
        write_row(path, row)
        found = result.headlines()
        print(f"{job.model}.{job.stress} {variant} seed {seed}: " + " ".join(
            f"{key} {found[key]:.4g}" for key in ("retention.vqa", "embedding.mean", "p_yes.mean", "kl.answers") if key in found)
            + f"  ({middle - started:.0f} + {row['evaluate_s']:.0f} s)", flush=True)


def quantize(
    plan: Plan, fp_dir: Path, pool: Path, work: Path, variant: str, seed: int, progress: Any
) -> tuple[Path, dict[str, Any]]:
    """One quantized checkpoint through the package's stages; stages that variants share are kept under `work`."""
    from ecmfq_export import bundle
    from ecmfq_export.config import QuantConfig, build_config
    from ecmfq_export.workflow import quantize_model

    config = build_config(QuantConfig, {**settings_of(variant), **plan.settings, "seed": seed}, variant)
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(config), sort_keys=True).encode()).hexdigest()[:12]
    out = work / digest / "quantized"
    quantize_model(fp_dir, pool, out, config, progress)
    info = bundle.read_manifest(out, "quantize").info
    return out, {"settings": dataclasses.asdict(config), "quantized_bytes": info["quantized_bytes"],
                 "quantized_bytes_in_16_bits": info["quantized_bytes_in_16_bits"],
                 "checkpoint_bytes": sum(f.stat().st_size for f in out.glob("*.safetensors"))}


def write_row(path: Path, row: dict[str, Any]) -> None:
    """Whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}.tmp")
    beside.write_text(json.dumps(row, default=lambda array: array.tolist()), encoding="utf-8")
    beside.rename(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--testbed", type=Path, default=HERE.parent / "testbed")
    parser.add_argument("--models", nargs="+", default=["qwen_a", "qwen_b", "kimi_a", "kimi_b"])
    parser.add_argument("--stress", nargs="+", default=list(STRESSES), choices=STRESSES)
    parser.add_argument("--variants", nargs="+", default=["methods"], help="names, or 'methods', 'ablations' for all of them")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--candidates", type=int, default=48, help="images and texts of the P(yes) protocol")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of every run, e.g. attention=w4a8")
    parser.add_argument("--out", type=Path, default=HERE / "out" / "rows")
    parser.add_argument("--work", type=Path, default=HERE / "out" / "work")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args()

    from ecmfq_export.config import split_settings

    settings, _ = split_settings(args.set)
    groups = {"methods": METHODS, "ablations": tuple(ABLATIONS)}
    variants = tuple(name for given in args.variants for name in groups.get(given, (given,)))
    for name in variants:
        settings_of(name)
    plan = Plan(args.testbed.resolve(), args.split, args.out.resolve(), args.work.resolve(), settings, args.candidates)
    jobs = [Job(model, stress, variants, tuple(args.seeds)) for model in args.models for stress in args.stress]
    absent = [str(checkpoint_of(plan, j.model, j.stress)) for j in jobs if not checkpoint_of(plan, j.model, j.stress).is_dir()]
    if absent:
        parser.error(f"no checkpoint at {', '.join(absent)}; make them as benchmarks/testbed/README.md says")
    os.environ["OMP_NUM_THREADS"] = "1"
    with multiprocessing.get_context("spawn").Pool(args.workers, maxtasksperchild=1) as pool:
        failures = []
        results = [(job, pool.apply_async(run_job, (plan, job))) for job in jobs]
        for job, result in results:
            try:
                result.get()
            except Exception as error:  # the other jobs go on; the exit code tells
                failures.append(f"{job.model}.{job.stress}: {type(error).__name__}: {error}")
    for failure in failures:
        print(failure, file=sys.stderr)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
