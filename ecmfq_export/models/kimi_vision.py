"""MoonViT and its projector, run by transformers' own Kimi-K2.5 classes: names on disk, and weights in the classes' form.

Published Kimi-VL checkpoints hold queries, keys and values in one matrix, with the rotary channels of a head in pairs
(x0, x1), (x2, x3), ...; transformers keeps three matrices with the first halves of all pairs before the second halves.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import Kimi_K25Config


@dataclass
class VisionOutput:
    """What ``KimiVision`` gives: ``pooler_output`` [merged patches, hidden_size]; there are no DeepStack features."""

    pooler_output: torch.Tensor
    deepstack_features: list[torch.Tensor] = field(default_factory=list)


class KimiVision(nn.Module):
    """Vision tower and projector, from patches in raster order to what stands in the places of image tokens."""

    def __init__(self, config: Kimi_K25Config) -> None:
        from transformers.models.kimi_k25.modeling_kimi_k25 import Kimi_K25MultimodalProjection, Kimi_K25VisionModel

        super().__init__()
        self.vision_tower = Kimi_K25VisionModel(config.vision_config)
        self.mm_projector = Kimi_K25MultimodalProjection(config)

    def forward(self, patches: torch.Tensor, grid_thw: torch.Tensor) -> VisionOutput:
        """Features of images.

        Args:
            patches: [num_patches, 3 * patch_size ** 2], channel, row and column of a pixel in this order.
            grid_thw: int64 [num_images, 3].
        """
        kernel = self.vision_tower.patch_embed.proj.weight
        pooled = self.vision_tower(patches.view(-1, *kernel.shape[1:]), grid_thw=grid_thw).pooler_output
        return VisionOutput(self.mm_projector(pooled).flatten(0, 1))


def build(config: Kimi_K25Config) -> KimiVision:
    """The tower on the meta device, eager attention."""
    config.vision_config._attn_implementation = "eager"
    with torch.device("meta"):
        return KimiVision(config).eval()


def finish(module: nn.Module) -> None:
    """Compute the buffers that the meta device left empty and no checkpoint holds."""
    tower = module.vision_tower
    tower.rotary_emb = type(tower.rotary_emb)(tower.config)
    positions = tower.patch_embed.pos_emb
    positions.time_position_embeddings = nn.Buffer(positions.compute_pos_embed(), persistent=False)


_PUBLISHED = (
    (re.compile(r"^vision_tower\.layers\.(\d+)\.norm1\."), r"vision_tower.encoder.blocks.\1.norm0."),
    (re.compile(r"^vision_tower\.layers\.(\d+)\.norm2\."), r"vision_tower.encoder.blocks.\1.norm1."),
    (re.compile(r"^vision_tower\.layers\.(\d+)\.mlp\.fc1\."), r"vision_tower.encoder.blocks.\1.mlp.fc0."),
    (re.compile(r"^vision_tower\.layers\.(\d+)\.mlp\.fc2\."), r"vision_tower.encoder.blocks.\1.mlp.fc1."),
    (re.compile(r"^vision_tower\.layers\.(\d+)\.attn\.proj\."), r"vision_tower.encoder.blocks.\1.wo."),
    (re.compile(r"^vision_tower\.layers\.(\d+)\.attn\.([qkv])_proj\."), r"vision_tower.encoder.blocks.\1.wqkv."),
    (re.compile(r"^vision_tower\.final_layernorm\."), "vision_tower.encoder.final_layernorm."),
    (re.compile(r"^vision_tower\.patch_embed\.pos_emb\.position_embeddings$"), "vision_tower.patch_embed.pos_emb.weight"),
    (re.compile(r"^mm_projector\.in_proj\."), "multi_modal_projector.linear_1."),
    (re.compile(r"^mm_projector\.out_proj\."), "multi_modal_projector.linear_2."),
    (re.compile(r"^mm_projector\."), "multi_modal_projector."),
)
_QKV = re.compile(r"^(vision_tower\.layers\.\d+\.attn)\.([qkv])_proj\.(weight|bias)$")


def published_name(name: str) -> str:
    """A name of the module's state to the published tensor that holds it (wqkv holds three)."""
    for pattern, replacement in _PUBLISHED:
        name, count = pattern.subn(replacement, name)
        if count:
            return name
    return name


def published_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published tensors of `module`."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in module.state_dict().items():
        shape = tuple(tensor.shape)
        shapes[published_name(name)] = (3 * shape[0], *shape[1:]) if _QKV.match(name) else shape
    return shapes


def from_published(state: dict[str, torch.Tensor], names: Any, num_heads: int) -> dict[str, torch.Tensor]:
    """Published tensors as the module's state.

    Args:
        state: by published name.
        names: of the module's state.
        num_heads: of the tower.
    """
    found: dict[str, torch.Tensor] = {}
    for name in names:
        tensor = state[published_name(name)]
        match = _QKV.match(name)
        if match:
            part = "qkv".index(match[2])
            tensor = tensor.chunk(3)[part]
            if part < 2:
                tensor = pairs_to_halves(tensor, num_heads)
        found[name] = tensor.contiguous()
    return found


def pairs_to_halves(tensor: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows [heads * head_dim, ...] of a projection, each head's pairs (x0, x1), (x2, x3), ... as x0 x2 ... x1 x3 ..."""
    paired = tensor.unflatten(0, (num_heads, -1, 2))
    return paired.transpose(1, 2).flatten(0, 2)


def halves_to_pairs(tensor: torch.Tensor, num_heads: int) -> torch.Tensor:
    """The reverse of :func:`pairs_to_halves`."""
    halves = tensor.unflatten(0, (num_heads, 2, -1))
    return halves.transpose(1, 2).flatten(0, 2)
