"""Outputs of scaled, quantized experts against floating-point ones on a few tokens of each: what every scale search looks at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ecmfq_export.quant.activation import fake_quantize_per_token
from ecmfq_export.quant.grouping import group_by_expert
from ecmfq_export.quant.hadamard import Rotation
from ecmfq_export.quant.qtensor import chunked
from ecmfq_export.quant.rtn import DEFAULT_MAX_BYTES, quantize_rtn


@dataclass(frozen=True)
class Pairs:
    """Which token went to which expert with which weight, for P pairs in a random order that the caller fixed.

    Attributes:
        x: float32 [T, d], inputs after the norm.
        token: int64 [P], row of `x`.
        expert: int64 [P].
        weight: float32 [P], w_te.
        types: int [T], 0 text, 1 vision.
    """

    x: torch.Tensor
    token: torch.Tensor
    expert: torch.Tensor
    weight: torch.Tensor
    types: torch.Tensor


@dataclass(frozen=True)
class OutputErrors:
    """Errors of some experts at some scale.

    Attributes:
        part: which of the evaluated experts.
        error: float32 [E', M, N], ``Q_w(W S) Q8(x / s) - W x`` (behind a rotation R: ``Q_w(W S R) Q8(R^T x / s) - W x``); the caller
            may overwrite it.
        token_weight: float32 [E', M], w_te, 0 where there is no token.
    """

    part: slice
    error: torch.Tensor
    token_weight: torch.Tensor


class SampledOutputs:
    """At most `capacity` tokens of each of `experts`, with the outputs that the floating-point weights give.

    Args:
        pairs: the tokens.
        weight: floating [E, N, d].
        num_bits, group_size: grid of the weights.
        capacity: tokens an expert.
        experts: int64 [E'], the experts to evaluate; None takes all.
        per_expert: whether scales are one an expert, [E, d] (down projections), instead of one for all, [d].
        max_bytes: working memory; experts are processed in chunks that fit.
        rotation: what scaled inputs and columns go through before they are quantized (its inverse is its transpose); None for nothing.

    Attributes:
        counts: float64 [E'], pairs that went to each expert.
        taken: float64 [E'], those that are evaluated.
    """

    def __init__(
        self, pairs: Pairs, weight: torch.Tensor, num_bits: int, capacity: int, experts: torch.Tensor | None = None,
        per_expert: bool = False, group_size: int = -1, max_bytes: int = DEFAULT_MAX_BYTES, rotation: Rotation | None = None,
    ) -> None:
        index, valid = group_by_expert(pairs.expert, weight.shape[0], capacity)
        chosen = torch.arange(weight.shape[0]) if experts is None else experts
        if pairs.expert.numel():
            self._rows = pairs.token[index[chosen]]
            self._token_weight = pairs.weight[index[chosen]] * valid[chosen]
        else:
            self._rows = torch.zeros(len(chosen), 1, dtype=torch.int64)
            self._token_weight = torch.zeros(len(chosen), 1)
        self.counts = torch.bincount(pairs.expert, minlength=weight.shape[0])[chosen].double()
        self.taken = valid[chosen].sum(1).double()
        # Rows that no chosen expert reads need not be quantized again and again.
        used, self._rows = torch.unique(self._rows, return_inverse=True)
        self._x = pairs.x[used].float() if len(pairs.x) else torch.zeros(1, weight.shape[-1])
        # All of them are taken as they are: a layer's experts are not copied for every search.
        self._weight = weight.float() if experts is None else weight[chosen].float()
        self._num_bits, self._group_size, self._per_expert, self._max_bytes = num_bits, group_size, per_expert, max_bytes
        self._experts, self._rotation = chosen, rotation
        rows, width = weight.shape[1], self._rows.shape[1]
        self._bytes_each = 4 * (4 * rows * weight.shape[-1] + 3 * width * rows + 2 * width * weight.shape[-1])
        keep = 4 * len(chosen) * width * rows <= max_bytes
        self._reference = self._outputs(slice(None)) if keep else None

    @property
    def num_experts(self) -> int:
        """E', the experts that are evaluated."""
        return len(self._experts)

    def references(self) -> Iterator[OutputErrors]:
        """The floating-point outputs ``W x`` in the place of errors; not to be overwritten."""
        for part in self._chunks():
            yield OutputErrors(part, self._target(part), self._token_weight[part])

    def errors(self, scale: torch.Tensor) -> Iterator[OutputErrors]:
        """Errors at `scale`, float32 [d], or [E, d] where per expert."""
        if self._per_expert:
            scale = scale[self._experts]
        shared = None if self._per_expert else fake_quantize_per_token(self._turned(self._x / scale))
        for part in self._chunks():
            s = scale[part].unsqueeze(1) if self._per_expert else scale
            columns = self._turned(self._weight[part] * s)
            weight = quantize_rtn(columns, self._num_bits, self._group_size, max_bytes=self._max_bytes).dequantize()
            rows = self._rows[part]
            inputs = fake_quantize_per_token(self._turned(self._x[rows] / s)) if shared is None else shared[rows]
            yield OutputErrors(part, (inputs @ weight.mT).sub_(self._target(part)), self._token_weight[part])

    def _turned(self, values: torch.Tensor) -> torch.Tensor:
        return values if self._rotation is None else self._rotation.apply(values)

    def _chunks(self) -> Iterator[slice]:
        return chunked(len(self._experts), self._bytes_each, self._max_bytes)

    def _outputs(self, part: slice) -> torch.Tensor:
        return self._x[self._rows[part]] @ self._weight[part].mT

    def _target(self, part: slice) -> torch.Tensor:
        return self._outputs(part) if self._reference is None else self._reference[part]
