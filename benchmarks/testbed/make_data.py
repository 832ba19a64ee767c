"""Write the test bed's data: calibration pool, validation and test questions and captions.

    python benchmarks/testbed/make_data.py                # → benchmarks/testbed/data/{calibration,validation,test}

Deterministic; scenes of a split come from its seed range alone (cells.SPLITS), and no image is in two splits.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from cells import SPLITS, Scene, make_scene, render, vary
from dialogue import CAPTION_PROMPT, MATCH_PROMPT, QUESTIONS, ask_text, caption, different_caption
from PIL import Image

HERE = Path(__file__).resolve().parent
GROUP = 16
"""Captions of a file come in groups of so many near-duplicates: one scene and versions with one attribute moved."""
BINS = 1
"""Classes by which a near-duplicate's attribute moves at most: to the next of 16 hues or 6 sizes, or to another shape."""


@dataclass(frozen=True)
class Sizes:
    """How many questions and captions a split has."""

    questions: int
    captions: int


EVALUATION = {"validation": Sizes(300, 200), "test": Sizes(600, 400)}
CALIBRATION_SAMPLES = 768


def png(scene: Scene) -> bytes:
    """The scene's image file."""
    buffer = io.BytesIO()
    Image.fromarray(render([scene])[0]).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


class Folder:
    """A split's folder; images are numbered as they come."""

    def __init__(self, directory: Path):
        self.directory, self.files = directory, []
        shutil.rmtree(directory, ignore_errors=True)
        (directory / "images").mkdir(parents=True)

    def image(self, scene: Scene) -> str:
        """Write the scene's image; returns its name relative to the folder."""
        name = f"images/{len(self.files):04d}.png"
        (self.directory / name).write_bytes(png(scene))
        self.files.append(name)
        return name

    def jsonl(self, name: str, rows: list[dict]) -> None:
        """Write one object a line."""
        (self.directory / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        self.files.append(name)

    def manifest(self, split: str, counts: dict[str, int]) -> None:
        """Write manifest.json with the sha256 of every file."""
        text = {
            "schema_version": 1,
            "name": f"ecmfq-testbed-{split}",
            "source": "rendered by benchmarks/testbed/make_data.py; no third-party images or text",
            "license": "CC0-1.0",
            "split": {
                "name": split,
                "scene_seeds": [SPLITS[split].start, SPLITS[split].stop],
                "statement": "Scene seeds are disjoint from every other split's (benchmarks/testbed/cells.py, SPLITS).",
            },
            "counts": counts,
            "sha256": {n: hashlib.sha256((self.directory / n).read_bytes()).hexdigest() for n in sorted(self.files)},
        }
        (self.directory / "manifest.json").write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")


def ask_in_turn(i: int, scene: Scene, rng: np.random.Generator):
    """Question i of a file: types take turns, so that a part of the file keeps the mix; the last two turns are text-only."""
    kinds = [*QUESTIONS, "text", "text"]
    kind = kinds[i % len(kinds)]
    return ask_text(rng) if kind == "text" else QUESTIONS[kind](scene, rng)


def caption_scenes(split: str, count: int) -> list[Scene]:
    """`count` scenes with distinct captions, in groups of GROUP near-duplicates (only what captions do not name differs too)."""
    first = SPLITS[split].start + 500_000
    scenes, seen, seed = [], set(), first
    while len(scenes) < count:
        rng = np.random.default_rng(seed)
        base, group = make_scene(seed), []
        taken = set(seen)
        for k in range(min(GROUP, count - len(scenes))):
            for _ in range(50):
                # A version shares the caption attributes but not brightness, place and hand.
                other = make_scene(seed + k, (base.rows, base.cols)) if k else base
                moved = vary(base, rng, BINS) if k else base
                scene = Scene(base.rows, base.cols, moved.hue, moved.size, other.hand, moved.shape, other.nuisance, other.background)
                if caption(scene) not in taken:
                    taken.add(caption(scene))
                    group.append(scene)
                    break
        scenes += group
        seen |= taken
        seed += GROUP
    return scenes


def write_evaluation(directory: Path, split: str, sizes: Sizes) -> None:
    """Write questions.jsonl, captions.jsonl and their images."""
    folder = Folder(directory)
    questions, captions = [], []
    for i in range(sizes.questions):
        seed = SPLITS[split].start + i
        scene, rng = make_scene(seed), np.random.default_rng([seed, 1])
        qa = ask_in_turn(i, scene, rng)
        image = folder.image(scene) if qa.needs_image else None
        questions.append({"image": image, "question": qa.question, "answer": qa.answer, "type": qa.type})
    for i, scene in enumerate(caption_scenes(split, sizes.captions)):
        rng = np.random.default_rng([SPLITS[split].start, i, 2])
        distractors: list[str] = []
        while len(distractors) < 3:
            text = different_caption(scene, rng, BINS)
            if text not in distractors:
                distractors.append(text)
        captions.append({"image": folder.image(scene), "text": caption(scene), "distractors": distractors})
    folder.jsonl("questions.jsonl", questions)
    folder.jsonl("captions.jsonl", captions)
    folder.manifest(split, {"questions": len(questions), "captions": len(captions)})


def write_calibration(directory: Path, samples: int) -> None:
    """Write the calibration pool: five parts questions, two captions, one match, one text-only."""
    folder, records = Folder(directory), []
    kinds = [k for k in QUESTIONS if k not in ("caption", "match")]
    for i in range(samples):
        seed = SPLITS["calibration"].start + i
        scene, rng = make_scene(seed), np.random.default_rng([seed, 1])
        turn = i % 9
        if turn < 5:
            qa = QUESTIONS[kinds[rng.integers(len(kinds))]](scene, rng)
        else:
            qa = ask_text(rng) if turn == 8 else QUESTIONS["match" if turn == 7 else "caption"](scene, rng)
        image = folder.image(scene) if qa.needs_image else None
        records.append({"image": image, "text": qa.question, "answer": qa.answer})
    folder.jsonl("samples.jsonl", records)
    text_only = sum(r["image"] is None for r in records)
    folder.manifest("calibration", {"samples": len(records), "images": samples - text_only, "text_only": text_only})


def image_hashes(directory: Path) -> set[str]:
    """sha256 of every image of a split, from its manifest."""
    hashes = json.loads((directory / "manifest.json").read_text())["sha256"]
    return {digest for name, digest in hashes.items() if name.startswith("images/")}


def write_all(root: Path, evaluation: dict[str, Sizes] = EVALUATION, calibration: int = CALIBRATION_SAMPLES) -> None:
    """Write every split under `root`.

    Raises:
        ValueError: an image is in two splits (it would be a fault of the seed ranges).
    """
    write_calibration(root / "calibration", calibration)
    for split, sizes in evaluation.items():
        write_evaluation(root / split, split, sizes)
    splits = ("calibration", *evaluation)
    for i, one in enumerate(splits):
        for other in splits[i + 1 :]:
            if common := image_hashes(root / one) & image_hashes(root / other):
                raise ValueError(f"{len(common)} images are in both {one} and {other}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "data")
    args = parser.parse_args()
    write_all(args.out)
    print(f"wrote {args.out}: prompts '{CAPTION_PROMPT}' and '{MATCH_PROMPT}'")


if __name__ == "__main__":
    main()
