"""Reading questions, captions and COCO annotations, and preparing them as prompts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ecmfq_export.errors import UserError
from ecmfq_export.validate.evaluation.data import load_data
from ecmfq_export.validate.evaluation.evalset import prepare
from tests.validate.evaluation.conftest import YES_NO


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """COCO's layout: annotations/captions_val.json and val/*.jpg, 3 images with 5, 5 and 6 captions, one image without any."""
    root = tmp_path_factory.mktemp("coco")
    (root / "annotations").mkdir()
    (root / "val").mkdir()
    for i in range(4):
        Image.fromarray(np.full((16, 16, 3), 40 * i, np.uint8)).save(root / f"val/{i}.png")
    annotations = [{"image_id": i, "caption": f" caption {c} of {i} "} for c in range(5) for i in range(3)]
    annotations.append({"image_id": 2, "caption": "a sixth"})
    path = root / "annotations/captions_val.json"
    path.write_text(json.dumps({"images": [{"id": i, "file_name": f"{i}.png"} for i in range(4)], "annotations": annotations}))
    return path


def test_directory(data: Path) -> None:
    found = load_data(data)
    assert len(found.questions) == 8 and found.gallery is not None
    assert len(found.gallery.images) == len(found.gallery.texts) == 5 and found.gallery.owner == (0, 1, 2, 3, 4)
    assert [len(d) for d in found.gallery.distractors] == [0, 1, 2, 0, 1]
    assert len(load_data(data, limit=3, captions=2).questions) == 3
    assert load_data(data).fingerprint() == found.fingerprint() != load_data(data, captions=2).fingerprint()


def test_one_file_is_known_by_its_lines(data: Path) -> None:
    assert load_data(data / "questions.jsonl").gallery is None
    only = load_data(data / "captions.jsonl")
    assert only.gallery is not None and not only.questions


def test_all_captions_of_a_coco_image_are_true(coco: Path, checkpoint: Path) -> None:
    found = load_data(coco)
    assert found.gallery is not None
    assert len(found.gallery.images) == 3 and len(found.gallery.texts) == 16
    assert found.gallery.owner == (0,) * 5 + (1,) * 5 + (2,) * 6
    assert found.gallery.texts[found.gallery.first_text(1)] == "caption 0 of 1"
    evalset = prepare(checkpoint, coco, candidates=0, yes_no=YES_NO)
    assert evalset.tasks == ("perplexity", "embedding", "p_yes")
    assert {name: span.stop - span.start for name, span in evalset.spans.items()} == {
        "captions": 16, "images": 3, "texts": 16, "matches": 9}  # fmt: skip


def test_an_image_on_several_lines_has_several_texts(data: Path, tmp_path: Path) -> None:
    image = str(data / "images/0.png")
    rows = [{"image": image, "text": "a"}, {"image": str(data / "images/1.png"), "text": "b"}, {"image": image, "text": "c"}]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    gallery = load_data(tmp_path).gallery
    assert gallery is not None and gallery.texts == ("a", "c", "b") and gallery.owner == (0, 0, 1)


def test_equal_texts_are_asked_once(data: Path, tmp_path: Path, checkpoint: Path) -> None:
    rows = [{"image": str(data / f"images/{i}.png"), "text": text} for i, text in enumerate(["same", "other", "same"])]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    evalset = prepare(checkpoint, tmp_path, yes_no=YES_NO)
    assert evalset.ranked.tolist() == [0, 1, 0] and evalset.candidates is not None
    assert evalset.candidates.columns.tolist() == [0, 1, 0]
    assert evalset.spans["matches"].stop - evalset.spans["matches"].start == 3 * 2


def test_near_duplicates_may_join_the_gallery(data: Path, checkpoint: Path) -> None:
    assert len(prepare(checkpoint, data, tasks=["embedding"]).ranked) == 5
    assert len(prepare(checkpoint, data, tasks=["embedding"], distractors=True).ranked) == 9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["vqa", "bleu"]}, "no task 'bleu'.*\n.*tasks: vqa, perplexity, embedding, p_yes, retrieval"),
        ({"tasks": []}, "no task given"),
        ({"candidates": 1}, "1 candidates are out of range"),
        ({"captions": 1}, "1 images with captions.*\n.*at least two"),
        ({"captions": -1}, "-1 captions"),
        ({"yes_no": ("yes", "no")}, "'yes' is 3 tokens.*\n.*leave p_yes out"),
    ],
)
def test_wrong_options_are_named(data: Path, checkpoint: Path, options: dict, message: str) -> None:
    with pytest.raises(UserError) as caught:
        prepare(checkpoint, data, **{"yes_no": YES_NO, **options})
    assert __import__("re").search(message, str(caught.value)), str(caught.value)


def test_tasks_that_the_data_do_not_allow(data: Path, checkpoint: Path) -> None:
    with pytest.raises(UserError, match="does not allow embedding: it has 8 questions and 0 images with captions"):
        prepare(checkpoint, data / "questions.jsonl", tasks=["embedding"])


def test_wrong_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no evaluation data at"):
        load_data(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="neither questions.jsonl nor captions.jsonl"):
        load_data(tmp_path)
    (tmp_path / "bad.jsonl").write_text("{oops")
    with pytest.raises(UserError, match="is no JSONL file"):
        load_data(tmp_path / "bad.jsonl")
    (tmp_path / "boxes.json").write_text(json.dumps({"images": [], "annotations": [{"image_id": 1, "bbox": []}]}))
    with pytest.raises(UserError, match="an annotation has no caption"):
        load_data(tmp_path / "boxes.json")
