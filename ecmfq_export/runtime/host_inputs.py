"""What the host computes for the two graphs, in NumPy alone: positions, rotary tables, masks, vision indices.

The graphs hold no data-dependent shapes, no position logic and no image-grid logic; all of it is here, equal to transformers'
``get_rope_index``, ``Qwen3VLMoeTextRotaryEmbedding`` and ``vision_utils`` (5.23), and tested against them.

Vision graph inputs (``num_patches`` = all patches of all images, in merge-block order)::

    patches           [num_patches, patch_features] T   the processor's pixel_values, see :func:`merge_block_order`
    interp_indices    [num_patches, taps] int64         rows of the learned position table: 4 bilinear taps, 16 bicubic ones, 1 entry
    interp_weights    [num_patches, taps] T             their weights; neither of the two where the tower has no table
    rope_positions    [num_patches, 2] int64            row and column of each patch; not with the inputs that follow
    segment_ids       [num_patches] int64               which frame a patch belongs to; attention stays inside a frame
    query_indices     [num_queries] int64               learned queries, image after image; only where the tower has some
    query_segments    [num_queries] int64               the frame that each of them reads
    frame_ids         [num_frames] int64                every frame once; only where each has a class token

Merging needs no index: four (merge_size ** 2) neighbouring patches are adjacent in merge-block order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ecmfq_export.errors import UserError

MASKED = -30000.0
"""Added to a masked attention score. Exact in float16; a score may be added to it without reaching -inf (a row of -inf gives
NaN), and exp() of it is 0 in float32."""


_ROPE_KINDS = ("mrope_interleaved", "mrope", "mrope_alternating", "rope")


class RopeLike(Protocol):
    """Fields of models.spec.RopeSpec that the tables need."""

    kind: str
    theta: float
    sections: tuple[int, ...]
    head_dim: int


class VisionLike(Protocol):
    """Fields of models.spec.VisionSpec that the vision inputs need."""

    spatial_merge_size: int
    num_position_embeddings: int
    position_interpolation: str
    patch_order: str
    queries: tuple[tuple[int, int], ...]
    class_token: bool


@dataclass(frozen=True)
class HostRope:
    """Rotary embedding as ``runtime.json`` states it; see models.spec.RopeSpec."""

    kind: str
    theta: float
    sections: tuple[int, ...]
    head_dim: int


@dataclass(frozen=True)
class HostVision:
    """The vision tower's sizes as ``runtime.json`` states them; see models.spec.VisionSpec."""

    spatial_merge_size: int
    num_position_embeddings: int
    patch_features: int
    position_interpolation: str = "bilinear"
    patch_order: str = "merge_block"
    queries: tuple[tuple[int, int], ...] = ()
    class_token: bool = False


@dataclass(frozen=True)
class HostSpec:
    """What this module needs of ``runtime.json``."""

    rope: HostRope
    vision: HostVision
    num_deepstack: int
    max_seq_len: int
    dtype: np.dtype
    image_expert_ids: tuple[int, ...] = ()

    @classmethod
    def from_runtime_json(cls, runtime: Mapping[str, Any]) -> HostSpec:
        """Read the fields.

        Raises:
            UserError: one is missing.
        """
        try:
            rope, vision = runtime["rope"], runtime["vision"]
            return cls(
                HostRope(rope["kind"], float(rope["theta"]), tuple(rope["sections"]), int(rope["head_dim"])),
                HostVision(*(int(vision[key]) for key in ("spatial_merge_size", "num_position_embeddings", "patch_features")),
                           str(vision["position_interpolation"]), str(vision["patch_order"]),
                           tuple((int(patches), int(count)) for patches, count in vision.get("queries", ())),
                           bool(vision.get("class_token", False))),
                int(runtime["num_deepstack"]),
                int(runtime["max_seq_len"]),
                np.dtype(runtime["dtype"]),
                tuple(int(token) for token in runtime.get("image_expert_ids", ())),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"runtime.json: {error!r} is missing or wrong", "export the model again") from None


def token_types(input_ids: np.ndarray, image_token_id: int) -> np.ndarray:
    """0 at text, 1 at image placeholder tokens; int64, the shape of `input_ids`."""
    return (np.asarray(input_ids) == image_token_id).astype(np.int64)


def router_types(input_ids: np.ndarray, image_expert_ids: Sequence[int]) -> np.ndarray:
    """Whose routed experts each token chooses from: 1 (image) for `image_expert_ids`, else 0; int64, the shape of `input_ids`."""
    return np.isin(np.asarray(input_ids), image_expert_ids).astype(np.int64)


def decoder_positions(
    types: np.ndarray, lengths: Sequence[int] | np.ndarray, image_grid_thw: np.ndarray | None, spatial_merge_size: int,
    rope_kind: str = "mrope_interleaved", queries: Sequence[tuple[int, int]] = (),
) -> tuple[np.ndarray, np.ndarray]:
    """Positions on the three MRoPE axes, as transformers' ``get_rope_index`` gives them for a right-padded batch.

    Text advances all axes together; an image holds the temporal axis still, spreads rows and columns over the other two and
    advances by the larger side. With plain rotary embedding (``rope_kind = "rope"``) every token, of text or image, advances all
    axes by one.

    Args:
        types: [batch, seq], 0 text and 1 image (padding is ignored).
        lengths: [batch], tokens that are not padding.
        image_grid_thw: [num_images, 3] in patches, every image of the batch in order; None without images.
        spatial_merge_size: patches along a merged patch's side.
        rope_kind: as models.spec.RopeSpec.kind.
        queries: as models.spec.VisionSpec.queries; such images have no rows and columns, so only ``"rope"`` goes with them.

    Returns:
        positions [3, batch, seq] int64 (0 at padding), deltas [batch] int64: the position of the token after the prompt is
        ``length + delta`` on every axis, see :func:`decode_positions`.

    Raises:
        UserError: image tokens and grids do not match.
    """
    types = np.asarray(types)
    batch, seq = types.shape
    grids = np.zeros((0, 3), np.int64) if image_grid_thw is None else np.asarray(image_grid_thw, np.int64).reshape(-1, 3)
    positions = np.zeros((3, batch, seq), np.int64)
    deltas = np.zeros(batch, np.int64)
    used = 0
    for row in range(batch):
        length = int(lengths[row])
        current = at = largest = 0
        while at < length:
            end = _run_end(types[row], at, length)
            if types[row, at] == 0:
                positions[:, row, at:end] = np.arange(current, current + end - at)
                current += end - at
            while at < end and types[row, at] != 0:
                if used == len(grids):
                    raise UserError(f"prompt {row} has image tokens for more than the {len(grids)} images given")
                block, advance = _image_positions(grids[used], spatial_merge_size, rope_kind, queries)
                stop = at + block.shape[1]
                if stop > end:
                    raise UserError(
                        f"prompt {row}: image {used} (grid {grids[used].tolist()}) needs {block.shape[1]} tokens, "
                        f"{end - at} image tokens are there"
                    )
                positions[:, row, at:stop] = block + current
                current += advance
                used, at = used + 1, stop
            at = end
            largest = int(positions[:, row, :end].max()) + 1
        deltas[row] = largest - length
    if used != len(grids):
        raise UserError(f"{len(grids)} images for {used} runs of image tokens")
    return positions, deltas


def _run_end(types: np.ndarray, start: int, length: int) -> int:
    changes = np.flatnonzero(types[start:length] != types[start])
    return start + int(changes[0]) if len(changes) else length


def image_tokens(grid: Sequence[int] | np.ndarray, merge: int, queries: Sequence[tuple[int, int]] = ()) -> int:
    """How many tokens stand for an image.

    Args:
        grid: [3], patches along time, height and width.
        merge, queries: as models.spec.VisionSpec has them.

    Raises:
        UserError: no queries are known for an image of that size.
    """
    frames, rows, columns = (int(side) for side in grid)
    if not queries:
        return frames * (rows // merge) * (columns // merge)
    canvas = max(rows, columns) ** 2
    for patches, count in queries:
        if patches == canvas:
            return frames * count
    raise UserError(f"an image of {rows} x {columns} patches fills no canvas of the model",
                    f"canvases have {', '.join(str(patches) for patches, _ in queries)} patches")


def _image_positions(grid: np.ndarray, merge: int, rope_kind: str, queries: Sequence[tuple[int, int]]) -> tuple[np.ndarray, int]:
    frames, rows, columns = int(grid[0]), int(grid[1]) // merge, int(grid[2]) // merge
    if rope_kind == "rope":
        count = image_tokens(grid, merge, queries)
        return np.broadcast_to(np.arange(count), (3, count)), count
    return np.indices((frames, rows, columns)).reshape(3, -1), max(rows, columns)


def decode_positions(cached: Sequence[int] | np.ndarray, deltas: np.ndarray) -> np.ndarray:
    """Positions [3, batch, 1] int64 of one new token each, `cached` [batch] tokens being in the cache already."""
    return np.broadcast_to((np.asarray(cached, np.int64) + deltas)[None, :, None], (3, len(deltas), 1))


def rope_tables(rope: RopeLike, positions: np.ndarray, dtype: np.dtype | type = np.float32) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin [batch, seq, head_dim / 2] for ONNX RotaryEmbedding (``interleaved=0``, the rotate-half form).

    Frequency ``i`` turns with the axis that owns it: interleaved sections give T H W T H W ... as long as H and W have
    frequencies, then T; plain ones lie one behind the other;
    alternating ones give H W H W ..., then T; without sections the first axis owns all. The other half of head_dim
    repeats the same angles, which RotaryEmbedding does by itself.

    Args:
        rope: kind, theta, sections and head_dim.
        positions: [3, batch, seq] integers.
        dtype: of the result. Angles are float32 as in transformers.

    Raises:
        UserError: an unknown kind or sections that do not add up.
    """
    half = rope.head_dim // 2
    if rope.kind not in _ROPE_KINDS:
        raise UserError(f"rotary embedding '{rope.kind}' is not supported", f"supported: {', '.join(_ROPE_KINDS)}")
    if rope.kind != "rope" and sum(rope.sections) != half:
        raise UserError(f"rope sections {list(rope.sections)} sum to {sum(rope.sections)}, head_dim / 2 is {half}")
    axis = np.zeros(half, np.int64)
    if rope.kind == "mrope":
        axis = np.repeat(np.arange(len(rope.sections)), rope.sections)
    elif rope.kind == "mrope_alternating":
        axis[: 2 * rope.sections[1]] = np.tile([1, 2], rope.sections[1])
    elif rope.kind == "mrope_interleaved":
        for which in (1, 2):
            axis[which : rope.sections[which] * 3 : 3] = which
    exponent = np.arange(0, rope.head_dim, 2, dtype=np.float32) / np.float32(rope.head_dim)
    # float64 rounded once: the correctly rounded frequency, which float32 powers miss by an ulp.
    inverse = (1.0 / (rope.theta ** exponent.astype(np.float64)).astype(np.float32)).astype(np.float32)
    angles = np.moveaxis(np.asarray(positions)[axis], 0, -1).astype(np.float32) * inverse
    return np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)


def attention_mask(cached: Sequence[int] | np.ndarray, seq: int, max_seq_len: int, dtype: np.dtype | type = np.float32) -> np.ndarray:
    """Additive causal mask [batch, 1, seq, max_seq_len] over a static cache: 0 where visible, :data:`MASKED` elsewhere.

    Query ``i`` of a row stands at cache slot ``cached + i`` and sees slots up to its own. Right padding needs nothing more:
    a padded query comes after every real one, so no real query sees its key, and decoding overwrites its slot before it
    becomes visible.

    Args:
        cached: [batch], tokens in the cache before this call (the graph's write_indices); zeros for a prefill.

    Raises:
        UserError: the new tokens do not fit into the cache.
    """
    starts = np.asarray(cached, np.int64)
    if len(starts) and int(starts.max()) + seq > max_seq_len:
        raise UserError(
            f"{int(starts.max())} cached and {seq} new tokens exceed the cache of {max_seq_len}",
            "shorten the prompt, or export with a larger max_seq_len",
        )
    slots = np.arange(max_seq_len)
    last = starts[:, None, None, None] + np.arange(seq)[None, None, :, None]
    return np.where(slots <= last, 0.0, MASKED).astype(dtype)


def scatter_features(types: np.ndarray, features: np.ndarray, base: np.ndarray | None = None) -> np.ndarray:
    """Features of image tokens in their places: [batch, seq, hidden] of `features`' dtype.

    Args:
        types: [batch, seq], 1 at image tokens (0 at padding).
        features: [image tokens of the whole batch, hidden], in order.
        base: what stands elsewhere (token embeddings); zeros where None, which is the DeepStack form.

    Raises:
        UserError: another number of image tokens than features.
    """
    where = np.asarray(types) != 0
    if int(where.sum()) != len(features):
        raise UserError(f"{int(where.sum())} image tokens for {len(features)} image features")
    out = np.zeros((*where.shape, features.shape[-1]), features.dtype) if base is None else base.astype(features.dtype)
    out[where] = features
    return out


def vision_inputs(image_grid_thw: np.ndarray, vision: VisionLike, dtype: np.dtype | type = np.float32) -> dict[str, np.ndarray]:
    """Every input of the vision graph but ``patches``, for all images of `image_grid_thw` [num_images, 3] in one call.

    The learned square position table is resampled as ``vision.position_interpolation`` says; see the module's table for shapes.

    Raises:
        UserError: a grid that merge_size does not divide, a table that is no square, or an unknown interpolation.
    """
    tabled = vision.position_interpolation != "none"
    if tabled and vision.position_interpolation not in _AXIS_TAPS:
        raise UserError(f"position interpolation '{vision.position_interpolation}'", f"supported: {', '.join(_AXIS_TAPS)}, none")
    axis_taps = _AXIS_TAPS[vision.position_interpolation] if tabled else _no_taps
    merge, side = vision.spatial_merge_size, round(vision.num_position_embeddings**0.5)
    if side * side != vision.num_position_embeddings:
        raise UserError(f"num_position_embeddings = {vision.num_position_embeddings} is no square")
    indices, weights, places, segments = [], [], [], []
    segment = 0
    for frames, rows, columns in np.asarray(image_grid_thw, np.int64).reshape(-1, 3).tolist():
        if frames < 1 or rows < 1 or columns < 1 or rows % merge or columns % merge:
            raise UserError(f"image grid {[frames, rows, columns]} is not made of {merge} x {merge} patch blocks")
        place = _merge_blocks(np.indices((rows, columns)).reshape(2, -1).T, rows, columns, merge)
        row_taps, row_weights = axis_taps(place[:, 0], rows, side)
        column_taps, column_weights = axis_taps(place[:, 1], columns, side)
        taps = (row_taps[:, :, None] * side + column_taps[:, None, :]).reshape(len(place), -1)
        weight = (row_weights[:, :, None] * column_weights[:, None, :]).reshape(len(place), -1)
        indices.append(np.tile(taps, (frames, 1)))
        weights.append(np.tile(weight, (frames, 1)))
        places.append(np.tile(place, (frames, 1)))
        segments.append(np.repeat(np.arange(segment, segment + frames), rows * columns))
        segment += frames
    if not segment:
        raise UserError("no images", "the vision graph is not run for text-only prompts")
    inputs = {"segment_ids": np.concatenate(segments)}
    if tabled:
        inputs |= {"interp_indices": np.concatenate(indices), "interp_weights": np.concatenate(weights).astype(dtype)}
    if vision.class_token:
        return inputs | {"frame_ids": np.arange(segment)}
    if not vision.queries:
        return inputs | {"rope_positions": np.concatenate(places)}
    counts = [image_tokens(grid, merge, vision.queries) for grid in np.asarray(image_grid_thw, np.int64).reshape(-1, 3)]
    return inputs | {"query_indices": np.concatenate([np.arange(count) for count in counts]),
                     "query_segments": np.repeat(np.arange(len(counts)), counts)}


def merge_block_order(patches: np.ndarray, image_grid_thw: np.ndarray, vision: VisionLike) -> np.ndarray:
    """The processor's patches [num_patches, ...] in merge-block order: those that are merged into one token are adjacent."""
    if vision.patch_order == "merge_block":
        return patches
    parts, start = [], 0
    for frames, rows, columns in np.asarray(image_grid_thw, np.int64).reshape(-1, 3).tolist():
        for _ in range(frames):
            stop = start + rows * columns
            parts.append(_merge_blocks(patches[start:stop], rows, columns, vision.spatial_merge_size))
            start = stop
    return np.concatenate(parts)


def _merge_blocks(values: np.ndarray, rows: int, columns: int, merge: int) -> np.ndarray:
    """values [rows * columns, ...] of one frame from raster to merge-block order."""
    blocks = values.reshape(rows // merge, merge, columns // merge, merge, *values.shape[1:])
    return blocks.swapaxes(1, 2).reshape(values.shape)


def _bilinear_taps(index: np.ndarray, size: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Two taps [n, 2] and their float32 weights along one axis, corners aligned, in transformers' order of operations."""
    source = index.astype(np.float32) * np.float32(side - 1) / np.float32(max(size - 1, 1))
    floor = np.floor(source)
    offsets = np.arange(2)
    taps = np.clip(floor.astype(np.int64)[:, None] + offsets, 0, side - 1)
    distance = np.abs(source[:, None] - floor[:, None] - offsets.astype(np.float32))
    return taps, np.maximum(np.float32(1) - distance, np.float32(0)).astype(np.float32)


def _bicubic_taps(index: np.ndarray, size: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Four taps [n, 4] and their float32 weights along one axis, corners not aligned: the Keys kernel with a = -0.75."""
    source = (index.astype(np.float32) + np.float32(0.5)) * np.float32(side) / np.float32(size) - np.float32(0.5)
    floor = np.floor(source)
    offsets = np.arange(-1, 3)
    taps = np.clip(floor.astype(np.int64)[:, None] + offsets, 0, side - 1)
    x = np.abs((source - floor)[:, None] - offsets.astype(np.float32))
    a = np.float32(-0.75)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return taps, np.where(x <= 1, near, far).astype(np.float32)


def _no_taps(index: np.ndarray, size: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """No taps, where there is no table."""
    return np.zeros((len(index), 0), np.int64), np.zeros((len(index), 0), np.float32)


def _bucket_taps(index: np.ndarray, size: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """The one entry [n, 1] whose share of an axis a patch's beginning falls into, in Idefics3's float32."""
    count = int(np.ceil((1.0 - 1 / side) / (1 / side)))
    boundaries = (1 / side + np.arange(count) * (1 / side)).astype(np.float32)
    place = np.minimum(index.astype(np.float32) * (np.float32(1.0) / np.float32(size)), np.float32(1 - 1e-6))
    return np.searchsorted(boundaries, place, side="right")[:, None], np.ones((len(index), 1), np.float32)


def _own_taps(index: np.ndarray, size: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """The patch's own entry [n, 1]."""
    if size != side:
        raise UserError(f"a tile is {size} patches long, the position table {side}")
    return index[:, None], np.ones((len(index), 1), np.float32)


_AXIS_TAPS = {"bilinear": _bilinear_taps, "bicubic": _bicubic_taps, "bucket": _bucket_taps, "own": _own_taps}
