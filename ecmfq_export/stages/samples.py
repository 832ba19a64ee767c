"""The calibration pool: where samples come from, checked before anything is computed.

Three forms: a directory with ``samples.jsonl`` (and a ``manifest.json`` whose hashes are checked), a JSONL file, or an
annotation file in COCO's caption format.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ecmfq_export.bundle import fingerprint, sha256_file
from ecmfq_export.errors import UserError
from ecmfq_export.runtime.processor import Processor
from ecmfq_export.runtime.sample import ProcessedSample

SAMPLES_FILE = "samples.jsonl"
CAPTION_REQUEST = "Describe the image."
"""The user's turn that a COCO caption answers."""

_LINE = 'one object a line, e.g. {"image": "a.png", "text": "...", "answer": "..."}'
_FORMS = "give a directory with samples.jsonl, a JSONL file, or a COCO captions JSON file"


@dataclass(frozen=True)
class PoolSample:
    """One sample, not read yet.

    Attributes:
        name: where it came from, e.g. ``"samples.jsonl:12"``.
        image: its image file, or None for a text-only sample.
        text: the user's turn.
        answer: the assistant's turn, or None.
    """

    name: str
    image: Path | None
    text: str
    answer: str | None

    def process(self, processor: Processor) -> ProcessedSample:
        """Tokenize and preprocess.

        Raises:
            UserError: an image that cannot be used, naming the sample.
        """
        try:
            return processor.sample(self.text, [] if self.image is None else [self.image], self.answer)
        except UserError as error:
            raise type(error)(f"{self.name}: {error.what}", error.fix) from None


def load_pool(data: Path) -> list[PoolSample]:
    """All samples of `data`, in file order; images are checked to exist, not decoded.

    Raises:
        UserError: no such file, an unknown form, a damaged line, a path that leaves its folder, a missing image, a hash that
            does not hold, or fewer than two samples.
    """
    data = Path(data)
    if data.is_dir():
        samples = _read_directory(data)
    elif not data.is_file():
        raise UserError(f"no calibration data at {data}", _FORMS)
    elif data.suffix == ".json":
        samples = _read_coco(data)
    else:
        samples = _read_jsonl(data, data.parent)
    if len(samples) < 2:
        raise UserError(f"{data} holds {len(samples)} samples", "calibration needs at least two; some hundred are better")
    return samples


def pool_fingerprint(data: Path, samples: list[PoolSample]) -> str:
    """One hash for the pool, images included: what makes a calibration current."""
    import hashlib

    digest = hashlib.sha256()
    for file in [data / SAMPLES_FILE if data.is_dir() else data, *sorted({s.image for s in samples if s.image is not None})]:
        digest.update(fingerprint(file).encode())
    return digest.hexdigest()


def _read_directory(directory: Path) -> list[PoolSample]:
    if not (directory / SAMPLES_FILE).is_file():
        raise UserError(f"{directory} has no {SAMPLES_FILE}", _FORMS)
    hashes = _read_hashes(directory / "manifest.json")
    samples = _read_jsonl(directory / SAMPLES_FILE, directory)
    if hashes is not None:
        used = [SAMPLES_FILE, *sorted({s.image.relative_to(directory).as_posix() for s in samples if _below(s.image, directory)})]
        for name in used:
            if name not in hashes:
                raise UserError(f"{directory / 'manifest.json'} lists no hash for '{name}'",
                                "make the manifest again, or delete it to use the files as they are")
            digest = sha256_file(directory / name)
            if digest != hashes[name]:
                raise UserError(f"{directory / name}: sha256 {digest[:12]}..., the manifest says {hashes[name][:12]}...",
                                "the file was changed or damaged; fetch the data again")
    return samples


def _below(image: Path | None, directory: Path) -> bool:
    return image is not None and image.is_relative_to(directory)


def _read_hashes(path: Path) -> dict[str, str] | None:
    if not path.is_file():
        return None
    hashes = _read_json(path).get("sha256")
    if not isinstance(hashes, dict) or not all(isinstance(v, str) for v in hashes.values()):
        raise UserError(f"{path}: 'sha256' is no table of path to hash", "see calib_data/README.md for its form")
    return hashes


def _read_jsonl(path: Path, root: Path) -> list[PoolSample]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text: {error}", _FORMS) from None
    samples = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path.name}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise UserError(f"{where} is no JSON: {line[:60]!r}", _LINE) from None
        samples.append(_sample(row, where, root))
    return samples


def _sample(row: Any, where: str, root: Path) -> PoolSample:
    if not isinstance(row, dict):
        raise UserError(f"{where} is a {type(row).__name__}, not an object", _LINE)
    text, answer, image = row.get("text"), row.get("answer"), row.get("image")
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where} has no 'text' (keys: {', '.join(map(str, row)) or 'none'})", "'text' is the user's turn")
    for key, value in (("answer", answer), ("image", image)):
        if value is not None and not isinstance(value, str):
            raise UserError(f"{where}: '{key}' is a {type(value).__name__}", "expected a string, or null")
    return PoolSample(where, None if not image else _image_path(image, where, root), text, answer or None)


def _image_path(name: str, where: str, root: Path) -> Path:
    """An absolute path as it is, a relative one inside `root`."""
    pure = PurePosixPath(name)
    if "\0" in name or (not pure.is_absolute() and ".." in pure.parts):
        raise UserError(f"{where}: image path '{name}' leaves {root}", "use a path inside the data's folder, or an absolute one")
    path = Path(name) if pure.is_absolute() else root / name
    if not path.is_file():
        raise UserError(f"{where}: no image at {path}", "paths are relative to the samples' file")
    if not pure.is_absolute() and not path.resolve().is_relative_to(root.resolve()):
        raise UserError(f"{where}: image path '{name}' leaves {root} through a link", "copy the image into the folder")
    return path


def _read_coco(path: Path) -> list[PoolSample]:
    data = _read_json(path)
    images, annotations = data.get("images"), data.get("annotations")
    if not isinstance(images, list) or not isinstance(annotations, list):
        raise UserError(f"{path} has no 'images' and 'annotations' lists", _FORMS)
    captions: dict[Any, str] = {}
    for row in annotations:
        if not isinstance(row, Mapping) or not isinstance(row.get("caption"), str):
            raise UserError(f"{path}: an annotation has no caption: {str(row)[:80]}",
                            "give the captions file, not instances or keypoints")
        captions.setdefault(row.get("image_id"), row["caption"].strip())
    rows = [row for row in images if isinstance(row, Mapping) and row.get("id") in captions]
    if not rows:
        raise UserError(f"{path}: none of its {len(images)} images has a caption", _FORMS)
    root = _coco_root(path, rows)
    return [PoolSample(f"{path.name}:{row['id']}", _image_path(str(row.get("file_name")), f"{path.name}:{row['id']}", root),
                       CAPTION_REQUEST, captions[row["id"]]) for row in rows]


def _coco_root(path: Path, rows: list[Any]) -> Path:
    """The images' folder: ``images`` beside the file, the file's own, or COCO's layout (annotations/captions_X.json, X/)."""
    first = str(rows[0].get("file_name"))
    split = path.stem.removeprefix("captions_")
    candidates = [path.parent / "images", path.parent, path.parent / split, path.parent.parent / split]
    for root in candidates:
        if (root / first).is_file():
            return root
    raise UserError(f"{path}: image '{first}' is in none of {', '.join(map(str, candidates))}", "put the images into one of them")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is no readable JSON: {error}", _FORMS) from None
    if not isinstance(data, dict):
        raise UserError(f"{path} holds a {type(data).__name__}, not an object", _FORMS)
    return data
