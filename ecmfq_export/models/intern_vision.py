"""InternViT and its projector in one module, run by transformers' own classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import InternVLConfig


@dataclass
class VisionOutput:
    """What ``InternVision`` gives: ``pooler_output`` [merged patches, hidden_size]."""

    pooler_output: torch.Tensor


class InternVision(nn.Module):
    """From patches in raster order, tile after tile, to what stands in the places of image tokens."""

    def __init__(self, config: InternVLConfig) -> None:
        from transformers.models.internvl import modeling_internvl as internvl

        super().__init__()
        self.vision_tower = internvl.InternVLVisionModel(config.vision_config)
        self.multi_modal_projector = internvl.InternVLMultiModalProjector(config)
        self.merge_size = round(1 / config.downsample_ratio)

    def forward(self, patches: torch.Tensor, grid_thw: torch.Tensor) -> VisionOutput:
        """Features of images.

        Args:
            patches: [num_patches, channels * patch_size ** 2], channel, row and column of a pixel in this order.
            grid_thw: int64 [num_images, 3], tiles of an image and patches along a tile's height and width, which are all the same.
        """
        from transformers.models.internvl.modeling_internvl import InternVLModel

        channels, patch = self.vision_tower.embeddings.patch_embeddings.projection.weight.shape[1:3]
        tiles, (rows, columns) = int(grid_thw[:, 0].sum()), grid_thw[0, 1:].tolist()
        pixels = patches.view(tiles, rows, columns, channels, patch, patch).permute(0, 3, 1, 4, 2, 5)
        pixels = pixels.reshape(tiles, channels, rows * patch, columns * patch)
        hidden = self.vision_tower(pixels, return_dict=True).last_hidden_state[:, 1:].unflatten(1, (rows, columns))
        merged = InternVLModel.pixel_shuffle(self, hidden, scale_factor=1 / self.merge_size)
        return VisionOutput(self.multi_modal_projector(merged.flatten(1, 2)).flatten(0, 1))


def build(config: InternVLConfig) -> InternVision:
    """The module on the meta device, eager attention."""
    config.vision_config._attn_implementation = "eager"
    with torch.device("meta"):
        return InternVision(config).eval()


def finish(module: nn.Module) -> None:
    """No buffer is left empty."""
