"""An evaluation made ready: data as prompts, tokenized once for every model that shares the processor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ecmfq_export.errors import UserError
from ecmfq_export.progress import Progress, Silent
from ecmfq_export.runtime.processor import Processor
from ecmfq_export.validate.evaluation.data import EvalData, Gallery, load_data
from ecmfq_export.validate.evaluation.images import FEATURES_LIMIT, ImageStore
from ecmfq_export.validate.evaluation.requests import Request
from ecmfq_export.validate.prompts import MATCH_PROMPT

TASKS = ("vqa", "perplexity", "embedding", "p_yes")
"""vqa: exact match of answers; perplexity: of answers and captions; embedding, p_yes: the two retrieval protocols."""
_GROUPS = {"retrieval": ("embedding", "p_yes")}
CAPTION_PROMPT = "Describe the image."
IMAGE_EMBEDDING_PROMPT = "Summarize the image in one word."
TEXT_EMBEDDING_PROMPT = "{text} Summarize the sentence in one word."
"""Protocol (a): an image and a text are near where the states at the ends of these prompts point the same way after the last layer. The
final RMS norm changes no direction but by its gain, which is left out: a model whose gain was folded into the output projection, or
whose residual stream was rotated, is the same model and has the same similarities."""


class Span(NamedTuple):
    """A run of requests."""

    start: int
    stop: int


@dataclass(frozen=True)
class Candidates:
    """The shared list of protocol (b): N images and one true text of each.

    Attributes:
        images, texts: indices into the gallery, [N] each; text i is true of image i.
        columns: int64 [N], which of the texts that are really asked each text is (equal texts are asked once).
        distractors: for each of the N images its near-duplicate texts.
    """

    images: tuple[int, ...]
    texts: tuple[int, ...]
    columns: np.ndarray
    distractors: tuple[tuple[str, ...], ...]


class EvalSet:
    """Data, prompts and images; made by :func:`prepare`.

    Attributes:
        tasks: what is measured.
        data: the items.
        candidates: of protocol (b), None where it is not measured.
        ranked: int64 [texts], the texts that protocol (a) ranks, true ones first, then near-duplicates where they take part; each
            as an index into the requests ``texts``, where equal texts are asked once, so that they tie exactly.
        requests: everything that a model is asked.
        spans: where which requests are: ``answers``, ``captions``, ``images``, ``texts``, ``matches``.
        yes_no: token ids whose log odds protocol (b) reads.
        images: the image files, by a request's ``image``.
        settings: what else shapes the results, as JSON data.
    """

    def __init__(
        self, processor: Processor, data: EvalData, tasks: Sequence[str], candidates: int, distractors: bool,
        yes_no: tuple[str, str], features_limit: int,
    ) -> None:  # fmt: skip
        self.tasks = tuple(tasks)
        self.data = data
        self.processor = processor
        self.yes_no: tuple[int, int] | None = None
        self.candidates: Candidates | None = None
        self.ranked = np.zeros(0, np.int64)
        self.requests: list[Request] = []
        self.spans: dict[str, Span] = {}
        self._numbers: dict[Path, int] = {}
        if "vqa" in tasks or "perplexity" in tasks:
            self._ask_answers()
        gallery = data.gallery
        if gallery is not None:
            if "perplexity" in tasks:
                self._ask_captions(gallery)
            if "embedding" in tasks:
                self._ask_embeddings(gallery, distractors)
            if "p_yes" in tasks:
                self.yes_no = _single_tokens(processor, yes_no)
                self._ask_matches(gallery, candidates)
        self.images = ImageStore(processor, list(self._numbers), features_limit)
        self.settings = {
            "fingerprint": data.fingerprint(), "questions": len(data.questions), "images": len(gallery.images) if gallery else 0,
            "texts": len(gallery.texts) if gallery else 0, "distractors": distractors,
            "candidates": len(self.candidates.images) if self.candidates else 0, "yes_no": list(yes_no),
        }  # fmt: skip

    def _number(self, image: Path | None) -> int | None:
        return None if image is None else self._numbers.setdefault(image, len(self._numbers))

    def _add(self, name: str, requests: Sequence[Request]) -> None:
        self.spans[name] = Span(len(self.requests), len(self.requests) + len(requests))
        self.requests.extend(requests)

    def _ask_answers(self) -> None:
        rows = []
        for q in self.data.questions:
            ids, length = self.processor.prompt_ids(q.question, 0 if q.image is None else 1, q.answer)
            rows.append(Request.answered(ids, length, self._number(q.image)))
        if rows:
            self._add("answers", rows)

    def _ask_captions(self, gallery: Gallery) -> None:
        rows = []
        for text, owner in zip(gallery.texts, gallery.owner, strict=True):
            ids, length = self.processor.prompt_ids(CAPTION_PROMPT, 1, text)
            rows.append(Request.answered(ids, length, self._number(gallery.images[owner])))
        self._add("captions", rows)

    def _ask_embeddings(self, gallery: Gallery, distractors: bool) -> None:
        ids = np.array(self.processor.prompt_ids(IMAGE_EMBEDDING_PROMPT, 1)[0], np.int64)
        self._add("images", [Request.last(ids, self._number(image), "state") for image in gallery.images])
        texts = [*gallery.texts, *(text for near in gallery.distractors for text in near if distractors)]
        unique, self.ranked = _unique(texts)
        prompts = (TEXT_EMBEDDING_PROMPT.format(text=text) for text in unique)
        self._add("texts", [Request.last(np.array(self.processor.prompt_ids(p)[0], np.int64), None, "state") for p in prompts])

    def _ask_matches(self, gallery: Gallery, count: int) -> None:
        total = len(gallery.images)
        count = min(count, total) or total
        images = tuple(i * total // count for i in range(count))
        texts = tuple(gallery.first_text(i) for i in images)
        unique, columns = _unique([gallery.texts[t] for t in texts])
        self.candidates = Candidates(images, texts, columns, tuple(gallery.distractors[i] for i in images))
        # One tokenization a text serves all images; each image's prompts are alike, so they are a pool with a prefix of its own.
        own = [self._match(text) for text in unique]
        rows = [Request.last(ids, self._number(gallery.images[i]), "log_odds", "match") for i in images for ids in own]
        for image, texts_of_image in zip(images, self.candidates.distractors, strict=True):
            number = self._number(gallery.images[image])
            rows += [Request.last(self._match(text), number, "log_odds", "match") for text in texts_of_image]
        self._add("matches", rows)

    def _match(self, text: str) -> np.ndarray:
        return np.array(self.processor.prompt_ids(MATCH_PROMPT.format(text=text), 1)[0], np.int64)


def _unique(texts: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Different texts in order of appearance, and for each text which of them it is."""
    numbers: dict[str, int] = {}
    index = np.array([numbers.setdefault(text, len(numbers)) for text in texts], np.int64)
    return list(numbers), index


def prepare(
    model_dir: Path,
    data: Path,
    *,
    tasks: Sequence[str] | None = None,
    limit: int = 0,
    captions: int = 0,
    candidates: int = 48,
    distractors: bool = False,
    yes_no: tuple[str, str] = ("yes", "no"),
    progress: Progress | None = None,
    features_limit: int = FEATURES_LIMIT,
) -> EvalSet:
    """Read and tokenize evaluation data.

    Args:
        model_dir: a directory with tokenizer, chat template and image settings: the checkpoint, or a bundle's ``onnx``.
        data: see :func:`ecmfq_export.validate.evaluation.data.load_data`.
        tasks: some of :data:`TASKS`, or ``retrieval`` for both of its protocols; None measures all that the data allow.
        limit: at most so many questions (0: all).
        captions: at most so many images of the captions (0: all).
        candidates: images of protocol (b) (0: all); its cost grows with the square.
        distractors: near-duplicate texts join the text gallery of protocol (a), for image-to-text only (they are true of none).
        yes_no: the two answers of protocol (b), one token each.
        features_limit: bytes of image features that are kept for further models.

    Raises:
        UserError: unusable data, a task that the data do not allow, or a yes or no that is no single token.
    """
    if limit < 0:
        raise UserError(f"a limit of {limit} questions is out of range", "0 takes all")
    if candidates < 0 or candidates == 1:
        raise UserError(f"{candidates} candidates are out of range", "at least 2; 0 takes all")
    if len(yes_no) != 2 or len(set(yes_no)) != 2:
        raise UserError(f"{len(set(yes_no))} different answers of P(yes): {', '.join(map(repr, yes_no))}", "two are needed, e.g. yes,no")
    (progress or Silent()).note(f"reading {data}")
    items = load_data(data, limit, captions)
    possible = [t for t in TASKS if _allows(items, t)]
    if tasks is None:
        tasks = possible
    tasks = list(dict.fromkeys(name for task in tasks for name in _GROUPS.get(task, (task,))))
    unknown = [t for t in tasks if t not in TASKS]
    if unknown or not tasks:
        raise UserError(f"no task {', '.join(map(repr, unknown)) or 'given'}", f"tasks: {', '.join((*TASKS, *_GROUPS))}")
    impossible = [t for t in tasks if t not in possible]
    if impossible:
        raise UserError(f"{data} does not allow {', '.join(impossible)}: it has {len(items.questions)} questions and "
                        f"{len(items.gallery.images) if items.gallery else 0} images with captions",
                        f"possible here: {', '.join(possible)}; vqa needs questions, embedding and p_yes need captions")  # fmt: skip
    return EvalSet(Processor(model_dir), items, tasks, candidates, distractors, yes_no, features_limit)


def _single_tokens(processor: Processor, words: tuple[str, str]) -> tuple[int, int]:
    try:
        return processor.token_id(words[0]), processor.token_id(words[1])
    except UserError as error:
        raise UserError(error.what, "give two answers that are one token each, or leave p_yes out of the tasks") from None


def _allows(data: EvalData, task: str) -> bool:
    if task == "vqa":
        return bool(data.questions)
    return data.gallery is not None or (task == "perplexity" and bool(data.questions))
