"""Chunks of experts against the memory that they may take."""

import pytest
import torch

from ecmfq_export.config import QuantConfig
from ecmfq_export.errors import UserError
from ecmfq_export.quant.expert_memory import plan_experts
from ecmfq_export.quant.expert_threads import for_slices
from ecmfq_export.quant.gptq import gptq_bytes

DEFAULT = int(QuantConfig().expert_memory_gb * 1e9)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("limit", [DEFAULT, 2 * 10**9, 10**9, 3 * 10**8])
@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(1536, 2048), (2048, 768)])
def test_a_layer_of_128_experts_stays_within_its_limit(two_threads, rows, columns, cross, limit):
    plan = plan_experts(128, rows, columns, cross=cross, shared=columns == 2048, own_target=columns == 768, limit=limit)
    assert 1 <= plan.chunk <= 128 and plan.total_bytes <= limit
    hessians = plan.chunk * 4 * columns**2 * (1 + cross + (columns == 768))
    assert hessians + plan.working_bytes < plan.total_bytes
    assert plan.working_bytes >= gptq_bytes(rows, columns, cross)


def test_more_memory_is_used_and_enough_is_one_chunk(two_threads):
    chunks = [plan_experts(128, 1536, 2048, cross=True, shared=True, own_target=False, limit=limit * 10**9).chunk
              for limit in (1, 2, 4, 8, 64)]
    assert chunks == sorted(chunks) and chunks[0] < chunks[2] < chunks[-1] == 128


def test_one_expert_that_does_not_fit_is_an_error_with_what_it_takes(two_threads):
    with pytest.raises(UserError, match=r"one expert of 1536 x 2048 takes 0.1\d+ GB .* allows 0.01") as error:
        plan_experts(128, 1536, 2048, cross=False, shared=True, own_target=False, limit=10**7)
    enough = float(str(error.value.fix).split("=")[1].split()[0])
    assert plan_experts(128, 1536, 2048, cross=False, shared=True, own_target=False, limit=int(enough * 1e9)).chunk == 1


def test_slices_cover_everything_in_order_and_errors_come_out(two_threads):
    seen = for_slices(7, 2, lambda part, _: (list(range(part.start, part.stop)), torch.get_num_threads()))
    assert [i for part, _ in seen for i in part] == list(range(7)) and {threads for _, threads in seen} == {1}
    assert torch.get_num_threads() == 2

    def fail(part, _):
        raise UserError(f"no {part.start}")

    with pytest.raises(UserError, match="no 0"):
        for_slices(4, 1, fail)
    assert for_slices(3, 1, lambda part, _: torch.get_num_threads(), "operators") == [2, 2, 2]
