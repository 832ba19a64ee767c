"""What the models are asked: held-out questions, caption matching, or a few made-up prompts where there are no data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ecmfq_export.errors import UserError
from ecmfq_export.runtime.processor import Processor
from ecmfq_export.runtime.sample import ProcessedSample
from ecmfq_export.validate.evaluate import Caption, Question, load_captions, load_questions

MATCH_PROMPT = "Does this image show {text}?"
"""Protocol (b) of the retrieval evaluation: a caption fits by log P(yes) - log P(no)."""

_MADE_UP = (
    ("Describe the image.", "The image shows several objects of different colours on a plain background.", (64, 64)),
    ("What is on the left?", "On the left there is a small shape, and next to it a larger one.", (96, 48)),
    ("How many objects are there?", "There are three objects: one at the top and two below it.", (48, 96)),
    ("What is the opposite of left?", "The opposite of left is right, and that of up is down.", None),
    ("Is the circle above the square?", "No, the circle is below the square and to the right of it.", (80, 64)),
    ("Where is the largest shape?", "The largest shape lies at the bottom right of the picture.", (128, 128)),
)


@dataclass(frozen=True)
class Prompts:
    """Everything that is run.

    Attributes:
        samples: prompts with answers; the answers' positions are compared.
        questions: the item behind each sample; empty where the prompts are made up, and accuracy means nothing.
        captions: images that retrieval ranks, empty where there are none.
    """

    samples: list[ProcessedSample]
    questions: list[Question]
    captions: list[Caption]

    @property
    def positions(self) -> str:
        """In words, which positions are compared."""
        return "tokens of held-out answers" if self.questions else "tokens of made-up answers"


def load_prompts(processor: Processor, data: Path | None, limit: int, candidates: int) -> Prompts:
    """Held-out items of `data`, or made-up ones for None.

    Args:
        data: a JSONL file of questions, or a directory with ``questions.jsonl``. A ``captions.jsonl`` beside the questions
            adds retrieval.
        limit: at most so many questions (0: all).
        candidates: how many captions are ranked.

    Raises:
        UserError: items or images that cannot be used.
    """
    if data is None:
        return Prompts(_made_up(processor), [], [])
    questions = load_questions(data, limit)
    samples = [processor.sample(q.question, [q.image] if q.image else [], q.answer) for q in questions]
    captions_file = (data if data.is_dir() else data.parent) / "captions.jsonl"
    captions = load_captions(captions_file, candidates) if candidates > 1 and captions_file.is_file() else []
    return Prompts(samples, questions, captions)


def _made_up(processor: Processor) -> list[ProcessedSample]:
    # Smooth colour gradients with a few rectangles: neither noise nor a constant, the same on every run.
    generator = np.random.default_rng(0)
    samples = []
    for question, answer, size in _MADE_UP:
        images = []
        if size is not None:
            width, height = size
            pixels = np.empty((height, width, 3), np.uint8)
            pixels[..., 0] = np.linspace(30, 220, width)[None, :]
            pixels[..., 1] = np.linspace(200, 40, height)[:, None]
            pixels[..., 2] = 90
            for _ in range(4):
                x, y = int(generator.integers(0, width - 12)), int(generator.integers(0, height - 12))
                pixels[y : y + 12, x : x + 12] = generator.integers(0, 256, 3)
            images.append(Image.fromarray(pixels))
        samples.append(processor.sample(question, images, answer))
    return samples


def match_samples(processor: Processor, pairs: list[tuple[Path, str]]) -> list[ProcessedSample]:
    """The matching question of each (image, caption); the answer is "yes", whose first position is what is read."""
    return [processor.sample(MATCH_PROMPT.format(text=text), [image], "yes") for image, text in pairs]


def match_pairs(captions: list[Caption]) -> tuple[list[tuple[Path, str]], list[int]]:
    """Every image with every caption, row by row, then each image with its own distractors.

    Returns:
        pairs, and for each image how many of its distractors follow.
    """
    pairs = [(c.image, other.text) for c in captions for other in captions]
    pairs += [(c.image, text) for c in captions for text in c.distractors]
    return pairs, [len(c.distractors) for c in captions]


def yes_no_ids(processor: Processor) -> tuple[int, int] | None:
    """Token ids of "yes" and "no", or None where the tokenizer splits them."""
    try:
        return processor.token_id("yes"), processor.token_id("no")
    except UserError:
        return None
