"""The vision tower as an ONNX graph, traced from transformers' own module with host-computed inputs.

The stock forward cannot be exported: it splits attention by image with data-dependent sizes. This forward runs the same
submodules, takes positions and interpolation taps from the host (runtime/host_inputs.py lists the inputs) and keeps attention
inside a frame with an additive mask, so that images of different sizes go through in one call and cannot see each other.

Outputs: ``image_features`` [num_merged, hidden], then ``deepstack_{i}`` [num_merged, hidden]; [num_queries, hidden] where learned
queries read the patches.

Kinds of towers are known by the parts they are made of: Qwen3-VL's, GLM-4.1V's, ERNIE-4.5-VL's, MoonViT with its projector (Kimi),
Idefics3's with a projector of learned queries (Aria), and InternViT with its projector.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterable, Iterator

import onnx_ir as ir
import torch
from onnx_ir.passes.common import clear_metadata_and_docstring
from torch import nn
from torch.nn import functional

from ecmfq_export.errors import CheckpointError, UnsupportedError
from ecmfq_export.graph.builder import IR_VERSION, OPSET
from ecmfq_export.models.spec import VisionSpec

MASKED = -30000.0
"""As runtime.host_inputs.MASKED: exact in float16, and no score added to it reaches -inf."""

_OWN_DIMS = {"query_indices": "num_queries", "query_segments": "num_queries", "frame_ids": "num_frames"}
"""Inputs that do not have a row for each patch."""

TORCH_DTYPES = {ir.DataType.FLOAT16: torch.float16, ir.DataType.FLOAT: torch.float32}


class HostedTower(nn.Module):
    """A vision tower whose data-dependent inputs come from the host; subclasses say how it is put together, and where its parts have
    other names than most towers'.

    Attributes:
        PARTS: dotted names of the submodules that tell this kind of tower.
        tower: transformers' module; its submodules are shared, not copied.
    """

    PARTS: tuple[str, ...] = ()

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    @property
    def rotary(self) -> nn.Module:
        """What turns positions into angles."""
        return self.tower.rotary_pos_emb

    @staticmethod
    def project_qkv(attn: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values [patches, heads * head_dim]."""
        return attn.qkv(x).chunk(3, dim=-1)

    def encode(
        self, blocks: Iterable[nn.Module], hidden: torch.Tensor, rope_positions: torch.Tensor, segment_ids: torch.Tensor
    ) -> Iterator[torch.Tensor]:
        """The residual stream after each block."""
        cos, sin = self.rotary(hidden, rope_positions)
        mask = _same_segment(segment_ids, segment_ids, hidden.dtype)
        for block in blocks:
            hidden = hidden + self._attend(block.attn, block.norm1(hidden), cos, sin, mask)
            hidden = hidden + block.mlp(block.norm2(hidden))
            yield hidden

    def _attend(self, attn: nn.Module, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        query, key, value = (
            part.unflatten(-1, (attn.num_heads, -1)).transpose(0, 1).unsqueeze(0) for part in self.project_qkv(attn, x)
        )
        query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
        out = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=attn.scaling)
        return attn.proj(out[0].transpose(0, 1).flatten(1))


class HostedQwenTower(HostedTower):
    """Qwen3-VL's vision tower."""

    PARTS = ("patch_embed", "pos_embed", "rotary_pos_emb", "blocks", "merger", "deepstack_merger_list", "deepstack_visual_indexes")

    def forward(
        self, patches: torch.Tensor, interp_indices: torch.Tensor, interp_weights: torch.Tensor, rope_positions: torch.Tensor,
        segment_ids: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """Features of merged patches, then the DeepStack features; see the module's docstring."""
        tower = self.tower
        hidden = _embed_patches(tower.patch_embed.proj, patches)
        hidden = hidden + (tower.pos_embed(interp_indices) * interp_weights[:, :, None]).sum(1)
        indexes, deepstack = list(tower.deepstack_visual_indexes), []
        for index, after in enumerate(self.encode(tower.blocks, hidden, rope_positions, segment_ids)):
            hidden = after
            if index in indexes:
                deepstack.append(tower.deepstack_merger_list[indexes.index(index)](hidden))
        return (tower.merger(hidden), *deepstack)


class HostedGlmTower(HostedTower):
    """GLM-4.1V's vision tower, whose merged patches go through a convolution and then a gated MLP."""

    PARTS = ("patch_embed", "post_conv_layernorm", "embeddings.position_embedding", "rotary_pos_emb", "blocks", "post_layernorm",
             "downsample", "merger")  # fmt: skip

    def forward(
        self, patches: torch.Tensor, interp_indices: torch.Tensor, interp_weights: torch.Tensor, rope_positions: torch.Tensor,
        segment_ids: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """Features of merged patches; see the module's docstring."""
        tower = self.tower
        hidden = tower.post_conv_layernorm(_embed_patches(tower.patch_embed.proj, patches))
        hidden = hidden + (tower.embeddings.position_embedding(interp_indices) * interp_weights[:, :, None]).sum(1)
        for after in self.encode(tower.blocks, hidden, rope_positions, segment_ids):
            hidden = after
        # The stride of the convolution is its kernel, and merged patches are neighbours: a matrix product.
        kernel = tower.downsample.weight
        blocks = tower.post_layernorm(hidden).unflatten(0, (-1, kernel.shape[2] * kernel.shape[3])).flatten(1)
        return (tower.merger(functional.linear(blocks, kernel.permute(0, 2, 3, 1).flatten(1), tower.downsample.bias)),)


class HostedErnieTower(HostedTower):
    """ERNIE-4.5-VL's tower and resampler, as models/ernie_vision.py puts them together; there is no position table."""

    PARTS = ("vision_tower.patch_embed", "vision_tower.rotary_pos_emb", "vision_tower.ln", "resampler_model.temporal_linear",
             "resampler_model.after_norm")  # fmt: skip

    @property
    def rotary(self) -> nn.Module:
        return self.tower.vision_tower.rotary_pos_emb

    def forward(self, patches: torch.Tensor, rope_positions: torch.Tensor, segment_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Features of merged patches; see the module's docstring."""
        tower, resampler = self.tower.vision_tower, self.tower.resampler_model
        hidden = tower.patch_embed.proj(patches)
        for after in self.encode(tower.blocks, hidden, rope_positions, segment_ids):
            hidden = after
        merged = tower.ln(hidden).unflatten(0, (-1, resampler.spatial_merge_size**2)).flatten(1)
        merged = resampler.spatial_linear(merged)
        # An image is both frames of a pair.
        merged = resampler.temporal_linear(torch.cat((merged, merged), dim=-1))
        return (resampler.after_norm(resampler.mlp(merged)),)


class HostedMoonVit(HostedTower):
    """MoonViT and its projector, as models/kimi_vision.py puts them together, over patches in merge-block order."""

    PARTS = ("vision_tower.patch_embed.pos_emb", "vision_tower.rotary_emb", "vision_tower.final_layernorm", "mm_projector.pre_norm")

    @property
    def rotary(self) -> nn.Module:
        return self.tower.vision_tower.rotary_emb

    @staticmethod
    def project_qkv(attn: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return attn.q_proj(x), attn.k_proj(x), attn.v_proj(x)

    def forward(
        self, patches: torch.Tensor, interp_indices: torch.Tensor, interp_weights: torch.Tensor, rope_positions: torch.Tensor,
        segment_ids: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """Features of merged patches; see the module's docstring."""
        tower = self.tower.vision_tower
        hidden = _embed_patches(tower.patch_embed.proj, patches)
        table = tower.patch_embed.pos_emb.position_embeddings.flatten(0, 1)
        hidden = hidden + (functional.embedding(interp_indices, table) * interp_weights[:, :, None]).sum(1)
        for after in self.encode(tower.layers, hidden, rope_positions, segment_ids):
            hidden = after
        # One frame an image: pooling over time changes nothing. Merged patches are neighbours.
        rows, columns = tower.merge_kernel_size
        merged = tower.final_layernorm(hidden).unflatten(0, (-1, rows * columns))
        return (self.tower.mm_projector(merged).flatten(0, 1),)


class HostedAriaTower(HostedTower):
    """Idefics3's tower and Aria's projector, as models/aria_vision.py puts them together: queries of an image read its patches."""

    PARTS = ("vision_tower.embeddings.position_embedding", "vision_tower.encoder.layers", "multi_modal_projector.query",
             "multi_modal_projector.cross_attn.multihead_attn")  # fmt: skip

    def forward(
        self, patches: torch.Tensor, interp_indices: torch.Tensor, interp_weights: torch.Tensor, segment_ids: torch.Tensor,
        query_indices: torch.Tensor, query_segments: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """Features of queries; see the module's docstring."""
        tower, projector = self.tower.vision_tower, self.tower.multi_modal_projector
        hidden = _embed_patches(tower.embeddings.patch_embedding, patches)
        hidden = hidden + (tower.embeddings.position_embedding(interp_indices) * interp_weights[:, :, None]).sum(1)
        mask = _same_segment(segment_ids, segment_ids, hidden.dtype)
        for block in tower.encoder.layers:
            attn, x = block.self_attn, block.layer_norm1(hidden)
            out = _attend(attn.num_heads, attn.q_proj(x), attn.k_proj(x), attn.v_proj(x), mask)
            hidden = hidden + attn.out_proj(out)
            hidden = hidden + block.mlp(block.layer_norm2(hidden))
        cross = projector.cross_attn
        inner = cross.multihead_attn
        read = cross.layer_norm_kv(hidden)
        asked = cross.layer_norm(functional.embedding(query_indices, projector.query))
        parts = (cross.q_proj(asked), cross.k_proj(read), cross.v_proj(read))
        weights, biases = inner.in_proj_weight.chunk(3), inner.in_proj_bias.chunk(3)
        query, key, value = (functional.linear(x, weight, bias) for x, weight, bias in zip(parts, weights, biases, strict=True))
        out = _attend(inner.num_heads, query, key, value, _same_segment(query_segments, segment_ids, hidden.dtype))
        return (projector.feed_forward(projector.layer_norm(cross.linear(inner.out_proj(out)))),)


class HostedInternVit(HostedTower):
    """InternViT and its projector, as models/intern_vision.py puts them together, over tiles with a class token each."""

    PARTS = ("vision_tower.embeddings.cls_token", "vision_tower.encoder.layer", "multi_modal_projector.layer_norm",
             "multi_modal_projector.linear_2")  # fmt: skip

    def forward(
        self, patches: torch.Tensor, interp_indices: torch.Tensor, interp_weights: torch.Tensor, segment_ids: torch.Tensor,
        frame_ids: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """Features of merged patches; see the module's docstring."""
        tower, merge = self.tower.vision_tower, self.tower.merge_size
        table = tower.embeddings.position_embeddings[0]
        hidden = _embed_patches(tower.embeddings.patch_embeddings.projection, patches)
        hidden = hidden + (functional.embedding(interp_indices, table[1:]) * interp_weights[:, :, None]).sum(1)
        first = tower.embeddings.cls_token[0] + table[:1]
        hidden = torch.cat((hidden, functional.embedding(torch.zeros_like(frame_ids), first)))
        frames = torch.cat((segment_ids, frame_ids))
        mask = _same_segment(frames, frames, hidden.dtype)
        for block in tower.encoder.layer:
            attn, x = block.attention, block.layernorm_before(hidden)
            out = _attend(attn.num_heads, attn.q_norm(attn.q_proj(x)), attn.k_norm(attn.k_proj(x)), attn.v_proj(x), mask)
            hidden = hidden + block.lambda_1 * attn.projection_layer(out)
            hidden = hidden + block.lambda_2 * block.mlp(block.layernorm_after(hidden))
        # Merged patches are neighbours, row by row as the pixel shuffle has them.
        merged = tower.layernorm(hidden[: patches.shape[0]]).unflatten(0, (-1, merge**2)).flatten(1)
        return (self.tower.multi_modal_projector(merged),)


def hosted_tower(tower: nn.Module) -> HostedTower:
    """`tower` with a forward that can be traced.

    Raises:
        UnsupportedError: a tower made of other parts.
    """
    missing: list[str] = []
    for kind in (HostedQwenTower, HostedGlmTower, HostedErnieTower, HostedMoonVit, HostedAriaTower, HostedInternVit):
        lacking = [part for part in kind.PARTS if not _has(tower, part)]
        if not lacking:
            return kind(tower)
        missing.append(f"{kind.__name__}: no {', '.join(lacking)}")
    raise UnsupportedError(f"vision tower {type(tower).__name__} is of no known kind ({'; '.join(missing)})",
                           "only towers of the Qwen3-VL, GLM-4.1V, ERNIE-4.5-VL, MoonViT, Aria and InternViT forms can be exported")


def _has(module: nn.Module, dotted: str) -> bool:
    for name in dotted.split("."):
        if not hasattr(module, name):
            return False
        module = getattr(module, name)
    return True


def _embed_patches(kernel: nn.Module, patches: torch.Tensor) -> torch.Tensor:
    """The patch convolution, whose stride is its kernel: a matrix product."""
    return functional.linear(patches, kernel.weight.flatten(1), kernel.bias)


def _same_segment(queries: torch.Tensor, keys: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Additive mask [1, 1, queries, keys] that keeps attention inside a segment."""
    return torch.where(queries[:, None] == keys[None, :], 0.0, MASKED).to(dtype)[None, None]


def _attend(num_heads: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Attention of [queries, heads * head_dim] over [keys, heads * head_dim], without rotary embedding."""
    query, key, value = (part.unflatten(-1, (num_heads, -1)).transpose(0, 1).unsqueeze(0) for part in (query, key, value))
    out = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return out[0].transpose(0, 1).flatten(1)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate-half rotary embedding in float32, as the tower does it; x [1, heads, patches, head_dim]."""
    wide = x.float()
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def trace_vision(tower: nn.Module, spec: VisionSpec, dtype: ir.DataType) -> ir.Model:
    """Trace `tower` (converted to `dtype` in place) into a graph with any number of patches.

    Raises:
        UnsupportedError: a tower of another form.
        CheckpointError: a weight that `dtype` cannot hold.
    """
    module = hosted_tower(tower).to(TORCH_DTYPES[dtype]).eval()
    for name, weight in tower.named_parameters():
        if not bool(torch.isfinite(weight).all()):
            raise CheckpointError(f"vision.{name} holds values beyond {dtype.name}", "export with dtype float32")
    if not (spec.queries or spec.class_token):
        # inv_freq must stay float32: angles of float16 frequencies are off by whole radians.
        rotary = module.rotary
        rotary.inv_freq = rotary.compute_axial_rope_parameters(rotary.config)[0]
    merge = spec.spatial_merge_size
    count, index, taps = 8 * merge * merge, torch.int64, spec.position_taps
    example = {
        "patches": torch.zeros(count, spec.patch_features, dtype=TORCH_DTYPES[dtype]),
        "interp_indices": torch.zeros(count, taps, dtype=index),
        "interp_weights": torch.zeros(count, taps, dtype=TORCH_DTYPES[dtype]),
        "rope_positions": torch.zeros(count, 2, dtype=index),
        "segment_ids": torch.zeros(count, dtype=index),
        "query_indices": torch.zeros(5, dtype=index),
        "query_segments": torch.zeros(5, dtype=index),
        "frame_ids": torch.zeros(3, dtype=index),
    }
    taken = inspect.signature(module.forward).parameters
    example = {name: value for name, value in example.items() if name in taken}
    merged = torch.export.Dim("num_merged", min=1)
    own = {name: torch.export.Dim(name, min=1) for name in set(_OWN_DIMS.values())}
    dims = {name: {0: own[_OWN_DIMS[name]] if name in _OWN_DIMS else merge * merge * merged} for name in example}
    outputs = ["image_features", *(f"deepstack_{i}" for i in range(len(spec.deepstack_layers)))]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            module, (), kwargs=example, dynamo=True, opset_version=OPSET, input_names=list(example), output_names=outputs,
            dynamic_shapes=dims, verbose=False, optimize=True,
        )  # fmt: skip
    return _tidy(program.model, spec)


def _tidy(model: ir.Model, spec: VisionSpec) -> ir.Model:
    """Name dimensions and weights, and drop the tracer's notes (they hold source paths of the machine that traced)."""
    clear_metadata_and_docstring.ClearMetadataAndDocStringPass()(model)
    for value in model.graph.inputs:
        value.shape = ir.Shape([_OWN_DIMS.get(value.name, "num_patches"), *value.shape[1:]])
    for value in model.graph.outputs:
        value.shape = ir.Shape(["num_queries" if spec.queries else "num_merged", spec.out_hidden_size])
    inner = [value for node in model.graph for value in node.outputs if not value.is_graph_output()]
    for value in inner:
        value.shape = None  # they name the tracer's symbols, which are gone
    for name in list(model.graph.initializers):
        if name.startswith("tower."):
            model.graph.initializers[name].name = "vision." + name.removeprefix("tower.")
    model.graph.name, model.producer_name, model.producer_version = "vision", "ecmfq_export", None
    model.ir_version = IR_VERSION
    return model
