"""From processed prompts to what the decoder reads: embeddings with image features in place, rotary tables, mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from ecmfq_export.errors import UserError
from ecmfq_export.models.moe_vlm import MoEVLM
from ecmfq_export.models.spec import ModelSpec
from ecmfq_export.runtime import host_inputs


class Sample(Protocol):
    """A processed prompt; ``runtime.sample.ProcessedSample`` is one."""

    @property
    def input_ids(self) -> np.ndarray: ...

    @property
    def pixel_values(self) -> np.ndarray | None: ...

    @property
    def image_grid_thw(self) -> np.ndarray | None: ...


@dataclass(frozen=True)
class DecoderInputs:
    """A right-padded batch; B prompts, S tokens of the longest.

    Attributes:
        inputs_embeds: [B, S, hidden], image features in the places of their tokens.
        cos, sin: [B, S, rotated channels of a head], both halves alike (rotate-half form).
        mask: [B, 1, S, S], 0 where visible, a large negative number elsewhere.
        deepstack: for each of the first decoder layers what is added to its output, [B, S, hidden], zero at text.
        token_types: int64 [B, S], 0 text and padding, 1 image tokens.
        lengths: int64 [B], tokens that are not padding.
        deltas: int64 [B], position of the token after the prompt minus `lengths`.
        router_types: int64 [B, S], whose routed experts a token chooses from, where types have experts of their own: 0 text, 1 image.
    """

    inputs_embeds: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    mask: torch.Tensor
    deepstack: list[torch.Tensor]
    token_types: torch.Tensor
    lengths: torch.Tensor
    deltas: torch.Tensor
    router_types: torch.Tensor | None = None


def prepare_inputs(
    model: MoEVLM,
    samples: Sequence[Sample],
    *,
    vision: torch.nn.Module | None = None,
    dtype: torch.dtype = torch.float32,
) -> DecoderInputs:
    """Batch `samples`: run the vision tower, put its features in place, compute positions.

    Args:
        vision: ``model.vision_module()`` where it is at hand; read from disk otherwise, and only if a sample has images.
        dtype: of the floating results.

    Raises:
        UserError: no samples, token ids outside the vocabulary, video or audio tokens, or image tokens that do not match the images.
    """
    if not samples or any(not len(sample.input_ids) for sample in samples):
        raise UserError("an empty prompt cannot be run", "give at least one token a prompt")
    spec = model.spec
    lengths = np.array([len(sample.input_ids) for sample in samples], np.int64)
    ids = np.zeros((len(samples), int(lengths.max())), np.int64)
    types = np.zeros_like(ids)
    for row, sample in enumerate(samples):
        ids[row, : lengths[row]] = sample.input_ids
        types[row, : lengths[row]] = host_inputs.token_types(sample.input_ids, spec.image_token_id)
    if ids.min() < 0 or ids.max() >= spec.vocab_size:
        raise UserError(f"token id {ids.max() if ids.min() >= 0 else ids.min()} is outside the vocabulary of {spec.vocab_size}")
    for kind, token in (("video", spec.video_token_id), ("audio", spec.audio_token_id)):
        if token is not None and (ids == token).any():
            raise UserError(f"{kind} input is not supported", "give images")
    pixels = [sample.pixel_values for sample in samples if sample.pixel_values is not None]
    grids = [sample.image_grid_thw for sample in samples if sample.image_grid_thw is not None]
    grid = np.concatenate(grids) if grids else None
    positions, deltas = host_inputs.decoder_positions(types, lengths, grid, spec.vision.spatial_merge_size, spec.rope.kind,
                                                      spec.vision.queries)
    cos, sin = rotary_tables(spec, positions, dtype)
    embeds = embed_tokens(model, torch.from_numpy(ids)).to(dtype)
    deepstack = [torch.zeros_like(embeds) for _ in range(spec.num_deepstack)]
    if grid is not None:
        features, deep = run_vision(vision or model.vision_module(), np.concatenate(pixels), grid)
        where = torch.from_numpy(types).bool()
        if int(where.sum()) != len(features):
            raise UserError(f"{int(where.sum())} image tokens for {len(features)} image features")
        embeds = _scatter(embeds, where, features)
        deepstack = [_scatter(zeros, where, feature) for zeros, feature in zip(deepstack, deep, strict=True)]
    mask = host_inputs.attention_mask(np.zeros(len(samples), np.int64), ids.shape[1], ids.shape[1])
    return DecoderInputs(
        embeds,
        cos,
        sin,
        torch.from_numpy(mask).to(dtype),
        deepstack,
        torch.from_numpy(types),
        torch.from_numpy(lengths),
        torch.from_numpy(deltas),
        torch.from_numpy(host_inputs.router_types(ids, spec.image_expert_ids)),
    )


def rotary_tables(spec: ModelSpec, positions: np.ndarray, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [B, S, head_dim], both halves alike, of positions [3, B, S]."""
    half_tables = host_inputs.rope_tables(spec.rope, positions)
    cos, sin = (torch.from_numpy(np.concatenate((table, table), -1)).to(dtype) for table in half_tables)
    return cos, sin


def embed_tokens(model: MoEVLM, ids: torch.Tensor) -> torch.Tensor:
    """Embeddings [..., hidden] of ids [...] in the stored dtype, reading each token's row once."""
    unique, inverse = torch.unique(ids, return_inverse=True)
    rows = torch.cat([model.tensor_rows("embed_tokens.weight", int(i), int(i) + 1) for i in unique])
    return rows[inverse]


@torch.no_grad()
def run_vision(
    vision: torch.nn.Module, pixel_values: np.ndarray, image_grid_thw: np.ndarray
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Features [image tokens, hidden] and DeepStack features, one such tensor a layer, of all images in order, in host memory.

    Args:
        pixel_values: [patches, patch_features] float32.
        image_grid_thw: [num_images, 3].
    """
    device = next(vision.parameters()).device
    patches = torch.from_numpy(np.ascontiguousarray(pixel_values, np.float32)).to(device)
    out = vision(patches, grid_thw=torch.from_numpy(np.ascontiguousarray(image_grid_thw, np.int64)).to(device))
    return out.pooler_output.cpu(), [feature.cpu() for feature in getattr(out, "deepstack_features", None) or ()]


def _scatter(base: torch.Tensor, where: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    out = base.clone()
    out[where] = features.to(base.dtype)
    return out
