"""The host's kernels, every instruction set that this CPU runs, against PyTorch's operators on sizes that are no multiple of anything."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ecmfq_export import compiled_library
from ecmfq_export.errors import BuildError
from ecmfq_export.quant import host_kernels as module
from ecmfq_export.quant.host_kernels import MAX_WIDTH, HostKernels, find_host_library, host_kernels
from ecmfq_export.quant.rtn import CLIP_RATIOS, _search

RATIOS = torch.tensor(CLIP_RATIOS)


def _kernels() -> list[HostKernels]:
    found = []
    for isa in ("avx512", "avx2", "base"):
        try:
            found.append(HostKernels(isa))
        except BuildError:
            assert isa != "base"
    return found


KERNELS = _kernels()
every = pytest.mark.parametrize("kernels", KERNELS, ids=[k.isa for k in KERNELS])


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_best_set_is_taken():
    assert host_kernels().isa == KERNELS[0].isa and KERNELS[-1].isa == "base"


@every
@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 70), columns=st.integers(1, 150), groups=st.integers(1, 3), weighted=st.booleans(),
       limit=st.sampled_from([1, 7, 127]), size=st.floats(1e-12, 1e3), seed=st.integers(0, 99))
def test_search_finds_the_steps_that_operators_find(kernels, rows, columns, groups, weighted, limit, size, seed):
    weight, cost = size * noise(rows, groups * columns, seed=seed), noise(groups * columns, seed=seed + 1).abs() if weighted else None
    weight[0] = 0.0
    steps = torch.empty(rows, groups)
    kernels.search_steps(weight, groups, cost, RATIOS, limit, steps)
    block = weight.view(1, rows, groups, columns)
    costs = None if cost is None else cost.view(1, 1, groups, columns)
    expected = _search(block, block.abs().amax(-1), limit, costs)[0]

    def error(step: torch.Tensor) -> torch.Tensor:
        safe = torch.where(step > 0, step, 1.0).unsqueeze(-1).double()
        missed = block[0] - (block[0] / safe).round().clamp(-limit, limit) * safe
        return (missed.square() * (1.0 if costs is None else costs[0])).sum(-1)

    # Sums have another order, so near ties may go either way; nothing else may.
    assert torch.allclose(error(steps), error(expected), rtol=1e-4)
    assert bool((steps[0] == 0).all()) and torch.equal(steps.half().float(), steps)


@every
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 31, 36])
def test_search_passes_on_what_is_not_finite(kernels, value, place):
    weight, steps = noise(3, 37), torch.empty(3, 1)
    weight[1, place] = value
    kernels.search_steps(weight, 1, None, RATIOS, 7, steps)
    assert torch.isfinite(steps[:, 0]).tolist() == [True, False, True]


@every
@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 150), columns=st.integers(1, 150), seed=st.integers(0, 99))
def test_layouts(kernels, rows, columns, seed):
    weight, scale = noise(rows, columns, seed=seed), noise(rows, seed=seed + 1).abs() + 0.1
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(seed))
    position = torch.argsort(order)
    out = torch.empty(columns, rows)
    kernels.to_columns(weight, position, out)
    assert torch.equal(out, weight.T[order])
    kernels.to_columns(weight, position, out, scale)
    assert torch.equal(out, (weight / scale.unsqueeze(-1)).T[order])
    grid = torch.randint(-128, 128, (columns, rows), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    back = torch.empty(rows, columns, dtype=torch.int8)
    kernels.to_rows(grid, position, back)
    assert torch.equal(back, grid[position].T)


@every
@settings(max_examples=20, deadline=None)
@given(columns=st.integers(1, 90), block=st.integers(1, 90), blended=st.booleans(), seed=st.integers(0, 99))
def test_blend_in_order(kernels, columns, block, blended, seed):
    own, shared = noise(columns, columns, seed=seed), noise(columns, columns, seed=seed + 1) if blended else None
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(seed))
    out = torch.full((columns, columns), 77.0)
    kernels.blend_in_order(own, shared, 0.75, 0.5, order, block, out)
    expected = (0.75 * own + (0.0 if shared is None else 0.5 * shared))[order][:, order]
    read = torch.arange(columns) >= torch.arange(columns).unsqueeze(1) // block * block
    assert torch.allclose(out[read], expected[read], atol=1e-6) and bool((out[~read] == 77.0).all())


@every
@settings(max_examples=20, deadline=None)
@given(width=st.integers(1, 130), more=st.integers(0, 140), seed=st.integers(0, 99))
def test_factor(kernels, width, more, seed):
    columns = width + more
    x = noise(2 * columns + 1, columns, seed=seed)
    matrix = x.T @ x + torch.eye(columns)
    wide = torch.cat((matrix, noise(columns, 3)), 1)  # rows that lie apart
    panel = wide[:width, :columns]
    assert kernels.factor(panel)
    expected = torch.linalg.cholesky(matrix.double(), upper=True)[:width]
    assert torch.allclose(panel.double(), expected, atol=1e-4 * float(expected.abs().max()))
    assert bool((panel.tril(-1) == 0).all()) and torch.equal(wide[:, columns:], noise(columns, 3))


@every
@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 77])
def test_factor_says_where_there_is_none(kernels, bad, place):
    matrix = 2 * torch.eye(100)
    matrix[place, place] = bad
    assert not kernels.factor(matrix)


@every
@settings(max_examples=25, deadline=None)
@given(width=st.integers(1, 140), rows=st.integers(1, 150), groups=st.integers(0, 3), limit=st.sampled_from([1, 7, 127]),
       first=st.booleans(), seed=st.integers(0, 99))
def test_walk(kernels, width, rows, groups, limit, first, seed):
    x = noise(2 * width, width, seed=seed)
    upper = torch.linalg.cholesky(x.T @ x / width + 0.1 * torch.eye(width)).T.contiguous()
    target = 3 * noise(width, rows, seed=seed + 1)
    product = None if first else noise(width, rows, seed=seed + 2)
    steps = noise(groups, rows, seed=seed + 3).abs() + 0.1 if groups else None
    group = torch.randint(0, groups, (width,), generator=torch.Generator().manual_seed(seed)) if groups else None
    missing, grid, error = target.clone(), torch.empty(width, rows, dtype=torch.int8), torch.ones(rows)
    kernels.walk(upper, product, missing, limit, grid, error, steps, group)
    unit = torch.ones(width, rows) if steps is None else steps[group]
    assert int(grid.abs().max()) <= limit
    assert torch.allclose(missing, target - grid * unit, atol=1e-5)
    # Each column was rounded to the point nearest to what the columns behind it leave, which is recomputed from their result.
    left = missing.double()
    total = (torch.zeros_like(left) if product is None else product.double()) + upper.double().triu(1) @ left
    value = target.double() + total / upper.diagonal().double().unsqueeze(-1)
    wanted = (value / unit).clamp(-limit, limit)
    assert float((wanted - grid).abs().max()) <= 0.5 + 1e-3
    expected = 1.0 + ((value - grid * unit).square() * upper.diagonal().double().square().unsqueeze(-1)).sum(0)
    assert torch.allclose(error.double(), expected, rtol=1e-3)


@every
@pytest.mark.parametrize("groups", [0, 2])
def test_missed_by_nearest(kernels, groups):
    target = 4 * noise(5, 37)
    steps, group = (noise(2, 37, seed=1).abs() + 0.1, torch.tensor([0, 1, 1, 0, 1])) if groups else (None, None)
    unit = torch.ones(5, 37) if steps is None else steps[group]
    out = torch.empty_like(target)
    kernels.missed_by_nearest(target, 7, out, steps, group)
    assert torch.allclose(out, target - (target / unit).round().clamp(-7, 7) * unit, atol=1e-6)


@every
def test_halves_round_to_even(kernels):
    target = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 6.5, 7.5, 100.0, -100.0]])
    out = torch.empty_like(target)
    kernels.missed_by_nearest(target, 7, out)
    assert (target - out).tolist() == [[0.0, 2.0, 2.0, 0.0, -2.0, 6.0, 7.0, 7.0, -7.0]]


def test_what_kernels_cannot_take_is_refused():
    kernels = host_kernels()
    with pytest.raises(ValueError, match="strides"):
        kernels.to_columns(noise(4, 6).T, torch.arange(4), torch.empty(4, 6))
    with pytest.raises(ValueError, match="strides"):
        kernels.factor(noise(6, 4).T)
    wide = torch.zeros(MAX_WIDTH + 1, MAX_WIDTH + 1)
    with pytest.raises(ValueError, match=f"at most {MAX_WIDTH}"):
        kernels.factor(wide)
    with pytest.raises(ValueError, match=f"at most {MAX_WIDTH}"):
        kernels.walk(wide, None, wide, 7, wide.to(torch.int8), wide[0])
    with pytest.raises(BuildError, match="no kernels for 'sse9'"):
        HostKernels("sse9")


def test_a_missing_or_foreign_library_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "ecmfq_export").mkdir()
    monkeypatch.setattr(compiled_library.ecmfq_export, "__path__", [str(tmp_path / "ecmfq_export")])
    monkeypatch.setattr(compiled_library.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(BuildError, match=r"libecmfq_host.so is neither in") as error:
        find_host_library()
    assert "pip install" in str(error.value.fix)
    folder = tmp_path / "ecmfq_export" / "_lib"
    folder.mkdir()
    (folder / module.LIBRARY_NAME).write_bytes(b"no library")
    with pytest.raises(BuildError, match="cannot be loaded"):
        HostKernels()
