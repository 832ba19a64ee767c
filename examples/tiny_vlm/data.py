"""Training batches: one image and many questions about it in one row.

The vision tower and the image's tokens are computed once a row; each question is a branch that sees the image prefix
and itself alone, with the positions it would have if it were the only question. So a row of ten questions costs little
more than one, and every branch is exactly the single-turn chat prompt (tests hold the logits equal).
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from questions import CAPTION_PROMPT, LONG_TYPES, QA, ask_any, ask_text, caption
from scenes import IMAGE_SIZES, SPLITS, make_scene, render
from tokenizer import MERGE_SIZE, PATCH_SIZE, TEMPORAL_PATCH_SIZE

FACTOR = PATCH_SIZE * MERGE_SIZE


def resized_size(height: int, width: int) -> tuple[int, int]:
    """What the image processor makes of a size of ours (all lie between its min and max pixels)."""
    return round(height / FACTOR) * FACTOR, round(width / FACTOR) * FACTOR


def patchify(images: list[Image.Image]) -> np.ndarray:
    """pixel_values of images that end in one size, as the checkpoint's image processor gives them (float32)."""
    height, width = resized_size(images[0].height, images[0].width)
    arrays = [np.asarray(im if im.size == (width, height) else im.resize((width, height), Image.BICUBIC)) for im in images]
    x = np.stack(arrays).astype(np.float32) / 127.5 - 1.0  # [B, H, W, 3]
    gh, gw = height // FACTOR, width // FACTOR
    x = x.reshape(len(images), gh, MERGE_SIZE, PATCH_SIZE, gw, MERGE_SIZE, PATCH_SIZE, 3)
    x = x.transpose(0, 1, 4, 2, 5, 7, 3, 6)  # B, gh, gw, merge, merge, C, ph, pw
    x = np.broadcast_to(x[..., None, :, :], (*x.shape[:6], TEMPORAL_PATCH_SIZE, PATCH_SIZE, PATCH_SIZE))
    return x.reshape(-1, 3 * TEMPORAL_PATCH_SIZE * PATCH_SIZE**2)


class Encoder:
    """Token ids of prompts in the chat template's form, with a cache of the pieces."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self._cache: dict[str, list[int]] = {}
        ids = tokenizer.convert_tokens_to_ids
        self.im_end, self.pad, self.image = ids("<|im_end|>"), tokenizer.pad_token_id, ids("<|image_pad|>")
        self.open = self.pieces("<|im_start|>user\n")
        self.vision_start, self.vision_end = ids("<|vision_start|>"), ids("<|vision_end|>")
        self.turn = self.pieces("<|im_end|>\n<|im_start|>assistant\n")

    def pieces(self, text: str) -> list[int]:
        found = self._cache.get(text)
        if found is None:
            found = self.tokenizer(text, add_special_tokens=False).input_ids
            if len(self._cache) < 200_000:
                self._cache[text] = found
        return found

    def prefix(self, image_tokens: int) -> list[int]:
        return [*self.open, self.vision_start, *[self.image] * image_tokens, self.vision_end]

    def branch(self, question: str, answer: str) -> tuple[list[int], int]:
        """Ids from the question on, and how many of them are the answer (with <|im_end|>)."""
        end = [*self.pieces(answer), self.im_end]
        return [*self.pieces(question), *self.turn, *end], len(end)


@dataclass
class Batch:
    """Tensors of one step; L is the row length, the weights are zero where nothing is learned."""

    input_ids: torch.Tensor  # [B, L] int64
    position_ids: torch.Tensor  # [4, B, L] int64: text, temporal, height, width
    attention_mask: torch.Tensor  # [B, 1, L, L] bool
    mm_token_type_ids: torch.Tensor  # [B, L] int64
    valid: torch.Tensor  # [B, L] bool: not padding
    targets: torch.Tensor  # [B, L] int64: the next token of the same branch
    weights: torch.Tensor  # [B, L] float32
    pixel_values: torch.Tensor
    image_grid_thw: torch.Tensor


def pack(rows: list[list[QA]], images: list[Image.Image], encoder: Encoder, long_weight: float = 0.5) -> Batch:
    """Pack each image with its questions into a row. All images must end in one size."""
    height, width = resized_size(images[0].height, images[0].width)
    mh, mw = height // FACTOR, width // FACTOR
    prefix = encoder.prefix(mh * mw)
    opening = len(encoder.open)
    after_image = opening + 1 + max(mh, mw) + 1
    encoded = [[(*encoder.branch(qa.question, qa.answer), qa) for qa in row] for row in rows]
    length = max(len(prefix) + sum(len(ids) for ids, _, _ in row) for row in encoded)
    shape = (len(rows), length)
    ids = np.full(shape, encoder.pad, np.int64)
    positions = np.zeros((4, *shape), np.int64)
    branches = np.full(shape, -1, np.int64)  # 0 the prefix, then one number a question, -1 padding
    text_only = np.zeros(shape, bool)
    targets = np.zeros(shape, np.int64)
    weights = np.zeros(shape, np.float32)

    ids[:, : len(prefix)] = prefix
    branches[:, : len(prefix)] = 0
    head = np.arange(opening + 1)
    positions[:, :, : opening + 1] = head
    grid = np.indices((mh, mw)).reshape(2, -1) + opening + 1
    image_slice = slice(opening + 1, opening + 1 + mh * mw)
    positions[1, :, image_slice] = opening + 1
    positions[2:, :, image_slice] = grid[:, None]
    positions[:, :, len(prefix) - 1] = after_image - 1
    for b, row in enumerate(encoded):
        at = len(prefix)
        for number, (branch, answered, qa) in enumerate(row, start=1):
            end = at + len(branch)
            ids[b, at:end] = branch
            branches[b, at:end] = number
            start = after_image if qa.needs_image else opening
            positions[:, b, at:end] = np.arange(start, start + len(branch))
            text_only[b, at:end] = not qa.needs_image
            targets[b, end - 1 - answered : end - 1] = branch[-answered:]
            weights[b, end - 1 - answered : end - 1] = long_weight if qa.type in LONG_TYPES else 1.0
            at = end
    branch = torch.from_numpy(branches)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    same = branch[:, :, None] == branch[:, None, :]
    sees_prefix = (branch[:, None, :] == 0) & (branch[:, :, None] >= 0)
    # A question without an image sees only "<|im_start|>user\n" of the prefix.
    hidden = torch.from_numpy(text_only)[:, :, None] & (torch.arange(length) >= opening)[None, None, :]
    mask = causal & (same | (sees_prefix & ~hidden))
    return Batch(
        input_ids=torch.from_numpy(ids),
        position_ids=torch.from_numpy(positions),
        attention_mask=mask.unsqueeze(1),
        mm_token_type_ids=torch.from_numpy((ids == encoder.image).astype(np.int64)),
        valid=branch >= 0,
        targets=torch.from_numpy(targets),
        weights=torch.from_numpy(weights),
        pixel_values=torch.from_numpy(patchify(images)),
        image_grid_thw=torch.tensor([[1, height // PATCH_SIZE, width // PATCH_SIZE]] * len(images)),
    )


# The committed run's question mix, by step.
# Captions are the densest supervision a token (every object's colour, kind and place), one-bit answers the thinnest, so
# the second phase leaves the long yes/no questions out until colours and kinds are bound to places.
# Comparing two objects (`relation`) stayed at chance through step 3,000: it was dropped, and `side` and `statement`,
# which ask the same knowledge of one or two objects, came in.
CAPTION_IN_EVERY_ROW_FROM = 1000
BINDING_PHASE = range(1000, 1800)
COUNTING_FROM = 2500
STATEMENTS_FROM = 3000
EARLY_WEIGHTS = {
    "color": 3,
    "kind": 3,
    "cell": 3,
    "position": 3,
    "count": 2,
    "count_which": 3,
    "exists": 2,
    "relation": 2,
    "match": 3,
    "background": 0.5,
    "caption": 2,
}
COUNTING_WEIGHTS = {**EARLY_WEIGHTS, "relation": 6, "count_which": 6, "match": 4, "kind": 4, "color": 2, "background": 0.25}
FINAL_WEIGHTS = {
    "color": 2,
    "kind": 4,
    "cell": 3,
    "position": 2,
    "count": 2,
    "count_which": 6,
    "exists": 2,
    "side": 3,
    "statement": 5,
    "match": 5,
    "background": 0.25,
}

# Second cycle: what was still wrong after the first.
LAST_FROM = 4000
LAST_WEIGHTS = {**FINAL_WEIGHTS, "statement": 7, "match": 10, "cell": 4, "kind": 5, "exists": 3}


def question_mix(step: int) -> tuple[bool, tuple[str, ...], dict[str, float]]:
    """Whether every row carries its caption at `step`, which types are not drawn, and how often the others are."""
    with_caption = step >= CAPTION_IN_EVERY_ROW_FROM
    excluded = ("caption",) if with_caption else ()
    if step in BINDING_PHASE:
        excluded = (*excluded, "match", "relation")
    tables = ((LAST_FROM, LAST_WEIGHTS), (STATEMENTS_FROM, FINAL_WEIGHTS), (COUNTING_FROM, COUNTING_WEIGHTS), (0, EARLY_WEIGHTS))
    table = next(weights for start, weights in tables if step >= start)
    return with_caption, excluded, table


def training_batch(step: int, seed: int, rows: int, length: int, encoder: Encoder, max_objects: int) -> Batch:
    """The batch of a step: a function of (step, seed), so a resumed run sees what an uninterrupted one would.

    Args:
        rows: Images in the batch, all of one size (sizes take turns at random).
        length: Token budget a row; questions are drawn until it is full.
        max_objects: Objects a scene at most (the curriculum).
    """
    rng = random.Random(f"{seed}/{step}")
    size = rng.choice(IMAGE_SIZES)
    height, width = resized_size(*size)
    budget = length - len(encoder.prefix(height * width // FACTOR**2))
    with_caption, excluded, type_weights = question_mix(step)
    images, questions = [], []
    for _ in range(rows):
        scene = make_scene(rng.randrange(SPLITS["train"].start, SPLITS["train"].stop), max_objects, size)
        images.append(render(scene))
        row, left, seen = [], budget, set()
        if with_caption:
            row.append(QA(CAPTION_PROMPT, caption(scene), "caption"))
            left -= len(encoder.branch(row[0].question, row[0].answer)[0])
        for attempt in range(24):
            # Every second row carries one text-only question, so the model stays alive without an image.
            qa = ask_text(rng) if attempt == 0 and rng.random() < 0.5 else ask_any(scene, rng, excluded, type_weights)
            cost = len(encoder.branch(qa.question, qa.answer)[0])
            if cost > left or qa.question in seen:
                continue
            seen.add(qa.question)
            row.append(qa)
            left -= cost
            if left < 14:
                break
        questions.append(row)
    return pack(questions, images, encoder)
