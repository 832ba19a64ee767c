"""Aria's vision tower and its projector of learned queries in one module, run by transformers' own classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import AriaConfig


@dataclass
class VisionOutput:
    """What ``AriaVision`` gives: ``pooler_output`` [queries of all images, hidden_size]."""

    pooler_output: torch.Tensor


class AriaVision(nn.Module):
    """From patches in raster order to what stands in the places of image tokens.

    An image lies in the upper left corner of a square canvas whose side is its longer one; the patches that it leaves free are masked
    everywhere. The tower's last norm has no part in it: features are those in front of it.
    """

    def __init__(self, config: AriaConfig) -> None:
        from transformers.models.aria.modeling_aria import AriaProjector
        from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionTransformer

        super().__init__()
        self.vision_tower = Idefics3VisionTransformer(config.vision_config)
        self.vision_tower.post_layernorm = nn.Identity()
        self.multi_modal_projector = AriaProjector(config)

    def forward(self, patches: torch.Tensor, grid_thw: torch.Tensor) -> VisionOutput:
        """Features of images.

        Args:
            patches: [num_patches, channels * patch_size ** 2], channel, row and column of a pixel in this order.
            grid_thw: int64 [num_images, 3].
        """
        sizes = [(rows, columns) for _, rows, columns in grid_thw.tolist()]
        images = patches.split([rows * columns for rows, columns in sizes])
        return VisionOutput(torch.cat([self._features(image, *size) for image, size in zip(images, sizes, strict=True)]))

    def _features(self, patches: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        kernel = self.vision_tower.embeddings.patch_embedding.weight
        channels, patch, side = kernel.shape[1], kernel.shape[2], max(rows, columns)
        pixels = patches.view(rows, columns, channels, patch, patch).permute(2, 0, 3, 1, 4)
        canvas = patches.new_zeros(1, channels, side * patch, side * patch)
        canvas[0, :, : rows * patch, : columns * patch] = pixels.reshape(channels, rows * patch, columns * patch)
        mask = torch.zeros(1, side, side, dtype=torch.bool, device=patches.device)
        mask[:, :rows, :columns] = True
        out = self.vision_tower(canvas, patch_attention_mask=mask, output_hidden_states=True, return_dict=True)
        return self.multi_modal_projector(out.hidden_states[-1], attn_mask=~mask.flatten(1))[0]


def build(config: AriaConfig) -> AriaVision:
    """The module on the meta device, eager attention."""
    config.vision_config._attn_implementation = "eager"
    with torch.device("meta"):
        return AriaVision(config).eval()


def finish(module: nn.Module) -> None:
    """Every buffer is made when it is needed."""
