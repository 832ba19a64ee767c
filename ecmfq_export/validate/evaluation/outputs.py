"""From a model's states to what is measured: distributions over the vocabulary, and how likely the right tokens are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch.nn import functional as F

from ecmfq_export.errors import UserError
from ecmfq_export.models.moe_vlm import MoEVLM
from ecmfq_export.models.torch_decoder import final_norm
from ecmfq_export.models.torch_math import quantized_linear

TOP = 20
"""Likeliest tokens of a position whose log-probabilities are kept in a result's file."""
_BLOCK_BYTES = 1 << 26
_SLICE_ROWS = 16_384


class Distributions(Protocol):
    """Logits over the vocabulary at P positions."""

    @property
    def shape(self) -> tuple[int, int]:
        """(P, vocab)."""
        ...

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Logits of positions `start` to `stop`, float32 [stop - start, vocab]."""
        ...


class ProjectedStates:
    """Logits as a model's output projection gives them from states, a few rows at a time.

    Only states are held, which are smaller than logits by vocab / hidden; the projection is read when first needed.

    Args:
        model: whose projection.
        states: float32 [P, hidden], before the final norm.
    """

    def __init__(self, model: MoEVLM, states: torch.Tensor) -> None:
        self._model, self._states = model, final_norm(model, states)
        self._weight: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return len(self._states), self._model.spec.vocab_size

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Logits [stop - start, vocab] float32."""
        name = self._model.spec.output_projection
        states = self._states[start:stop]
        if self._model.recipe(name) != "float":
            return quantized_linear(states, self._model.qtensor(name))
        if self._weight is None:
            self._weight = self._model.tensor(name)
        parts = self._weight.split(_SLICE_ROWS)  # widened a slice at a time, so that no float32 copy of the matrix is made
        return torch.cat([F.linear(states, part.float()) for part in parts], dim=-1)

    def release(self) -> None:
        """Drop the projection's matrix; it is read again when needed."""
        self._weight = None


class ModelOutputs(Protocol):
    """What a model gave for requests; `start` to `stop` are requests of one kind, see ``requests.Request``."""

    def distributions(self, start: int, stop: int) -> Distributions:
        """At the positions of requests of kind ``logits``, in order."""
        ...

    def states(self, start: int, stop: int) -> np.ndarray:
        """float32 [stop - start, hidden] of requests of kind ``state``."""
        ...

    def log_odds(self, start: int, stop: int) -> np.ndarray:
        """float64 [stop - start], log p(first) - log p(second) of requests of kind ``log_odds``."""
        ...


class StateOutputs:
    """Outputs of a model whose states are at hand.

    Args:
        model: whose output projection.
        states: float32 [positions, hidden], before the final norm, of all requests in order.
        starts: int [requests + 1], where each request's positions begin.
        pair: the two tokens of ``log_odds``; None where it is not asked.
    """

    def __init__(self, model: MoEVLM, states: torch.Tensor, starts: np.ndarray, pair: tuple[int, int] | None) -> None:
        self._model, self._states, self._starts, self._pair = model, states, starts, pair

    def distributions(self, start: int, stop: int) -> ProjectedStates:
        return ProjectedStates(self._model, self._part(start, stop))

    def states(self, start: int, stop: int) -> np.ndarray:
        return self._part(start, stop).numpy()

    @torch.no_grad()
    def log_odds(self, start: int, stop: int) -> np.ndarray:
        # The normalization of the softmax cancels, so two columns of the vocabulary are enough.
        if self._pair is None:
            raise ValueError("no pair of tokens was given")
        name = self._model.spec.output_projection
        states = final_norm(self._model, self._part(start, stop))
        if self._model.recipe(name) == "float":
            logits = F.linear(states, torch.cat([self._model.tensor_rows(name, i, i + 1) for i in self._pair]).float())
        else:
            logits = torch.cat([quantized_linear(states, self._model.qtensor(name, i, i + 1)) for i in self._pair], dim=-1)
        return (logits[:, 0].double() - logits[:, 1].double()).numpy()

    def _part(self, start: int, stop: int) -> torch.Tensor:
        return self._states[self._starts[start] : self._starts[stop]]


@dataclass(frozen=True)
class TokenScores:
    """What a model says at P positions whose next token is known.

    Attributes:
        nll: float64 [P], -log p of the next token, in nats.
        choice: int64 [P], the likeliest token.
        margin: float64 [P], by how many nats it leads the second.
        top_ids: int32 [P, TOP], the likeliest tokens, likeliest first; top_log_probs: float32 [P, TOP].
        kl: float64 [P], KL(reference || this), in nats; None without a reference.
    """

    nll: np.ndarray
    choice: np.ndarray
    margin: np.ndarray
    top_ids: np.ndarray
    top_log_probs: np.ndarray
    kl: np.ndarray | None = None
    kl_top: np.ndarray | None = None


@torch.no_grad()
def token_scores(
    distributions: Distributions, targets: np.ndarray, reference: Distributions | None = None, reference_top: TopTokens | None = None
) -> TokenScores:
    """Score the known next tokens `targets` int64 [P].

    Args:
        reference: another model's distributions at the same positions.
        reference_top: or the likeliest tokens of another model, see :class:`TopTokens`.

    Raises:
        UserError: NaN or infinite logits, or a reference over another vocabulary.
    """
    positions, vocab = distributions.shape
    if reference is not None and reference.shape != distributions.shape:
        raise UserError(f"the reference has {reference.shape} positions and tokens, this model {distributions.shape}",
                        "compare models with one vocabulary on one set of data")
    parts: list[list[np.ndarray]] = []
    wanted = torch.from_numpy(np.asarray(targets, np.int64))
    for start, stop in _blocks(positions, vocab):
        logits = distributions.rows(start, stop)
        if not bool(torch.isfinite(logits).all()):
            raise UserError(f"{int((~torch.isfinite(logits)).sum())} logits are NaN or infinite",
                            "an activation overflowed its type (float16 ends at 65504), or a weight file is damaged")
        log_probs = logits.double().log_softmax(-1)
        top = log_probs.topk(min(TOP, vocab), dim=-1)
        margin = top.values[:, 0] - top.values[:, 1] if vocab > 1 else torch.full((len(logits),), torch.inf)
        row = [-log_probs.gather(1, wanted[start:stop, None])[:, 0], top.indices[:, 0], margin, top.indices.int(), top.values.float()]
        if reference is not None:
            expected = reference.rows(start, stop).double().log_softmax(-1)
            row.append((expected.exp() * (expected - log_probs)).sum(-1).clamp_min(0.0))
        if reference_top is not None:
            row.append(_coarse_kl(reference_top, start, stop, log_probs))
        parts.append([part.numpy() for part in row])
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    extra = columns[5:]
    kl = extra.pop(0) if reference is not None else None
    return TokenScores(*columns[:5], kl, extra[0] if extra else None)


@dataclass(frozen=True)
class TopTokens:
    """The likeliest tokens of P positions, as a result's file keeps them: ids int [P, K], log_probs float [P, K]."""

    ids: np.ndarray
    log_probs: np.ndarray


def _coarse_kl(reference: TopTokens, start: int, stop: int, log_probs: torch.Tensor) -> torch.Tensor:
    """KL over the reference's K tokens and all others as one class: by the data-processing inequality at most the full KL."""
    expected = torch.from_numpy(reference.log_probs[start:stop].astype(np.float64))
    found = log_probs.gather(1, torch.from_numpy(reference.ids[start:stop].astype(np.int64)))
    rest = (1.0 - expected.exp().sum(-1)).clamp_min(0.0)
    other = (1.0 - found.exp().sum(-1)).clamp_min(1e-300)
    tail = torch.where(rest > 0, rest * (rest.clamp_min(1e-300).log() - other.log()), 0.0)
    return ((expected.exp() * (expected - found)).sum(-1) + tail).clamp_min(0.0)


def _blocks(positions: int, vocab: int) -> Iterator[tuple[int, int]]:
    step = max(1, _BLOCK_BYTES // (8 * vocab))
    for start in range(0, positions, step):
        yield start, min(start + step, positions)
