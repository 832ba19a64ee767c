"""The vision tower as an ONNX graph, traced from transformers' own module with host-computed inputs.

The stock forward cannot be exported: it splits attention by image with data-dependent sizes. This forward runs the same
submodules, takes positions and interpolation taps from the host (runtime/host_inputs.py lists the inputs) and keeps attention
inside a frame with an additive mask, so that images of different sizes go through in one call and cannot see each other.

Outputs: ``image_features`` [num_merged, hidden], then ``deepstack_{i}`` [num_merged, hidden].
"""

from __future__ import annotations

import logging
import warnings

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

TORCH_DTYPES = {ir.DataType.FLOAT16: torch.float16, ir.DataType.FLOAT: torch.float32}

_PARTS = (
    "patch_embed",
    "pos_embed",
    "rotary_pos_emb",
    "blocks",
    "merger",
    "deepstack_merger_list",
    "deepstack_visual_indexes",
)


class HostedVisionTower(nn.Module):
    """A Qwen3-VL vision tower whose data-dependent inputs come from the host.

    Args:
        tower: transformers' module; its submodules are shared, not copied.

    Raises:
        UnsupportedError: a tower made of other parts.
    """

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        missing = [part for part in _PARTS if not hasattr(tower, part)]
        if missing:
            raise UnsupportedError(
                f"vision tower {type(tower).__name__} has no {', '.join(missing)}",
                "only towers of the Qwen3-VL form can be exported",
            )
        self.tower = tower

    def forward(
        self,
        patches: torch.Tensor,
        interp_indices: torch.Tensor,
        interp_weights: torch.Tensor,
        rope_positions: torch.Tensor,
        segment_ids: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """Features of merged patches, then the DeepStack features; see the module's docstring."""
        tower = self.tower
        # The patch convolution's stride is its kernel: a matrix product.
        kernel = tower.patch_embed.proj
        hidden = functional.linear(patches, kernel.weight.flatten(1), kernel.bias)
        hidden = hidden + (tower.pos_embed(interp_indices) * interp_weights[:, :, None]).sum(1)
        cos, sin = tower.rotary_pos_emb(hidden, rope_positions)
        same = segment_ids[:, None] == segment_ids[None, :]
        mask = torch.where(same, 0.0, MASKED).to(hidden.dtype)[None, None]
        deepstack = []
        for index, block in enumerate(tower.blocks):
            hidden = hidden + self._attend(block.attn, block.norm1(hidden), cos, sin, mask)
            hidden = hidden + block.mlp(block.norm2(hidden))
            if index in tower.deepstack_visual_indexes:
                deepstack.append(tower.deepstack_merger_list[list(tower.deepstack_visual_indexes).index(index)](hidden))
        return (tower.merger(hidden), *deepstack)

    @staticmethod
    def _attend(attn: nn.Module, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        query, key, value = attn.qkv(x).unflatten(-1, (3, attn.num_heads, attn.head_dim)).permute(1, 2, 0, 3).unsqueeze(1).unbind(0)
        query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
        out = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=attn.scaling)
        return attn.proj(out[0].transpose(0, 1).flatten(1))


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
    module = HostedVisionTower(tower).to(TORCH_DTYPES[dtype]).eval()
    for name, weight in tower.named_parameters():
        if not bool(torch.isfinite(weight).all()):
            raise CheckpointError(f"vision.{name} holds values beyond {dtype.name}", "export with dtype float32")
    # inv_freq must stay float32: angles of float16 frequencies are off by whole radians.
    rotary = tower.rotary_pos_emb
    rotary.inv_freq = rotary.compute_axial_rope_parameters(rotary.config)[0]
    merge = spec.spatial_merge_size
    count, index = 8 * merge * merge, torch.int64
    example = {
        "patches": torch.zeros(count, spec.patch_features, dtype=TORCH_DTYPES[dtype]),
        "interp_indices": torch.zeros(count, 4, dtype=index),
        "interp_weights": torch.zeros(count, 4, dtype=TORCH_DTYPES[dtype]),
        "rope_positions": torch.zeros(count, 2, dtype=index),
        "segment_ids": torch.zeros(count, dtype=index),
    }
    merged = torch.export.Dim("num_merged", min=1)
    patches = merge * merge * merged
    outputs = ["image_features", *(f"deepstack_{i}" for i in range(len(spec.deepstack_layers)))]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            module, (), kwargs=example, dynamo=True, opset_version=OPSET, input_names=list(example), output_names=outputs,
            dynamic_shapes={name: {0: patches} for name in example}, verbose=False, optimize=True,
        )  # fmt: skip
    return _tidy(program.model, spec)


def _tidy(model: ir.Model, spec: VisionSpec) -> ir.Model:
    """Name dimensions and weights, and drop the tracer's notes (they hold source paths of the machine that traced)."""
    clear_metadata_and_docstring.ClearMetadataAndDocStringPass()(model)
    for value in model.graph.inputs:
        value.shape = ir.Shape(["num_patches", *value.shape[1:]])
    for value in model.graph.outputs:
        value.shape = ir.Shape(["num_merged", spec.out_hidden_size])
    inner = [value for node in model.graph for value in node.outputs if not value.is_graph_output()]
    for value in inner:
        value.shape = None  # they name the tracer's symbols, which are gone
    for name in list(model.graph.initializers):
        if name.startswith("tower."):
            model.graph.initializers[name].name = "vision." + name.removeprefix("tower.")
    model.graph.name, model.producer_name, model.producer_version = "vision", "ecmfq_export", None
    model.ir_version = IR_VERSION
    return model
