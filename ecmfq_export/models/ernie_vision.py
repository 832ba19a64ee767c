"""ERNIE-4.5-VL's vision tower and resampler in one module, run by transformers' own classes; their names on disk."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import Ernie4_5_VLMoeConfig


@dataclass
class VisionOutput:
    """What ``ErnieVision`` gives: ``pooler_output`` [merged patches, hidden_size]."""

    pooler_output: torch.Tensor


class ErnieVision(nn.Module):
    """From patches in merge-block order to what stands in the places of image tokens."""

    def __init__(self, config: Ernie4_5_VLMoeConfig) -> None:
        from transformers.models.ernie4_5_vl_moe import modeling_ernie4_5_vl_moe as ernie

        super().__init__()
        self.vision_tower = ernie.Ernie4_5_VLMoeVisionTransformerPretrainedModel(config.vision_config)
        self.resampler_model = ernie.Ernie4_5_VLMoeVariableResolutionResamplerModel(config)

    def forward(self, patches: torch.Tensor, grid_thw: torch.Tensor) -> VisionOutput:
        """Features of images.

        Args:
            patches: [num_patches, 3 * patch_size ** 2].
            grid_thw: int64 [num_images, 3].
        """
        hidden = self.vision_tower(patches, grid_thw=grid_thw).last_hidden_state
        return VisionOutput(self.resampler_model(hidden, grid_thw))


def build(config: Ernie4_5_VLMoeConfig) -> ErnieVision:
    """The module on the meta device, eager attention."""
    config.vision_config._attn_implementation = "eager"
    with torch.device("meta"):
        return ErnieVision(config).eval()


def finish(module: nn.Module) -> None:
    """Compute the inverse frequencies, which the meta device left empty and no checkpoint holds."""
    tower = module.vision_tower
    tower.rotary_pos_emb = type(tower.rotary_pos_emb)(tower.config)


_DISK = (
    (re.compile(r"^vision_tower\."), "vision_model."),
    (re.compile(r"_linear\.fc1\."), "_linear.0."),
    (re.compile(r"_linear\.fc2\."), "_linear.2."),
    (re.compile(r"_linear\.ln\."), "_linear.3."),
)


def disk_name(name: str) -> str:
    """A name of the module's state to the name on disk, without the model's prefix."""
    for pattern, replacement in _DISK:
        name = pattern.sub(replacement, name)
    return name
