"""Training batches: one image with many branches (questions, and prompts for embeddings) in a row.

As in examples/tiny_vlm/data.py, every branch sees the image prefix and itself alone, with the positions that it would have
as the only turn, so a row of ten questions costs little more than one and each branch is exactly the single-turn prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from cells import ATTRIBUTES, GRIDS, HOURS, SPLITS, Scene, make_scene, render
from dialogue import IMAGE_EMBEDDING_PROMPT, QA, QUESTIONS, TEXT_EMBEDDING_PROMPT, ask_text, caption, different_caption
from vocabulary import FORMS, MERGE_SIZE, PATCH_SIZE, TEMPORAL_PATCH_SIZE

IMAGE_EMBEDDING, TEXT_EMBEDDING = "image_embedding", "text_embedding"
"""Types of the branches that have no answer: their last token's hidden state is the embedding."""


def patchify(images: np.ndarray, family: str) -> np.ndarray:
    """pixel_values of images [B, H, W, 3] uint8, as the family's image processor gives them (float32)."""
    b, height, width, _ = images.shape
    x = images.astype(np.float32) / 127.5 - 1.0
    h, w = height // PATCH_SIZE, width // PATCH_SIZE
    if family == "kimi":
        x = x.reshape(b, h, PATCH_SIZE, w, PATCH_SIZE, 3).transpose(0, 1, 3, 5, 2, 4)
        return x.reshape(-1, 3, PATCH_SIZE, PATCH_SIZE)
    x = x.reshape(b, h // MERGE_SIZE, MERGE_SIZE, PATCH_SIZE, w // MERGE_SIZE, MERGE_SIZE, PATCH_SIZE, 3)
    x = x.transpose(0, 1, 4, 2, 5, 7, 3, 6)  # B, h, w, merge, merge, C, patch, patch
    x = np.broadcast_to(x[..., None, :, :], (*x.shape[:6], TEMPORAL_PATCH_SIZE, PATCH_SIZE, PATCH_SIZE))
    return x.reshape(-1, 3 * TEMPORAL_PATCH_SIZE * PATCH_SIZE**2)


class Encoder:
    """Token ids of prompts in the chat template's form, with a cache of the pieces."""

    def __init__(self, tokenizer, family: str):
        self.tokenizer, self.family = tokenizer, family
        form = FORMS[family]
        self._cache: dict[str, list[int]] = {}
        self.pad, self.end = tokenizer.pad_token_id, tokenizer.eos_token_id
        self.image = tokenizer.convert_tokens_to_ids(form.image[1])
        self.open, self.turn = self.pieces(form.opening), self.pieces(form.turn)
        self.before, self.after = self.pieces(form.image[0]), self.pieces(form.image[2])

    def pieces(self, text: str) -> list[int]:
        """Ids of a text, special tokens recognized."""
        found = self._cache.get(text)
        if found is None:
            found = self.tokenizer(text, add_special_tokens=False).input_ids
            if len(self._cache) < 300_000:
                self._cache[text] = found
        return found

    def prefix(self, image_tokens: int) -> list[int]:
        """Ids up to the end of the image."""
        return [*self.open, *self.before, *[self.image] * image_tokens, *self.after]

    def branch(self, qa: QA) -> tuple[list[int], int]:
        """Ids from the question on, and how many of them are the answer (with the end of the turn)."""
        end = [*self.pieces(qa.answer), self.end] if qa.answer else []
        return [*self.pieces(qa.question), *self.turn, *end], len(end)


@dataclass
class Batch:
    """Tensors of one step; L is the row length, the weights are zero where nothing is learned."""

    inputs: dict[str, torch.Tensor]  # what the model's forward takes
    image: torch.Tensor  # [B, L] bool: image tokens
    valid: torch.Tensor  # [B, L] bool: not padding
    targets: torch.Tensor  # [B, L] int64: the next token of the same branch
    weights: torch.Tensor  # [B, L] float32
    ends: list[list[tuple[int, int]]]  # of each branch of each row: its first and last position
    embeddings: dict[str, torch.Tensor]  # type: [n, 2] int64 (row, position) of the last prompt tokens, in order
    cell_classes: torch.Tensor | None = None  # [cells of all images, attributes] int64 by CELL_CLASSES (training only)


def pack(rows: list[list[QA]], images: np.ndarray, encoder: Encoder, list_weight: float = 0.6) -> Batch:
    """Pack images [B, H, W, 3] (one size) with their branches; answers of several tokens weigh `list_weight` a token."""
    side = PATCH_SIZE * MERGE_SIZE
    mh, mw = images.shape[1] // side, images.shape[2] // side
    prefix, opening, before = encoder.prefix(mh * mw), len(encoder.open), len(encoder.before)
    encoded = [[(*encoder.branch(qa), qa) for qa in row] for row in rows]
    length = max(len(prefix) + sum(len(ids) for ids, _, _ in row) for row in encoded)
    shape = (len(rows), length)
    ids = np.full(shape, encoder.pad, np.int64)
    positions = np.zeros((4, *shape), np.int64)
    branches = np.full(shape, -1, np.int64)  # 0 the prefix, then one number a branch, -1 padding
    text_only = np.zeros(shape, bool)
    targets, weights = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
    ids[:, : len(prefix)] = prefix
    branches[:, : len(prefix)] = 0
    start_image = opening + before
    positions[:, :, : len(prefix)] = np.arange(len(prefix))
    after_image = len(prefix)
    if encoder.family == "qwen":
        grid = np.indices((mh, mw)).reshape(2, -1) + start_image
        here = slice(start_image, start_image + mh * mw)
        positions[1, :, here] = start_image
        positions[2:, :, here] = grid[:, None]
        after_image = start_image + max(mh, mw) + 1
        positions[:, :, len(prefix) - 1] = after_image - 1
    ends: list[list[tuple[int, int]]] = []
    embeddings: dict[str, list[tuple[int, int]]] = {IMAGE_EMBEDDING: [], TEXT_EMBEDDING: []}
    for b, row in enumerate(encoded):
        at, spans = len(prefix), []
        for number, (branch, answered, qa) in enumerate(row, start=1):
            end = at + len(branch)
            ids[b, at:end] = branch
            branches[b, at:end] = number
            start = after_image if qa.needs_image else opening
            positions[:, b, at:end] = np.arange(start, start + len(branch))
            text_only[b, at:end] = not qa.needs_image
            if answered:
                targets[b, end - 1 - answered : end - 1] = branch[-answered:]
                weights[b, end - 1 - answered : end - 1] = 1.0 if answered == 2 else list_weight
            else:
                embeddings[qa.type].append((b, end - 1))
            spans.append((at, end - 1))
            at = end
        ends.append(spans)
    branch = torch.from_numpy(branches)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    same = branch[:, :, None] == branch[:, None, :]
    sees_prefix = (branch[:, None, :] == 0) & (branch[:, :, None] >= 0)
    # A branch without an image sees only the opening of the prefix.
    hidden = torch.from_numpy(text_only)[:, :, None] & (torch.arange(length) >= opening)[None, None, :]
    image = torch.from_numpy(ids == encoder.image)
    inputs = {
        "input_ids": torch.from_numpy(ids),
        "attention_mask": (causal & (same | (sees_prefix & ~hidden))).unsqueeze(1),
        "position_ids": torch.from_numpy(positions if encoder.family == "qwen" else positions[0]),
        "pixel_values": torch.from_numpy(patchify(images, encoder.family)),
        "image_grid_thw": torch.tensor([[1, mh * MERGE_SIZE, mw * MERGE_SIZE]] * len(rows)),
    }
    if encoder.family == "qwen":
        inputs["mm_token_type_ids"] = image.long()
    return Batch(
        inputs=inputs,
        image=image,
        valid=branch >= 0,
        targets=torch.from_numpy(targets),
        weights=torch.from_numpy(weights),
        ends=ends,
        embeddings={k: torch.tensor(v, dtype=torch.int64).reshape(-1, 2) for k, v in embeddings.items()},
    )


CELL_CLASSES = {**ATTRIBUTES, "hand": len(HOURS), "row": 6, "column": 6}
"""What the vision tower's features are taught about a cell, with the number of classes: a row is one of one, two or three."""


def cell_classes(scenes: list[Scene]) -> torch.Tensor:
    """[cells of all scenes, attributes] int64 in the order of the image tokens."""
    columns = []
    for name in (*ATTRIBUTES, "hand"):
        values = np.concatenate([getattr(scene, name) for scene in scenes])
        columns.append(values if name == "shape" else (values * CELL_CLASSES[name]).astype(np.int64))
    # Numbered over the possible counts: 0 of one; 1, 2 of two; 3, 4, 5 of three.
    places = [(np.arange(s.cells) // s.cols + s.rows * (s.rows - 1) // 2, np.arange(s.cells) % s.cols + s.cols * (s.cols - 1) // 2)
              for s in scenes]  # fmt: skip
    columns += [np.concatenate(one) for one in zip(*places, strict=True)]
    return torch.from_numpy(np.stack(columns, 1))


def image_embedding() -> QA:
    """The branch whose last hidden state is an image's embedding."""
    return QA(IMAGE_EMBEDDING_PROMPT, "", IMAGE_EMBEDDING)


def text_embedding(text: str) -> QA:
    """The branch whose last hidden state is a text's embedding."""
    return QA(TEXT_EMBEDDING_PROMPT.format(text=text), "", TEXT_EMBEDDING, needs_image=False)


WEIGHTS = {
    "hue": 2.0, "hour": 2.0, "size": 2.0, "shape": 1.0, "larger": 2.0, "extreme": 1.5, "where": 2.0, "count": 1.0, "rank": 1.5,
}  # fmt: skip
"""How often the short questions are drawn."""
LISTS = ("list_hues", "list_hours", "list_sizes")


def training_batch(step: int, seed: int, rows: int, encoder: Encoder, bins: int, questions: int = 5, match: bool = True) -> Batch:
    """The batch of a step: a function of (step, seed), so a resumed run sees what an uninterrupted one would.

    Every row has the caption as an answer, a list, a match question, `questions` short ones, a text-only one, the image's
    embedding prompt, its caption's and a near-duplicate's (at most `bins` classes away).
    """
    rng = np.random.default_rng([seed, step])
    grid = GRIDS[rng.integers(len(GRIDS))]
    scenes = [make_scene(int(rng.integers(SPLITS["train"].start, SPLITS["train"].stop)), grid) for _ in range(rows)]
    names, p = list(WEIGHTS), np.array(list(WEIGHTS.values()))
    drawn = []
    for scene in scenes:
        row = [image_embedding(), text_embedding(caption(scene)), text_embedding(different_caption(scene, rng, bins))]
        row.append(QUESTIONS["caption"](scene, rng))
        row.append(QUESTIONS[LISTS[rng.integers(len(LISTS))]](scene, rng))
        if match:
            row.append(QUESTIONS["match"](scene, rng))
        row.append(ask_text(rng))
        row += [QUESTIONS[names[k]](scene, rng) for k in rng.choice(len(names), questions, p=p / p.sum())]
        drawn.append(row)
    batch = pack(drawn, render(scenes), encoder)
    batch.cell_classes = cell_classes(scenes)
    return batch
