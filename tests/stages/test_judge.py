"""Which positions the held-out KL is taken at."""

from types import SimpleNamespace

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from ecmfq_export.runtime.sample import ProcessedSample
from ecmfq_export.stages import judge


def batch_of(types: list[list[int]], index: int = 0, first: int = 0) -> SimpleNamespace:
    return SimpleNamespace(index=index, samples=list(range(first, first + len(types))), types=torch.tensor(types))


def sample(length: int, answer: int) -> ProcessedSample:
    mask = np.zeros(length, bool)
    mask[length - answer :] = answer > 0
    return ProcessedSample(np.arange(length), None, None, mask)


def test_positions_before_answer_tokens_or_before_text_tokens():
    found = judge._judged_positions([sample(5, 2), sample(4, 0)], [batch_of([[0, 1, 1, 0, 0], [0, 1, 1, 0, 0]])])[0]
    assert found.tolist() == [[False, False, True, True, False], [False, False, True, False, False]]


def test_a_choice_must_be_clearly_better_than_the_default():
    generator = torch.Generator().manual_seed(0)
    base = torch.rand(200, generator=generator, dtype=torch.float64)
    noise = torch.randn(200, generator=generator, dtype=torch.float64)
    noise -= noise.mean()
    assert judge.clearly_best({"none": base}) == "none"
    assert judge.clearly_best({"none": base, "rho": base - 0.01 + 0.5 * noise}) == "none"  # a gain inside its noise
    assert judge.clearly_best({"none": base, "rho": base - 0.1 + 0.1 * noise, "g": base - 0.2 + 0.1 * noise}) == "g"
    assert judge.clearly_best({"none": base, "rho": base - 0.1 + 0.1 * noise, "g": base - 0.2 + 9 * noise}) == "rho"
    assert judge.clearly_best({"none": base[:1], "rho": base[:1] - 1}) == "none"  # one position has no standard error
    assert judge.clearly_best({"none": base, "rho": base + 0.1}) == "none"


def test_many_positions_are_thinned_evenly_over_batches(monkeypatch):
    monkeypatch.setattr(judge, "MAX_POSITIONS", 10)
    samples = [sample(20, 19) for _ in range(4)]
    batches = [batch_of([[0] * 20] * 2, 0), batch_of([[0] * 20] * 2, 1, first=2)]
    found = judge._judged_positions(samples, batches)
    counts = [int(mask.sum()) for mask in found.values()]
    assert 5 <= sum(counts) <= 10 and abs(counts[0] - counts[1]) <= 1


def test_up_to_so_many_layers_all_are_judged_beyond_it_the_first_of_each_run():
    assert judge.judged_layers(1, 8) == [0]
    assert judge.judged_layers(8, 8) == list(range(8))
    assert judge.judged_layers(9, 8) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert judge.judged_layers(48, 8) == [0, 6, 12, 18, 24, 30, 36, 42]
    assert judge.judged_layers(5, 2) == [0, 2]


@given(layers=st.integers(1, 200), most=st.integers(1, 20))
def test_judgements_read_a_number_of_layers_that_is_linear_in_the_depth(layers, most):
    judged = judge.judged_layers(layers, most)
    assert judged[0] == 0 and judged == sorted(set(judged)) and len(judged) == min(layers, most)
    runs = [after - before for before, after in zip(judged, [*judged[1:], layers], strict=True)]
    assert max(runs) - min(runs) <= 1
    assert sum(layers - 1 - index for index in judged) <= (most + 1) * layers / 2
