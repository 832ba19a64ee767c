"""Outputs of scaled, quantized experts against floating-point ones on a few tokens of each: what every scale search looks at.

A layer of a large model has more output channels than a search needs: an error that is summed over thousands of channels of many
experts is known from a part of them. So a search says how many multiplications one look may cost, and rows of each expert are
drawn until it costs no more; every candidate sees the same rows. Small layers are looked at whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ecmfq_export.quant.activation import fake_quantize_per_token
from ecmfq_export.quant.fake_quantize import fake_quantize_rows_
from ecmfq_export.quant.grouping import group_by_expert
from ecmfq_export.quant.hadamard import Rotation
from ecmfq_export.quant.qtensor import chunked
from ecmfq_export.quant.rtn import DEFAULT_MAX_BYTES

UNLIMITED = 1 << 62

FEWEST_ROWS = 32
"""Rows of an expert that are looked at whatever they cost."""

_CACHED_BYTES = 1 << 23
"""On a CPU so much is worked on at a time, so that it stays in a core's cache between one pass and the next."""


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
        max_products: multiplications that one scale may cost. Where all N rows would take more, as many rows of each expert are drawn,
            the same ones for every scale, at least :data:`FEWEST_ROWS`. See :func:`sampled_rows`.

    Attributes:
        counts: float64 [E'], pairs that went to each expert.
        taken: float64 [E'], those that are evaluated.
        num_rows: R, rows of each expert that are evaluated, at most N.
    """

    def __init__(
        self, pairs: Pairs, weight: torch.Tensor, num_bits: int, capacity: int, experts: torch.Tensor | None = None,
        per_expert: bool = False, group_size: int = -1, max_bytes: int = DEFAULT_MAX_BYTES, rotation: Rotation | None = None,
        max_products: int = UNLIMITED,
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
        width, columns = self._rows.shape[1], weight.shape[-1]
        rows = sampled_rows(weight.shape[:2], max_products // max(1, len(chosen) * width * columns), weight.device.type)
        if rows is not None:
            self._weight = weight[chosen.unsqueeze(1), rows[chosen]].float()
        else:
            # All of them are taken as they are: a layer's experts are not copied for every search.
            self._weight = weight.float() if experts is None else weight[chosen].float()
        self._num_bits, self._group_size, self._per_expert = num_bits, group_size, per_expert
        self._max_bytes = min(max_bytes, _CACHED_BYTES) if weight.device.type == "cpu" else max_bytes
        self._experts, self._rotation = chosen, rotation
        self._shared = None if per_expert else torch.empty_like(self._x)
        self.num_rows = self._weight.shape[1]
        self._bytes_each = 4 * (2 * self.num_rows * columns + 3 * width * self.num_rows + 2 * width * columns)
        keep = 4 * len(chosen) * width * self.num_rows <= max_bytes
        self._reference = torch.cat([self._outputs(part) for part in self._chunks()]) if keep else None

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
        shared = self._quantize_shared(scale)
        for part in self._chunks():
            s = scale[part].unsqueeze(1) if self._per_expert else scale
            weight = fake_quantize_rows_(self._turned(self._weight[part] * s), self._num_bits, self._group_size)
            rows = self._rows[part]
            if shared is None:
                inputs = self._turned(self._x[rows].div_(s))
                fake_quantize_per_token(inputs, out=inputs)
            else:
                inputs = shared[rows]
            yield OutputErrors(part, (inputs @ weight.mT).sub_(self._target(part)), self._token_weight[part])

    def _quantize_shared(self, scale: torch.Tensor) -> torch.Tensor | None:
        """All inputs at a scale that all experts share; overwritten by the next call."""
        if self._shared is None:
            return None
        for x, out in zip(*(tensor.split(max(1, self._max_bytes // (8 * tensor.shape[-1]))) for tensor in (self._x, self._shared)),
                          strict=True):
            fake_quantize_per_token(self._turned(torch.div(x, scale, out=out)), out=out)
        return self._shared

    def _turned(self, values: torch.Tensor) -> torch.Tensor:
        return values if self._rotation is None else self._rotation.apply(values)

    def _chunks(self) -> Iterator[slice]:
        return chunked(len(self._experts), self._bytes_each, self._max_bytes)

    def _outputs(self, part: slice) -> torch.Tensor:
        return self._x[self._rows[part]] @ self._weight[part].mT

    def _target(self, part: slice) -> torch.Tensor:
        return self._outputs(part) if self._reference is None else self._reference[part]


def sampled_rows(shape: Sequence[int], affordable: int, device: str = "cpu") -> torch.Tensor | None:
    """`affordable` of each expert's rows, but at least :data:`FEWEST_ROWS`, int64 [E, R], sorted; None where those are all of them.

    What is drawn depends on the shape and R alone: an expert has the same rows whatever other experts are evaluated, and whatever the
    scale is.

    Args:
        shape: (E, N).
    """
    experts, rows = shape
    count = max(FEWEST_ROWS, affordable)
    if count >= rows:
        return None
    generator = torch.Generator().manual_seed(rows)
    drawn = torch.rand(experts, rows, generator=generator, device="cpu").argsort(dim=1, stable=True)[:, :count]
    return drawn.sort(1).values.to(device)
