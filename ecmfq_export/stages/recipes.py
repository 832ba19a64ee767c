"""Which weights of a decoder are quantized to how many bits, and what is refused."""

from __future__ import annotations

from ecmfq_export.config import QuantConfig
from ecmfq_export.errors import UnsupportedError
from ecmfq_export.models.spec import DecoderLayerSpec, ModelSpec, MoESpec
from ecmfq_export.quant.qtensor import group_count

_BITS = {"fp16": None, "w8a8": 8, "w4a8": 4}


def attention_bits(config: QuantConfig) -> int | None:
    """Weight bits of the attention's projections; None where they stay in floating point."""
    return _BITS[config.attention]


def mlp_bits(spec: DecoderLayerSpec, config: QuantConfig) -> int | None:
    """Weight bits of the MLP: ``expert_bits`` for experts; a dense MLP follows the attention's recipe, being run by the same kernels."""
    return config.expert_bits if isinstance(spec.mlp, MoESpec) else attention_bits(config)


def mlp_group_size(spec: DecoderLayerSpec, config: QuantConfig) -> int:
    """Group size of the MLP's weights; dense projections have one scale a channel, as TensorRT's int4 needs."""
    return config.group_size if isinstance(spec.mlp, MoESpec) else -1


def check_supported(spec: ModelSpec, config: QuantConfig) -> None:
    """Refuse what these settings cannot do with this model, before anything is computed.

    Raises:
        UnsupportedError: an odd number of int4 columns, columns that the group size does not divide, or
            a quantized lm_head that is tied to the embeddings.
    """
    for layer in spec.layers:
        if not isinstance(layer.mlp, MoESpec):
            continue
        for columns in (layer.mlp.hidden_size, layer.mlp.intermediate_size):
            if columns % 2:
                raise UnsupportedError(f"layer {layer.index} has {columns} columns an expert", "int4 needs an even number")
            if config.group_size != -1:
                group_count(columns, config.group_size)
    if config.lm_head != "fp16" and spec.tie_word_embeddings:
        raise UnsupportedError("lm_head = 'w8a8' with tied embeddings", "keep the shared matrix: lm_head = 'fp16'")
