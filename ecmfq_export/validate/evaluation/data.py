"""What a model is evaluated on: questions with answers, and images with the texts that are true of them."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path

from ecmfq_export.errors import UserError
from ecmfq_export.runtime.data_files import read_coco
from ecmfq_export.validate.evaluate import Question, load_captions, load_questions

QUESTIONS_FILE, CAPTIONS_FILE = "questions.jsonl", "captions.jsonl"
_FORMS = (
    "give a directory with questions.jsonl or captions.jsonl, one such file, or a COCO captions JSON; "
    'lines are {"image", "question", "answer", "type"} and {"image", "text", "distractors"}'
)


@dataclass(frozen=True)
class Gallery:
    """Images, and texts of which each is true of exactly one of them.

    Attributes:
        images: files.
        texts: all true texts, those of one image adjacent.
        owner: for each text its image's index.
        distractors: for each image the near-duplicate texts that are false of it.
    """

    images: tuple[Path, ...]
    texts: tuple[str, ...]
    owner: tuple[int, ...]
    distractors: tuple[tuple[str, ...], ...]

    def first_text(self, image: int) -> int:
        """Index of an image's first text."""
        return bisect_left(self.owner, image)


@dataclass(frozen=True)
class EvalData:
    """Everything that was read.

    Attributes:
        source: the path that was given.
        questions: may be empty.
        gallery: None without captions.
    """

    source: Path
    questions: tuple[Question, ...]
    gallery: Gallery | None

    def fingerprint(self) -> str:
        """One hash of all questions and texts, and of the images' names and sizes in bytes: results with equal ones are of the
        same items in the same order."""
        rows: list[object] = [[_identity(q.image), q.question, q.answer, q.type] for q in self.questions]
        if self.gallery is not None:
            rows += [[_identity(image) for image in self.gallery.images], self.gallery.texts, self.gallery.owner,
                     self.gallery.distractors]  # fmt: skip
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _identity(image: Path | None) -> list[object] | None:
    return None if image is None else [image.name, image.stat().st_size]


def load_data(path: Path, limit: int = 0, captions: int = 0) -> EvalData:
    """Read evaluation data; images are checked to exist, not decoded.

    A directory gives the questions of its ``questions.jsonl`` and the captions of its ``captions.jsonl``, whichever are there; a
    ``.jsonl`` file is one or the other by its first line; a ``.json`` file holds captions in COCO's form. An image on several
    caption lines, and a COCO image, has several true texts.

    Args:
        limit: at most so many questions, evenly spread over the file (0: all).
        captions: at most so many images of the captions, likewise.

    Raises:
        UserError: no such file, an unknown form, a damaged line or a missing image.
    """
    path = Path(path)
    if path.is_dir():
        questions_file, captions_file = path / QUESTIONS_FILE, path / CAPTIONS_FILE
        if not questions_file.is_file() and not captions_file.is_file():
            raise UserError(f"{path} has neither {QUESTIONS_FILE} nor {CAPTIONS_FILE}", _FORMS)
        questions = load_questions(questions_file, limit) if questions_file.is_file() else []
        gallery = _gallery(captions_file, captions) if captions_file.is_file() else None
        return EvalData(path, tuple(questions), gallery)
    if not path.is_file():
        raise UserError(f"no evaluation data at {path}", _FORMS)
    if path.suffix == ".json":
        rows = read_coco(path, _FORMS)
        return EvalData(path, (), _build_gallery([(row.image, row.captions, ()) for row in rows], captions, path))
    if _holds_captions(path):
        return EvalData(path, (), _gallery(path, captions))
    return EvalData(path, tuple(load_questions(path, limit)), None)


def _holds_captions(path: Path) -> bool:
    try:
        with path.open(encoding="utf-8") as stream:
            first = next((line for line in stream if line.strip()), "{}")
        item = json.loads(first)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSONL file: {error}", _FORMS) from None
    return isinstance(item, dict) and "text" in item and "answer" not in item and "question" not in item


def _gallery(path: Path, limit: int) -> Gallery:
    rows: dict[Path, tuple[list[str], list[str]]] = {}
    for caption in load_captions(path):
        texts, distractors = rows.setdefault(caption.image, ([], []))
        texts.append(caption.text)
        distractors.extend(caption.distractors)
    return _build_gallery([(image, texts, distractors) for image, (texts, distractors) in rows.items()], limit, path)


def _build_gallery(rows: list, limit: int, path: Path) -> Gallery:
    if limit < 0:
        raise UserError(f"a limit of {limit} captions is out of range", "0 takes all")
    if 0 < limit < len(rows):
        rows = [rows[i * len(rows) // limit] for i in range(limit)]
    if len(rows) < 2:
        raise UserError(f"{path} has {len(rows)} images with captions", "retrieval needs at least two to choose from")
    texts = [(text, index) for index, (_, own, _) in enumerate(rows) for text in own]
    return Gallery(tuple(row[0] for row in rows), tuple(text for text, _ in texts), tuple(index for _, index in texts),
                   tuple(tuple(row[2]) for row in rows))  # fmt: skip
