"""Writes `heldout/`: the small committed evaluation set that `ecmfq-export validate` reads.

    python heldout.py                       # remakes heldout/ (same bytes: seeds are fixed)

questions.jsonl: {"image", "question", "answer", "type"}; captions.jsonl: {"image", "text", "distractors"}, captions
all different, so that retrieval has one right answer. Scenes come from the held-out seed range alone.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from questions import QA, TYPE_WEIGHTS, ask, caption, distractor
from scenes import SPLITS, Scene, make_scene, render

HERE = Path(__file__).parent


def heldout_scenes(count: int, split: str = "heldout") -> list[Scene]:
    """The first `count` scenes of the split that have different captions."""
    scenes, seen = [], set()
    for seed in SPLITS[split]:
        scene = make_scene(seed)
        text = caption(scene)
        if text not in seen:
            seen.add(text)
            scenes.append(scene)
        if len(scenes) == count:
            return scenes
    raise ValueError(f"split {split!r} has fewer than {count} different captions")


def heldout_questions(scenes: list[Scene], count: int) -> list[tuple[int, QA]]:
    """`count` (scene index, question) pairs, types taking turns so that each is measured about equally."""
    items: list[tuple[int, QA]] = []
    asked: set[tuple[int, str]] = set()
    types, turn = tuple(TYPE_WEIGHTS), 0
    while len(items) < count:
        index = len(items) % len(scenes)
        rng = random.Random(f"heldout/{scenes[index].seed}/{turn}")
        qa = ask(scenes[index], rng, types[turn % len(types)])
        turn += 1
        if qa is not None and (index, qa.question) not in asked:
            asked.add((index, qa.question))
            items.append((index, qa))
    return items


def distractors(scene: Scene, count: int) -> list[str]:
    """Different near-duplicate captions, all false for the scene."""
    rng, found = random.Random(f"distractors/{scene.seed}"), []
    while len(found) < count:
        text = distractor(scene, rng)
        if text not in found:
            found.append(text)
    return found


def write_jsonl(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "heldout")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--questions", type=int, default=500)
    args = parser.parse_args()
    (args.out / "images").mkdir(parents=True, exist_ok=True)
    scenes = heldout_scenes(args.images)
    names = [f"images/{i:03d}.png" for i in range(len(scenes))]
    for name, scene in zip(names, scenes, strict=True):
        render(scene).save(args.out / name, optimize=True)
    questions = heldout_questions(scenes, args.questions)
    write_jsonl(
        args.out / "questions.jsonl",
        [{"image": names[i], "question": qa.question, "answer": qa.answer, "type": qa.type} for i, qa in questions],
    )
    write_jsonl(
        args.out / "captions.jsonl",
        [{"image": name, "text": caption(scene), "distractors": distractors(scene, 4)} for name, scene in zip(names, scenes, strict=True)],
    )


if __name__ == "__main__":
    main()
