"""The calibration pool: where samples come from, checked before anything is computed.

Three forms: a directory with ``samples.jsonl`` (and a ``manifest.json`` whose hashes are checked), a JSONL file, or an
annotation file in COCO's caption format.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ecmfq_export.bundle import fingerprint, sha256_file
from ecmfq_export.errors import UserError
from ecmfq_export.runtime.data_files import image_path, read_coco, read_json
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
    hashes = read_json(path, _FORMS).get("sha256")
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
    return PoolSample(where, None if not image else image_path(image, where, root), text, answer or None)


def _read_coco(path: Path) -> list[PoolSample]:
    return [PoolSample(row.name, row.image, CAPTION_REQUEST, row.captions[0]) for row in read_coco(path, _FORMS)]
