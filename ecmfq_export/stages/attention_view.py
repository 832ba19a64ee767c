"""The attention's projections as an ordered list of groups that read one activation each, whatever the kind of attention.

A group is the unit of everything that quantization does to dense projections: one smoothing scale, one activation
quantization, one Hessian. Later groups read what earlier ones computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ecmfq_export.models.spec import AttentionSpec, GqaSpec, MlaSpec
from ecmfq_export.models.torch_decoder import DecoderLayer
from ecmfq_export.quant.qtensor import QTensor
from ecmfq_export.stages.streams import Batch


@dataclass(frozen=True)
class LinearGroup:
    """Projections that read one activation.

    Attributes:
        name: of the group, of its smoothing scale, and of its activation in :func:`taps`.
        weights: canonical suffixes of the projections [N_i, K]; stacked along rows they are one [N, K] matrix.
        producers: canonical suffixes of what a smoothing scale divides, along the first axis; those that a model lacks
            (a bias) are passed over.
        rows: int64 [C], the producers' row that makes each of the scale's C channels; None where row c makes channel c.
        tie: int64 [K], the scale's channel that each of the K input columns comes from; None where they are the same.
    """

    name: str
    weights: tuple[str, ...]
    producers: tuple[str, ...]
    rows: torch.Tensor | None = None
    tie: torch.Tensor | None = None


def groups(spec: AttentionSpec) -> tuple[LinearGroup, ...]:
    """The attention's groups in the order of computation; the last one is the output projection."""
    return _gqa_groups(spec) if isinstance(spec, GqaSpec) else _mla_groups(spec)


def _gqa_groups(spec: GqaSpec) -> tuple[LinearGroup, ...]:
    return (
        LinearGroup("attention_input", tuple(f"self_attn.{part}_proj.weight" for part in "qkv"), ("input_layernorm.weight",)),
        LinearGroup("value", ("self_attn.o_proj.weight",), ("self_attn.v_proj.weight", "self_attn.v_proj.bias"), tie=value_tie(spec)),
    )


def _mla_groups(spec: MlaSpec) -> tuple[LinearGroup, ...]:
    found = [LinearGroup("attention_input", (f"self_attn.{'q' if spec.q_lora_rank is None else 'q_a'}_proj.weight",
                                             "self_attn.kv_a_proj.weight"), ("input_layernorm.weight",))]
    if spec.q_lora_rank is not None:
        found.append(LinearGroup("q_latent", ("self_attn.q_b_proj.weight",), ("self_attn.q_a_norm.weight",)))
    found.append(LinearGroup("kv_latent", ("self_attn.kv_b_proj.weight",), ("self_attn.kv_a_norm.weight",)))
    # Every head has values of its own: nothing is tied.
    head = torch.arange(spec.num_heads).unsqueeze(1) * (spec.qk_nope_head_dim + spec.v_head_dim)
    rows = (head + spec.qk_nope_head_dim + torch.arange(spec.v_head_dim)).flatten()
    found.append(LinearGroup("value", ("self_attn.o_proj.weight",), ("self_attn.kv_b_proj.weight",), rows=rows))
    return tuple(found)


def value_tie(spec: GqaSpec) -> torch.Tensor:
    """Channel of v that each channel of the attention output comes from: int64 [heads * head_dim].

    Heads of one key/value group read the same values, so their channels share a scale.
    """
    head = torch.arange(spec.num_heads) // (spec.num_heads // spec.num_kv_heads)
    return (head.unsqueeze(1) * spec.head_dim + torch.arange(spec.head_dim)).flatten()


def weight_names(spec: AttentionSpec) -> tuple[str, ...]:
    """Canonical suffixes of every projection of the attention."""
    return tuple(name for group in groups(spec) for name in group.weights)


def stacked_weight(layer: DecoderLayer, group: LinearGroup) -> torch.Tensor:
    """The group's floating-point matrix [1, N, K]."""
    return torch.cat([layer.tensors[name] for name in group.weights]).unsqueeze(0)


def named_weights(layer: DecoderLayer, group: LinearGroup, weight: QTensor) -> dict[str, QTensor]:
    """A stacked weight [N, K] under the layer's own names; `layer` still holds the floating ones."""
    named, start = {}, 0
    for name in group.weights:
        stop = start + layer.tensors[name].shape[0]
        named[name], start = weight.rows(start, stop), stop
    return named


def taps(layer: DecoderLayer, hidden: torch.Tensor, batch: Batch) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What every group reads, [B, S, K] by group name in order, and the attention's probabilities [B, heads, S, S].

    Args:
        hidden: [B, S, hidden_size], what enters the layer.
        batch: its rotary tables and mask.
    """
    names = [group.name for group in groups(layer.spec.attention)]
    read = {name: tap(layer, hidden, batch, name) for name in names[:-1]}
    context, probs = layer.attention_context(layer.attention_input(hidden), batch.cos, batch.sin, batch.mask)
    return {**read, names[-1]: context}, probs


def tap(layer: DecoderLayer, hidden: torch.Tensor, batch: Batch, name: str) -> torch.Tensor:
    """What the group `name` alone reads, without computing what comes after it; arguments as :func:`taps`."""
    x = layer.attention_input(hidden)
    if name == "attention_input":
        return x
    if name == "q_latent":
        return layer.q_latent(x)
    if name == "kv_latent":
        return layer.kv_latent(x)[0]
    return layer.attention_context(x, batch.cos, batch.sin, batch.mask)[0]
