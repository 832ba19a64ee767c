"""MBQ: modality-balanced quantization (arXiv 2412.19509).

AWQ's search with the mean absolute output error, in which a modality counts by how much the loss depends on it:
``argmin_s G_vision |err_vision|_1 + G_text |err_text|_1``, G the mean absolute gradient of the loss with respect to
the block's output at tokens of that modality. Only the ratio matters, so vision tokens weigh 1 and text tokens
:func:`text_weight`. The paper's text tokens are the answer's; here they are all text tokens, since every sample's question is
read by the same experts.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch

from ecmfq_export.quant import awq
from ecmfq_export.quant.hadamard import Rotation
from ecmfq_export.quant.sampled_outputs import Pairs
from ecmfq_export.quant.scale_result import PerExpertResult, ScaleResult


def text_weight(ratios: Sequence[float | None], layer: int) -> float:
    """Weight of text tokens in one layer from the gradient ratios text over vision of all layers.

    The authors' code (read in a derivative) bounds the vision weight below by its median over layers; the text weight is then at
    most the median.
    A layer without a ratio (no gradient reaches a vision token there) takes the median.

    Args:
        ratios: text over vision by layer, None where unknown; at least one is known.
    """
    median = statistics.median(ratio for ratio in ratios if ratio is not None)
    own = ratios[layer]
    return median if own is None else min(own, median)


def search_scale(
    train: Pairs, heldout: Pairs, weight: torch.Tensor, omega: torch.Tensor, num_bits: int, rounding: str = "real",
    tie: torch.Tensor | None = None, *, group_size: int = -1,
) -> ScaleResult:
    """As :func:`awq.search_scale` with absolute errors; ``Pairs.weight`` holds the modality's weight of each token."""
    return awq.search_scale(train, heldout, weight, omega, num_bits, rounding, tie, power=1, group_size=group_size)


def search_per_expert(
    train: Pairs, heldout: Pairs, weight: torch.Tensor, num_bits: int, rounding: str = "real", *, group_size: int = -1,
    rotation: Rotation | None = None,
) -> PerExpertResult:
    """As :func:`awq.search_per_expert` with absolute errors."""
    return awq.search_per_expert(train, heldout, weight, num_bits, rounding, power=1, group_size=group_size, rotation=rotation)
