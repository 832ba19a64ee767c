"""Weighted Hessians and batched GPTQ."""

import pytest
import torch

from ecmfq_export.errors import UserError
from ecmfq_export.quant import gptq_host
from ecmfq_export.quant.faq import FaqSettings, quantize_faq
from ecmfq_export.quant.gptq import quantize_gptq
from ecmfq_export.quant.grouping import group_by_expert
from ecmfq_export.quant.hessian import Blend, WeightedHessian, shrinkage, weighted_error
from ecmfq_export.quant.qtensor import QTensor
from ecmfq_export.quant.rtn import quantize_at, quantize_rtn

E, N, K, T = 6, 24, 160, 1500


@pytest.fixture
def torch_threads():
    """Sets the number of torch's threads; the old one comes back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def inputs(seed: int = 0, outliers: bool = True) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Correlated x [T, K], experts [T], token weights [T] and W [E, N, K]."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.eye(K) + 0.2 * torch.randn(K, K, generator=g)
    x = torch.randn(T, K, generator=g) @ mix
    if outliers:
        x = x * torch.exp(0.7 * torch.randn(K, generator=g))
    return x, torch.randint(E, (T,), generator=g), torch.rand(T, generator=g), torch.randn(E, N, K, generator=g)


def hessian_of(x, expert, weight, **kwargs) -> WeightedHessian:
    h = WeightedHessian(E, K, cross="reference" in kwargs)
    h.add(x, expert, weight, **kwargs)
    return h


def test_hessian_equals_its_definition_for_uneven_experts():
    x, expert, w, _ = inputs()
    expert = torch.where(torch.arange(T) < 1000, torch.tensor(2), expert)
    expert[expert == 5] = 4  # nobody goes to 5
    token = torch.randperm(T)
    reference = x + 0.1
    h = hessian_of(x, expert, w, token=token, reference=reference)
    onehot = torch.nn.functional.one_hot(expert, E).float() * w[:, None]
    rows, ref = x[token].double(), reference[token].double()
    expected = torch.einsum("pe,pa,pb->eab", onehot.double(), rows, rows)
    cross = torch.einsum("pe,pa,pb->eab", onehot.double(), ref - rows, rows)
    assert torch.allclose(h.matrix.double(), expected, rtol=1e-4, atol=1e-2)
    assert torch.allclose(h.cross.double(), cross, rtol=1e-4, atol=1e-2)
    assert h.count.sum() == T and h.count[5] == 0 and h.n_eff[5] == 0
    assert torch.allclose(h.n_eff[2], w[expert == 2].double().sum() ** 2 / w[expert == 2].double().square().sum())


def test_batches_add_up():
    x, expert, w, _ = inputs()
    whole, parts = hessian_of(x, expert, w), WeightedHessian(E, K)
    for rows in torch.arange(T).split(400):
        parts.add(x[rows], expert[rows], w[rows])
    assert torch.allclose(whole.matrix, parts.matrix, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("group_size", [-1, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_output_error_below_rounding_for_every_expert_and_weight_error_above(bits, group_size):
    g = torch.Generator().manual_seed(3)
    x = torch.randn(T, 256, generator=g) @ (torch.eye(256) + 0.2 * torch.randn(256, 256, generator=g))
    weight, expert = torch.randn(E, N, 256, generator=g), torch.randint(E, (T,), generator=g)
    h = WeightedHessian(E, 256)
    h.add(x, expert, torch.ones(T))
    ours, nearest = quantize_gptq(weight, h.matrix, bits, group_size), quantize_rtn(weight, bits, group_size, clip="mse")
    error = [(weighted_error(q.dequantize() - weight, h.matrix).sum(-1), (q.dequantize() - weight).square().sum((1, 2)))
             for q in (ours, nearest)]
    assert bool((error[0][0] < 0.8 * error[1][0]).all())
    assert bool((error[0][1] > error[1][1]).all())


def test_blocks_and_sub_blocks_equal_the_textbook_loop():
    x, expert, w, weight = inputs()
    h = hessian_of(x, expert, w).matrix
    q = quantize_gptq(weight, h, 4, descending=False, percdamp=0.01)
    e = 3
    matrix = h[e].double() / h[e].diagonal().double().mean()
    matrix += 0.01 * torch.eye(K)
    upper = torch.linalg.cholesky(torch.linalg.inv(matrix), upper=True)
    work, scale = weight[e].double().clone(), q.scale[e].double()
    for j in range(K):
        rounded = (work[:, j] / scale).round().clamp(-7, 7)
        work[:, j + 1 :] -= ((work[:, j] - rounded * scale) / upper[j, j])[:, None] * upper[j, j + 1 :]
        work[:, j] = rounded
    # float32 against float64 may flip a tie here and there, and a flip changes what follows in that row.
    assert float((work == q.qvalue[e]).double().mean()) > 0.97


def test_identity_hessian_is_rounding_to_nearest():
    weight = inputs()[3]
    q, nearest = quantize_gptq(weight, torch.eye(K).expand(E, K, K), 4), quantize_rtn(weight, 4, clip="mse")
    assert torch.equal(q.qvalue, nearest.qvalue) and torch.equal(q.scale, nearest.scale)


def test_weighting_helps_on_the_weighted_metric():
    x, expert, _, weight = inputs()
    g = torch.Generator().manual_seed(9)
    important = torch.rand(T, generator=g) < 0.2
    x[important] = x[important] @ torch.randn(K, K, generator=g) * 0.08  # another distribution
    w = torch.where(important, 30.0, 1.0)
    weighted, plain = hessian_of(x, expert, w), hessian_of(x, expert, torch.ones(T))
    results = [quantize_gptq(weight, h.matrix, 4).dequantize() for h in (weighted, plain)]
    error = [weighted_error(value - weight, weighted.matrix).sum() for value in results]
    assert error[0] < 0.9 * error[1]


@pytest.mark.parametrize(("threads", "group_size"), [(2, -1), (3, 128)])
def test_an_expert_comes_out_the_same_whatever_is_beside_it(threads, group_size, torch_threads):
    """Bit for bit: in any order, few or many at a time, on any number of threads. The sizes are such that a matrix library with
    several threads would share out one product, which it then sums in another order."""
    columns, rows = 1152, 32
    g = torch.Generator().manual_seed(4)
    x, expert = torch.randn(300, columns, generator=g), torch.randint(E, (300,), generator=g)
    w, weight = torch.rand(300, generator=g), torch.randn(E, rows, columns, generator=g)
    reference = x + 0.1 * torch.randn(300, columns, generator=g)
    order = torch.tensor([3, 0, 5, 1, 4, 2])

    def quantized(which: torch.Tensor, max_bytes: int) -> QTensor:
        place = torch.full((E,), -1)
        place[which] = torch.arange(len(which))
        mine = place[expert] >= 0
        h = WeightedHessian(len(which), columns, cross=True)
        h.add(x[mine], place[expert[mine]], w[mine], reference=reference[mine])
        target = x.T @ x
        return quantize_faq(weight[which], h, FaqSettings(4, group_size, max_bytes=max_bytes), target=target)

    torch_threads(1)
    expected = quantized(torch.arange(E), 1 << 30)
    torch_threads(threads)
    for which, max_bytes in ((torch.arange(E), 1 << 30), (torch.arange(E), 1), (order, 1 << 30), (order[:1], 1), (order[2:4], 1 << 30)):
        again = quantized(which, max_bytes)
        assert torch.equal(again.qvalue, expected.qvalue[which]) and torch.equal(again.scale, expected.scale[which])


def test_deterministic():
    x, expert, w, weight = inputs()
    a, b = (quantize_faq(weight, hessian_of(x, expert, w), FaqSettings(4)) for _ in range(2))
    assert torch.equal(a.qvalue, b.qvalue) and torch.equal(a.scale, b.scale)


def test_cross_term_corrects_for_an_earlier_error():
    x, expert, w, weight = inputs()
    g = torch.Generator().manual_seed(5)
    shifted = x @ (torch.eye(K) + 0.05 * torch.randn(K, K, generator=g))  # what the quantized prefix hands on
    h = hessian_of(shifted, expert, torch.ones(T), reference=x)
    def error(q):
        out = torch.einsum("tk,tnk->tn", shifted, q.dequantize()[expert]) - torch.einsum("tk,tnk->tn", x, weight[expert])
        return float(out.square().sum())
    plain = quantize_gptq(weight, h.matrix, 4)
    corrected = quantize_gptq(weight, h.matrix, 4, cross=h.cross)
    assert error(corrected) < 0.7 * error(plain)


def test_closed_form_of_the_cross_term_is_the_least_squares_target():
    x, expert, _, weight = inputs()
    shifted = x + 0.3 * torch.randn(T, K, generator=torch.Generator().manual_seed(5))
    expert = torch.zeros_like(expert)
    h = WeightedHessian(1, K, cross=True)
    h.add(shifted, expert, torch.ones(T), reference=x)
    best = torch.linalg.lstsq(shifted, x @ weight[0].T).solution.T
    q = quantize_gptq(weight[:1], h.matrix, 8, cross=h.cross, percdamp=1e-6)
    missed, without = (weighted_error(v - best, h.matrix[0]).sum() for v in (q.dequantize()[0], weight[0]))
    assert missed < 0.01 * without


def test_shrinkage_of_few_tokens():
    share = shrinkage(torch.tensor([0.0, 256.0, 1e9]).double(), 256.0)
    assert share[0] == 1 and share[1] == 0.5 and share[2] < 1e-6
    own = torch.eye(3).expand(3, 3, 3) * torch.tensor([0.0, 2.0, 5.0])[:, None, None]
    pool = torch.diag(torch.tensor([1.0, 2.0, 3.0]))
    blend = Blend.of(own, share, pool)
    terms = [blend.term(e) for e in range(3)]
    blended = torch.stack([keep * own[e] + factor * target for e, (keep, factor, target) in enumerate(terms)])
    assert torch.allclose(blended[0], pool)
    assert torch.allclose(blended[1].trace(), torch.tensor(6.0)) and blended[1][2, 2] > blended[1][0, 0]
    assert torch.allclose(blended[2], own[2], atol=1e-4)


@pytest.mark.parametrize("case", ["one expert without tokens", "one token", "all tokens on one expert", "no tokens at all"])
def test_degenerate_routing_quantizes(case):
    x, expert, w, weight = inputs()
    rows = torch.arange(T)
    if case == "one expert without tokens":
        expert = torch.where(expert == 1, torch.tensor(0), expert)
    elif case == "one token":
        rows = torch.cat((torch.nonzero(expert == 1)[:1, 0], torch.nonzero(expert != 1)[:, 0]))
    elif case == "all tokens on one expert":
        expert = torch.full_like(expert, 4)
    else:
        rows = rows[:0]
    h = hessian_of(x[rows], expert[rows], w[rows])
    q = quantize_faq(weight, h, FaqSettings(4))
    assert bool(torch.isfinite(q.dequantize()).all())
    assert float((q.dequantize() - weight).square().mean()) < 0.2


@pytest.mark.parametrize(("columns", "group_size"), [(24, -1), (150, -1), (256, 128)])
def test_each_row_is_the_better_of_walk_and_nearest(columns, group_size, monkeypatch):
    """Weak correlations and heavy tails, where the greedy walk loses some rows."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(3, 400, columns, generator=g) @ (torch.eye(columns) + 0.05 / columns**0.5 * torch.randn(columns, columns, generator=g))
    weight, h = torch.randn(3, 200, columns, generator=g) ** 3, x.mT @ x
    damped = h.double() + 0.01 * h.diagonal(dim1=-2, dim2=-1).double().mean(-1)[:, None, None] * torch.eye(columns)
    ours = quantize_gptq(weight, h, 4, group_size)
    nearest = quantize_at(weight, ours.scale, ours.group_multiplier, 4, group_size)
    monkeypatch.setattr(gptq_host, "_keep_better_rows", lambda *_: None)
    walked = quantize_gptq(weight, h, 4, group_size)
    error, of_nearest, of_walk = (weighted_error((q.dequantize() - weight).double(), damped) for q in (ours, nearest, walked))
    assert int((of_walk > 1.0001 * of_nearest).sum()) > 10
    assert torch.allclose(error, torch.minimum(of_nearest, of_walk), rtol=1e-3)


def test_dead_and_constant_columns():
    x, expert, w, weight = inputs()
    x[:, 3] = 0.0
    x[:, 5] = x[:, 4]
    q = quantize_gptq(weight, hessian_of(x, expert, w).matrix, 4)
    nearest = (weight[..., 3] / q.scale).round().clamp(-7, 7)
    assert torch.equal(q.qvalue[..., 3].float(), nearest)


def test_nan_and_negative_inputs_are_refused():
    x, expert, w, weight = inputs()
    x[7, 3] = float("nan")
    with pytest.raises(UserError, match="NaN"):
        hessian_of(x, expert, w)
    with pytest.raises(UserError, match="negative"):
        hessian_of(inputs()[0], expert, w - 1)
    with pytest.raises(UserError, match="NaN"):
        quantize_gptq(weight, torch.full((E, K, K), float("nan")), 4)
    weight[0, 0, 0] = float("nan")
    with pytest.raises(UserError, match="NaN"):
        quantize_gptq(weight, torch.eye(K).expand(E, K, K), 4)


def test_indefinite_matrix_ends_in_a_message():
    bad = torch.eye(K).repeat(E, 1, 1)
    bad[2, 0, 1] = bad[2, 1, 0] = -1e9
    with pytest.raises(UserError, match="1 experts are not positive definite"):
        quantize_gptq(inputs()[3], bad, 4)


def test_grouping_takes_the_first_pairs_of_each_expert():
    expert = torch.tensor([2, 0, 2, 2, 1, 2, 2])
    index, valid = group_by_expert(expert, 4, capacity=3)
    assert index[2].tolist() == [0, 2, 3] and valid.sum(1).tolist() == [1, 1, 3, 0]
    index, valid = group_by_expert(expert[:0], 4, capacity=3)
    assert not valid.any()
