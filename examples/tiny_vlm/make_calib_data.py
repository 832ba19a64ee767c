"""Writes `calib_data/`: the small calibration pool that ships with the project.

    python make_calib_data.py               # remakes calib_data/images, samples.jsonl and manifest.json

Scenes come from the calibration seed range alone, which overlaps neither training nor the held-out set.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from pathlib import Path

from heldout import write_jsonl
from questions import CAPTION_PROMPT, ask_any, ask_text, caption
from scenes import SPLITS, make_scene, render

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "calib_data")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--text-only", type=int, default=64)
    args = parser.parse_args()
    (args.out / "images").mkdir(parents=True, exist_ok=True)
    seeds = SPLITS["calibration"][: args.images]
    records, files = [], []
    for number, seed in enumerate(seeds):
        scene, rng = make_scene(seed), random.Random(f"calibration/{seed}")
        name = f"images/{number:03d}.png"
        render(scene).save(args.out / name, optimize=True)
        files.append(name)
        qa = ask_any(scene, rng, exclude=("caption",))
        records.append({"image": name, "text": qa.question, "answer": qa.answer})
        # Every other image is also described: long answers are what covers many tokens of the answer side.
        if number % 2 == 0:
            records.append({"image": name, "text": CAPTION_PROMPT, "answer": caption(scene)})
    rng = random.Random("calibration/text")
    for _ in range(args.text_only):
        qa = ask_text(rng)
        records.append({"image": None, "text": qa.question, "answer": qa.answer})
    write_jsonl(args.out / "samples.jsonl", records)
    files.append("samples.jsonl")
    manifest = {
        "schema_version": 1,
        "name": "ecmfq-synthetic-shapes-calibration",
        "source": "rendered by examples/tiny_vlm/make_calib_data.py; no third-party images or text",
        "license": "CC0-1.0",
        "split": {
            "name": "calibration",
            "scene_seeds": [seeds.start, seeds.stop],
            "statement": "Scene seeds are disjoint from the training, validation and held-out ranges "
            "(examples/tiny_vlm/scenes.py, SPLITS); no image here is used in training or evaluation.",
        },
        "counts": {"images": len(seeds), "samples": len(records), "text_only": args.text_only},
        "sha256": {name: hashlib.sha256((args.out / name).read_bytes()).hexdigest() for name in sorted(files)},
    }
    (args.out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


if __name__ == "__main__":
    main()
