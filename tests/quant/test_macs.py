"""Sample selection."""

import itertools

import pytest
import torch

from ecmfq_export.errors import UserError
from ecmfq_export.quant.macs import PoolScores, SelectionObjective, lazy_greedy, random_indices, ranks, select, top_up


def pool(size: int = 40, seed: int = 0, layers: int = 2, experts: int = 8) -> PoolScores:
    g = torch.Generator().manual_seed(seed)
    mass = torch.rand(size, layers, experts, 2, generator=g).pow(6) * 20
    return PoolScores(mass, (mass.sum(-1) * 2).long(), torch.rand(size, generator=g), torch.randn(size, 16, generator=g))


def plain_greedy(objective: SelectionObjective, count: int) -> list[int]:
    state, picked = objective.empty_state(), []
    while len(picked) < count:
        value = objective.state_value(state)
        left = [i for i in range(objective.size) if i not in picked]
        gains = [(value - objective.state_value(objective.extend(state, i)), i) for i in left]
        picked.append(min(gains)[1])
        state = objective.extend(state, picked[-1])
    return picked


@pytest.mark.parametrize("seed", range(5))
def test_lazy_greedy_equals_plain_greedy(seed):
    objective = SelectionObjective(pool(seed=seed), 10, seed)
    assert lazy_greedy(objective, 10) == plain_greedy(objective, 10)


@pytest.mark.parametrize("seed", range(5))
def test_objective_is_monotone_and_submodular(seed):
    objective = SelectionObjective(pool(seed=seed), 10, 0)
    order = random_indices(40, 12, seed)
    small, large, new = order[:4], order[:10], order[11]
    value = objective.value
    assert value(large) >= value(small)
    assert value(small + [new]) - value(small) >= value(large + [new]) - value(large) - 1e-12
    assert value(large + [new]) >= value(large) - 1e-12


def test_state_and_definition_agree():
    objective = SelectionObjective(pool(), 10, 0)
    state = objective.empty_state()
    for index in (3, 17, 5):
        state = objective.extend(state, index)
    assert objective.state_value(state) == pytest.approx(objective.value([3, 17, 5]))


def test_greedy_is_within_its_bound_of_the_best_and_beats_random():
    objective = SelectionObjective(pool(size=12), 3, 0)
    best = max(objective.value(list(s)) for s in itertools.combinations(range(12), 3))
    ours = objective.value(lazy_greedy(objective, 3))
    assert ours >= (1 - 1 / 2.718281828) * best
    assert ours >= sum(objective.value(random_indices(12, 3, seed)) for seed in range(20)) / 20


def test_rare_experts_are_covered():
    scores = pool(size=60)
    scores.mass[:, :, 5] = 0.0
    scores.tokens[:, :, 5] = 0
    scores.mass[33, :, 5] = 10.0
    scores.tokens[33, :, 5] = 40
    chosen = select(scores, 6, top_k=2, seed=0)
    assert 33 in chosen.indices
    assert chosen.report["selected_objective"] > chosen.report["random_objective"]
    assert chosen.report["selected_coverage"] >= chosen.report["random_coverage"]


def test_top_up_fills_the_deficit_and_stops():
    tokens = torch.zeros(5, 1, 4, dtype=torch.int64)
    tokens[:, 0, :3] = 10
    tokens[4, 0, 3] = 3
    assert top_up(tokens, [0, 1], need=1.0, limit=5) == [4]
    tokens[4, 0, 3] = 0
    assert top_up(tokens, [0, 1], need=1.0, limit=5) == []


def test_small_pool_is_taken_whole_and_random_is_seeded():
    assert sorted(select(pool(size=5), 128, 2, 0).indices) == [0, 1, 2, 3, 4]
    assert select(pool(), 8, 2, 3, "random").indices == random_indices(40, 8, 3)
    assert select(pool(), 8, 2, 3).indices == select(pool(), 8, 2, 3).indices


def test_text_only_pool():
    scores = pool()
    scores.mass[..., 1] = 0.0
    scores.attention.zero_()
    assert len(select(scores, 8, 2, 0).indices) == 8


def test_ranks_share_ties():
    assert ranks(torch.tensor([5.0, 1.0, 5.0, 9.0])).tolist() == pytest.approx([0.5, 0.0, 0.5, 1.0])


def test_refuses_an_empty_pool_and_nan():
    with pytest.raises(UserError, match="empty"):
        select(pool(size=0), 4, 2, 0)
    scores = pool()
    scores.features[0, 0] = float("nan")
    with pytest.raises(UserError, match="features"):
        select(scores, 4, 2, 0)
