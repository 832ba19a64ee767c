"""Folding smoothing scales into a decoder layer: the function stays, what is quantized changes.

====================  =====================  ==========================================
scale                 divides                multiplies
====================  =====================  ==========================================
attention_input [d]   input norm             columns of q, k, v (GQA); of q or q_a, and kv_a
                                             (MLA)
value [kv * head]     rows (and bias) of v   columns of o, each head its group's scales (GQA)
value [heads * v]     value rows of kv_b     columns of o (MLA)
q_latent [q rank]     norm of q's latent     columns of q_b (MLA)
kv_latent [kv rank]   norm of kv's latent    columns of kv_b (MLA)
moe_input [d]         second norm            columns of the router and of gate and up of
                                             every expert, routed and shared
down [E, I]           up rows of expert e    down columns of expert e
====================  =====================  ==========================================

Powers of two change exponents only, so that every product, sum and router logit keeps its bits.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from ecmfq_export.models.spec import MoESpec
from ecmfq_export.models.torch_decoder import DecoderLayer
from ecmfq_export.quant.hadamard import block_hadamard
from ecmfq_export.stages import attention_view


@dataclass(frozen=True)
class LayerScales:
    """Smoothing scales of one layer, float32, None where there is none; shapes as in the table above.

    Those of the attention are named after its groups. `down` is [1, I] for a dense MLP.
    """

    attention_input: torch.Tensor | None = None
    value: torch.Tensor | None = None
    moe_input: torch.Tensor | None = None
    down: torch.Tensor | None = None
    q_latent: torch.Tensor | None = None
    kv_latent: torch.Tensor | None = None

    def named(self) -> dict[str, torch.Tensor]:
        """The scales that are there."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: scale for name, scale in found.items() if scale is not None}


def fold_layer(layer: DecoderLayer, scales: LayerScales, consume: bool = False) -> DecoderLayer:
    """A layer with the scales folded in; `layer` is left as it is and unchanged tensors are shared.

    Args:
        consume: change `layer`'s own tensors in place instead, so that no second copy of its experts is made.

    Raises:
        ValueError: a layer whose down projection is rotated, which has other columns.
    """
    if layer.down_block != 1:
        raise ValueError(f"layer {layer.spec.index} is folded after its down projection was rotated")
    tensors = dict(layer.tensors)
    mlp = layer.spec.mlp

    owned = set(tensors) if consume else set()

    def own(name: str) -> torch.Tensor:
        """The tensor, copied before it is changed for the first time where it is not to be consumed."""
        if name not in owned:
            tensors[name] = tensors[name].clone()
            owned.add(name)
        return tensors[name]

    def divide_rows(name: str, scale: torch.Tensor) -> None:
        own(name).div_(scale.unsqueeze(-1) if tensors[name].ndim > scale.ndim else scale)

    def multiply_columns(name: str, scale: torch.Tensor) -> None:
        own(name).mul_(scale)

    for group in attention_view.groups(layer.spec.attention):
        scale = getattr(scales, group.name)
        if scale is None:
            continue
        for name in group.producers:
            if name in tensors:
                divide_rows(name, _by_row(scale, group.rows, len(tensors[name])))
        for name in group.weights:
            multiply_columns(name, scale if group.tie is None else scale[group.tie.to(scale.device)])
    readers = ("mlp.router.weight", "mlp.experts.gate_up_proj") if isinstance(mlp, MoESpec) else (
        "mlp.gate_proj.weight", "mlp.up_proj.weight")
    if scales.moe_input is not None:
        divide_rows("post_attention_layernorm.weight", scales.moe_input)
        for name in readers:
            multiply_columns(name, scales.moe_input)
    if scales.down is not None:
        if isinstance(mlp, MoESpec):
            own("mlp.experts.gate_up_proj").chunk(2, dim=1)[1].div_(scales.down.unsqueeze(-1))
            multiply_columns("mlp.experts.down_proj", scales.down.unsqueeze(1))
        else:
            divide_rows("mlp.up_proj.weight", scales.down[0])
            multiply_columns("mlp.down_proj.weight", scales.down[0])
    return DecoderLayer(layer.spec, layer.eps, tensors, dict(layer.quantized))


def rotate_down(layer: DecoderLayer) -> DecoderLayer:
    """A layer that computes the same with its down projection's inputs in blocks of a Hadamard, weight columns alike.

    The block is the largest power of two that divides the intermediate size, at most 128. Comes after :func:`fold_layer`.
    """
    name = "mlp.experts.down_proj" if isinstance(layer.spec.mlp, MoESpec) else "mlp.down_proj.weight"
    weight = layer.tensors[name]
    rotation = block_hadamard(weight.shape[-1])
    # W H^-1 with an H that is its own inverse, in float64 so that only the rotation's result is rounded.
    turned = rotation.apply(weight.double()).to(weight.dtype)
    return DecoderLayer(layer.spec, layer.eps, {**layer.tensors, name: turned}, dict(layer.quantized), rotation.block)


def _by_row(scale: torch.Tensor, rows: torch.Tensor | None, count: int) -> torch.Tensor:
    """The scale of each of `count` rows, 1 where a row makes no channel of it."""
    return scale if rows is None else torch.ones(count).index_put((rows,), scale)
