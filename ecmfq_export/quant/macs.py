"""MACS: which samples of a pool to calibrate on.

``F(S) = l1 sum_lem I_lem log(1 + Z_lem(S) / c_lm) + l2 mean A_n + l3 mean_pool max_{s in S} sim+(h_n, h_s)``, each term divided
by its value for random selections of the same size: expert coverage by modality, cross-modal affinity, and diversity. F is
monotone and submodular, so the lazy greedy selection is within 1 - 1/e of the best one.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import torch

from ecmfq_export.errors import UserError
from ecmfq_export.quant.moequant import balanced_samples

TERM_WEIGHTS = (1.0, 0.3, 0.5)
RANDOM_SEEDS = 5
TOP_UP_SHARE = 0.25
"""Samples that topping up may choose, as a share of K."""


@dataclass(frozen=True)
class PoolScores:
    """What one pass of the floating-point model over the pool measured, for N samples.

    Attributes:
        mass: float [N, L, E, 2], router score over the top 2k experts, summed over the sample's text and vision tokens.
        tokens: int64 [N, L, E], tokens routed to each expert.
        attention: float [N], share of text rows' attention that goes to vision, averaged over layers.
        features: float [N, 256], projected log channel quantiles.
        loss: float [N], sum of the negative log likelihoods of the sample's text tokens; None where it was not asked for.
        predicted: int64 [N], how many text tokens that is.
    """

    mass: torch.Tensor
    tokens: torch.Tensor
    attention: torch.Tensor
    features: torch.Tensor
    loss: torch.Tensor | None = None
    predicted: torch.Tensor | None = None


@dataclass(frozen=True)
class Selection:
    """Chosen samples in the order of choice, the ones that topping up added last.

    Attributes:
        indices: into the pool.
        topped_up: how many of them were added for experts with few tokens.
        report: figures against random selections of the same size (mean over five seeds).
    """

    indices: list[int]
    topped_up: int
    report: dict[str, float]


State = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""A selection as its gathered mass, summed affinity, and best similarity to every pool sample."""


class SelectionObjective:
    """F over a pool, for selections of `count` samples.

    Args:
        scores: the pool's.
        count: K, which normalizes the affinity term and the concavity of the coverage term.
        seed: of the random selections that normalize the terms.
    """

    def __init__(self, scores: PoolScores, count: int, seed: int) -> None:
        size = len(scores.mass)
        self.size, self.count = size, count
        mass = scores.mass.double()
        # c: what a random selection gathers in an average cell of this layer and modality, so that modalities weigh the same.
        expected = count * mass.mean((0, 2), keepdim=True)
        self._mass = (mass / expected.clamp_min(1e-30)).flatten(1)
        share = mass.sum(0) / mass.sum((0, 2)).unsqueeze(1).clamp_min(1e-30)
        importance = share.sqrt()
        self._importance = (importance / importance.sum().clamp_min(1e-30)).flatten()
        overlap = scores.mass.double().amin(-1).sum((1, 2))
        self._affinity = 0.5 * ranks(scores.attention) + 0.5 * ranks(overlap)
        centered = scores.features.double() - scores.features.double().mean(0)
        unit = centered / centered.norm(dim=1, keepdim=True).clamp_min(1e-30)
        self._similarity = (unit @ unit.mT).clamp_min(0.0)
        self._norms = torch.ones(3, dtype=torch.float64)
        totals = torch.stack([self.terms(random_indices(size, count, seed + i)) for i in range(RANDOM_SEEDS)])
        mean = totals.mean(0)
        # A term that is zero for every random selection (a text-only pool) stays unscaled.
        self._norms = torch.where(mean > 0, mean, torch.ones_like(mean))
        self._weights = torch.tensor(TERM_WEIGHTS, dtype=torch.float64)

    def terms(self, indices: list[int]) -> torch.Tensor:
        """The three normalized terms of a selection, float64 [3]."""
        chosen = torch.tensor(indices, dtype=torch.int64)
        if not indices:
            return torch.zeros(3, dtype=torch.float64)
        return self._combine(self._mass[chosen].sum(0), self._affinity[chosen].sum(), self._similarity[:, chosen].amax(1))

    def value(self, indices: list[int]) -> float:
        """F of a selection."""
        return float((self.terms(indices) * self._weights).sum())

    def empty_state(self) -> State:
        """State of the empty selection."""
        nothing = torch.zeros(self.size, dtype=torch.float64)
        return torch.zeros_like(self._mass[0]), torch.zeros((), dtype=torch.float64), nothing

    def extend(self, state: State, index: int) -> State:
        """State after adding one sample."""
        mass, affinity, best = state
        return mass + self._mass[index], affinity + self._affinity[index], torch.maximum(best, self._similarity[:, index])

    def state_value(self, state: State) -> float:
        """F of a state."""
        return float((self._combine(*state) * self._weights).sum())

    def _combine(self, mass: torch.Tensor, affinity: torch.Tensor, best: torch.Tensor) -> torch.Tensor:
        coverage = (self._importance * torch.log1p(mass)).sum()
        return torch.stack((coverage, affinity / self.count, best.mean())) / self._norms


def ranks(values: torch.Tensor) -> torch.Tensor:
    """Ranks scaled to [0, 1], equal values sharing their mean rank; float64."""
    if len(values) < 2:
        return torch.zeros(len(values), dtype=torch.float64)
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    below = counts.cumsum(0) - counts
    return ((below + (counts - 1) / 2.0)[inverse] / (len(values) - 1)).double()


def random_indices(size: int, count: int, seed: int) -> list[int]:
    """`count` of `size` samples, drawn without replacement."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:count].tolist()


def lazy_greedy(objective: SelectionObjective, count: int) -> list[int]:
    """Pick `count` samples by largest gain, ties to the smaller index.

    A gain can only shrink as the selection grows, so a sample whose refreshed gain still leads the others' old gains is the
    best one without looking at the others.
    """
    state = objective.empty_state()
    value = objective.state_value(state)
    heap = [(value - objective.state_value(objective.extend(state, i)), i, 0) for i in range(objective.size)]
    heapq.heapify(heap)
    picked: list[int] = []
    while len(picked) < min(count, objective.size):
        negative_gain, index, seen = heapq.heappop(heap)
        if seen == len(picked):
            picked.append(index)
            state = objective.extend(state, index)
            value = objective.state_value(state)
        else:
            heapq.heappush(heap, (value - objective.state_value(objective.extend(state, index)), index, len(picked)))
    return picked


def top_up(tokens: torch.Tensor, picked: list[int], need: float | torch.Tensor, limit: int) -> list[int]:
    """Samples to add for experts that got fewer than `need` tokens, at most `limit`.

    Each one is the sample that fills most of the remaining deficit; stops when nothing in the pool helps.

    Args:
        tokens: int64 [N, L, E].
        need: one number, or float [L, 1] by layer.
    """
    have = tokens[picked].sum(0).double()
    available = torch.ones(len(tokens), dtype=torch.bool)
    available[picked] = False
    added: list[int] = []
    counts = tokens.double()
    while len(added) < limit:
        deficit = (need - have).clamp_min(0.0)
        gain = torch.minimum(counts, deficit).sum((1, 2)).masked_fill(~available, -1.0)
        best = int(gain.argmax())
        if float(gain[best]) <= 0.0:
            break
        added.append(best)
        available[best] = False
        have += counts[best]
    return added


def select(scores: PoolScores, count: int, top_k: int, seed: int, method: str = "macs") -> Selection:
    """Choose `count` samples (all of a smaller pool).

    ``macs`` picks greedily and leaves up to a quarter of the budget to samples for experts with fewer than ``2 k count / E``
    tokens; ``topped_up`` (EAQuant) does so with random samples and twice the layer's average; ``balanced`` is MoEQuant's choice
    (:func:`ecmfq_export.quant.moequant.balanced_samples`); ``random`` draws them.

    Raises:
        UserError: an empty pool, or NaN or infinity in the scores.
    """
    size = len(scores.mass)
    if size == 0:
        raise UserError("the calibration pool is empty", "give at least two samples")
    for name in ("mass", "attention", "features"):
        if not bool(torch.isfinite(getattr(scores, name)).all()):
            raise UserError(f"MACS scores ({name}) hold NaN or infinity",
                            "check that the floating-point model is finite on the pool")
    count = min(count, size)
    objective = SelectionObjective(scores, count, seed)
    chosen, added = _choose(objective, scores, count, top_k, seed, method)
    report = {f"selected_{key}": value for key, value in usage(scores, chosen, top_k).items()}
    report["selected_objective"] = objective.value(chosen)
    drawn = [random_indices(size, len(chosen), seed + 1000 + i) for i in range(RANDOM_SEEDS)]
    figures = [usage(scores, indices, top_k) for indices in drawn]
    report |= {f"random_{key}": sum(f[key] for f in figures) / len(figures) for key in figures[0]}
    report["random_objective"] = sum(objective.value(indices) for indices in drawn) / len(drawn)
    return Selection(chosen, added, report)


def _choose(
    objective: SelectionObjective, scores: PoolScores, count: int, top_k: int, seed: int, method: str
) -> tuple[list[int], int]:
    """The chosen samples, and how many of them were added for experts with few tokens; `count` in all."""
    if method == "random":
        return random_indices(objective.size, count, seed), 0
    if method == "balanced":
        if scores.loss is None or scores.predicted is None:
            raise ValueError("balanced selection needs the pool's losses")
        return balanced_samples(scores.tokens, scores.loss, scores.predicted, count), 0
    ranked = lazy_greedy(objective, count) if method == "macs" else random_indices(objective.size, count, seed)
    kept = ranked[: count - round(TOP_UP_SHARE * count)]
    need: float | torch.Tensor = 2.0 * top_k * count / scores.tokens.shape[-1]
    if method == "topped_up":
        need = 2.0 * scores.tokens[ranked].double().sum(0).mean(-1, keepdim=True)
    added = top_up(scores.tokens, kept, need, count - len(kept))
    # What the experts do not need goes to the next best samples.
    rest = [index for index in ranked[len(kept) :] if index not in added][: count - len(kept) - len(added)]
    return kept + rest + added, len(added)


def usage(scores: PoolScores, indices: list[int], top_k: int) -> dict[str, float]:
    """Expert usage of a selection: standard deviation of an expert's share of tokens (times E, mean over layers), tokens of
    the emptiest expert, share of experts that reach the top-up level, least score mass an expert gets in either modality."""
    tokens = scores.tokens[indices].sum(0).double()
    share = tokens / tokens.sum(1, keepdim=True).clamp_min(1.0) * tokens.shape[1]
    need = 2.0 * top_k * len(indices) / tokens.shape[1]
    return {
        "usage_std": float(share.std(1, correction=0).mean()),
        "fewest_tokens": float(tokens.min()),
        "coverage": float((tokens >= need).double().mean()),
        "least_modality_mass": float(scores.mass[indices].double().sum(0).min()),
    }
