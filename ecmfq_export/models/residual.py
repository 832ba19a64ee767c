"""How each tensor touches the residual stream: behind which norm it reads it, whether it writes into it, or neither.

The residual stream is what embeddings and the vision tower start and every attention and MLP adds to. An orthogonal change of
its basis that reaches every writer and every reader leaves the model's function as it is (QuaRot, arXiv 2404.00456, section 4),
because an RMS norm without weight commutes with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from ecmfq_export.errors import UnsupportedError
from ecmfq_export.models.moe_vlm import layer_shapes
from ecmfq_export.models.spec import GqaSpec, MlaSpec, ModelSpec

EMBEDDINGS, FINAL_NORM, OUTPUT = "embed_tokens.weight", "norm.weight", "lm_head.weight"

_READERS: Mapping[str, tuple[str, ...]] = {
    "input_layernorm.weight": tuple(f"self_attn.{part}_proj.weight" for part in ("q", "k", "v", "q_a", "kv_a")),
    "post_attention_layernorm.weight": (
        "mlp.router.weight", "mlp.experts.gate_up_proj", "mlp.gate_proj.weight", "mlp.up_proj.weight",
    ),
}  # fmt: skip
"""Suffix of a norm to the suffixes of the weights that read its output, whatever kind of layer has them."""

_WRITERS = ("self_attn.o_proj.weight", "self_attn.o_proj.bias", "mlp.experts.down_proj", "mlp.down_proj.weight")
_INSIDE = (
    *(f"self_attn.{part}_proj.bias" for part in "qkv"), "self_attn.q_norm.weight", "self_attn.k_norm.weight",
    *(f"self_attn.{part}.weight" for part in ("q_a_norm", "q_b_proj", "kv_a_norm", "kv_b_proj")), "mlp.router.selection_bias",
)  # fmt: skip


@dataclass(frozen=True)
class Role:
    """What a tensor does with the residual stream.

    Attributes:
        kind: ``norm`` scales it for its readers; ``reads``: the last axis is the stream's, behind a norm; ``writes``: the rows are
            the stream's (the only axis of a bias, the last one of the embeddings); ``inside``: it is neither.
        norm: canonical name of the norm that a reader reads behind.
    """

    kind: Literal["norm", "reads", "writes", "inside"]
    norm: str = ""


@dataclass(frozen=True)
class ValuePath:
    """Where one attention's values run from head to head's output, so that a rotation within heads cancels.

    Attributes:
        size: values of a head.
        producers: suffixes of what makes them: rows in heads of ``skipped + size``, of which the first `skipped` are no values.
        consumer: suffix of the projection whose columns, in heads of `size`, read them.
    """

    size: int
    producers: tuple[str, ...]
    skipped: int = 0
    consumer: str = "self_attn.o_proj.weight"


def residual_roles(spec: ModelSpec, vision_writers: Iterable[str], vision: Iterable[str]) -> dict[str, Role]:
    """The role of every canonical tensor.

    Args:
        vision_writers: canonical tensors of the vision tower whose rows (or only axis) enter the residual stream.
        vision: all canonical tensors of the vision tower.

    Raises:
        UnsupportedError: a tensor of the decoder whose part is not known here.
    """
    roles = {EMBEDDINGS: Role("writes")}
    for layer in spec.layers:
        prefix = f"layers.{layer.index}."
        roles.update({prefix + suffix: _role(prefix, suffix) for suffix in layer_shapes(spec, layer)})
    roles[FINAL_NORM] = Role("norm")
    if not spec.tie_word_embeddings:
        roles[OUTPUT] = Role("reads", FINAL_NORM)
    writers = set(vision_writers)
    roles.update({name: Role("writes" if name in writers else "inside") for name in vision})
    lost = sorted(writers - set(roles))
    if lost:
        raise UnsupportedError(f"the vision tower has no {', '.join(lost)}", "its family names other writers than its tower has")
    return roles


def value_path(attention: object) -> ValuePath:
    """The value path of a layer's attention.

    Raises:
        UnsupportedError: a kind of attention that is not known here.
    """
    if isinstance(attention, GqaSpec):
        return ValuePath(attention.head_dim, ("self_attn.v_proj.weight", "self_attn.v_proj.bias"))
    if isinstance(attention, MlaSpec):
        return ValuePath(attention.v_head_dim, ("self_attn.kv_b_proj.weight",), skipped=attention.qk_nope_head_dim)
    raise UnsupportedError(f"values of {type(attention).__name__} cannot be rotated", "set rotate_values = false")


def _role(prefix: str, suffix: str) -> Role:
    if suffix in _READERS:
        return Role("norm")
    if suffix in _WRITERS:
        return Role("writes")
    if suffix in _INSIDE:
        return Role("inside")
    for norm, readers in _READERS.items():
        if suffix in readers:
            return Role("reads", prefix + norm)
    raise UnsupportedError(f"'{prefix}{suffix}' has no known part in the residual stream", "set rotate = 'none'")
