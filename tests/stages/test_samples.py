"""Reading calibration pools: three forms, and every way they can be wrong."""

import hashlib
import json

import pytest
from PIL import Image

from ecmfq_export.errors import UserError
from ecmfq_export.stages.samples import CAPTION_REQUEST, load_pool, pool_fingerprint
from tests.stages.common import make_pool


def image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)


def jsonl(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_jsonl_with_text_only_samples_blank_lines_and_extra_keys(tmp_path):
    image(tmp_path / "a b.png")
    file = jsonl(tmp_path / "s.jsonl", {"image": "a b.png", "text": "x", "answer": "y", "id": 3}, "", {"text": "z", "image": None})
    first, second = load_pool(file)
    assert (first.image, first.text, first.answer, first.name) == (tmp_path / "a b.png", "x", "y", "s.jsonl:1")
    assert (second.image, second.answer, second.name) == (None, None, "s.jsonl:3")


def test_absolute_image_paths_are_taken(tmp_path):
    image(tmp_path / "elsewhere" / "a.png")
    file = jsonl(tmp_path / "data" / "s.jsonl", {"image": str(tmp_path / "elsewhere" / "a.png"), "text": "x"}, {"text": "y"})
    assert load_pool(file)[0].image == tmp_path / "elsewhere" / "a.png"


def coco(path, **change):
    data = {"images": [{"id": 5, "file_name": "5.jpg"}, {"id": 6, "file_name": "6.jpg"}, {"id": 7, "file_name": "7.jpg"}],
            "annotations": [{"image_id": 6, "caption": " six "}, {"image_id": 5, "caption": "five"}, {"image_id": 5, "caption": "v"}]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data | change))
    return path


@pytest.mark.parametrize("layout", ["images", ".", "../val2017"])
def test_coco_captions(tmp_path, layout):
    file = coco(tmp_path / "annotations" / "captions_val2017.json")
    for number in (5, 6):
        image(file.parent / layout / f"{number}.jpg")
    samples = load_pool(file)
    assert [(s.text, s.answer) for s in samples] == [(CAPTION_REQUEST, "five"), (CAPTION_REQUEST, "six")]
    assert all(s.image.is_file() for s in samples)


def test_directory_checks_its_hashes(tmp_path):
    pool = make_pool(tmp_path / "pool")
    files = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in pool.iterdir()}
    (pool / "manifest.json").write_text(json.dumps({"sha256": files}))
    samples = load_pool(pool)
    before = pool_fingerprint(pool, samples)
    assert len(samples) == 16 and before == pool_fingerprint(pool, samples)
    image(pool / "1.png")
    with pytest.raises(UserError, match="1.png: sha256"):
        load_pool(pool)
    assert pool_fingerprint(pool, samples) != before
    del files["1.png"]
    (pool / "manifest.json").write_text(json.dumps({"sha256": files}))
    with pytest.raises(UserError, match="no hash for '1.png'"):
        load_pool(pool)


@pytest.mark.parametrize(("line", "message"), [
    ('{"text": ', "s.jsonl:2 is no JSON"),
    ("[1]", "is a list"),
    ({"question": "x"}, "no 'text' .keys: question"),
    ({"text": "  "}, "no 'text'"),
    ({"text": 3}, "no 'text'"),
    ({"text": "x", "answer": 3}, "'answer' is a int"),
    ({"text": "x", "image": ["a"]}, "'image' is a list"),
    ({"text": "x", "image": "missing.png"}, "no image at"),
    ({"text": "x", "image": "../outside.png"}, "leaves"),
    ({"text": "x", "image": "link.png"}, "through a link"),
    ({"text": "x", "image": "a\0b"}, "leaves"),
    ("[" * 100_000, "is no JSON"),
])  # fmt: skip
def test_bad_lines_are_named(tmp_path, line, message):
    image(tmp_path / "outside.png")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "outside.png")
    with pytest.raises(UserError, match=message):
        load_pool(jsonl(tmp_path / "data" / "s.jsonl", {"text": "fine"}, line))


def test_bad_files_are_named(tmp_path):
    with pytest.raises(UserError, match="no calibration data at"):
        load_pool(tmp_path / "nowhere")
    with pytest.raises(UserError, match="has no samples.jsonl"):
        load_pool(tmp_path)
    with pytest.raises(UserError, match="holds 1 samples"):
        load_pool(jsonl(tmp_path / "one.jsonl", {"text": "x"}))
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="no UTF-8"):
        load_pool(tmp_path / "binary.jsonl")
    with pytest.raises(UserError, match="'images' and 'annotations'"):
        load_pool(coco(tmp_path / "a.json", images=None))
    with pytest.raises(UserError, match="no caption"):
        load_pool(coco(tmp_path / "b.json", annotations=[{"image_id": 5, "bbox": []}]))
    with pytest.raises(UserError, match="is in none of"):
        load_pool(coco(tmp_path / "c.json"))
    (tmp_path / "d.json").write_text("{")
    with pytest.raises(UserError, match="no readable JSON"):
        load_pool(tmp_path / "d.json")
