"""One prompt, ready for a model: what the processor makes and every reader of samples takes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class ProcessedSample:
    """A tokenized prompt with its preprocessed images, without a batch axis.

    Attributes:
        input_ids: [S] int64; every image stands as ``prod(grid) / merge_size**2`` image placeholder tokens.
        pixel_values: [N, patch_features] float32, the patches of all images one after the other in the order of
            their placeholders, in the family's own patch order; None for a text-only prompt.
        image_grid_thw: [num_images, 3] int64, patches along time, height and width before merging; None for text-only.
        answer_mask: [S] bool, True at the answer's tokens and at the end-of-turn token after them (the logits that
            predict a token stand one position before it); all False for a prompt without an answer.
    """

    input_ids: np.ndarray
    pixel_values: np.ndarray | None
    image_grid_thw: np.ndarray | None
    answer_mask: np.ndarray

    def __post_init__(self) -> None:
        if self.input_ids.ndim != 1 or self.answer_mask.shape != self.input_ids.shape:
            raise ValueError(
                f"input_ids {self.input_ids.shape} and answer_mask {self.answer_mask.shape} must both be [S]"
            )
        if (self.pixel_values is None) != (self.image_grid_thw is None):
            raise ValueError("pixel_values and image_grid_thw belong together: both or neither")
        if self.pixel_values is not None and len(self.pixel_values) != int(self.image_grid_thw.prod(axis=1).sum()):
            raise ValueError(f"{len(self.pixel_values)} patches for grids {self.image_grid_thw.tolist()}")

    @property
    def length(self) -> int:
        """Number of tokens, image placeholders included."""
        return len(self.input_ids)
