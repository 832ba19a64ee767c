"""The batched form for GPUs, run on the CPU's operators, against the host's form: two programs, one walk."""

import pytest
import torch

from ecmfq_export.errors import UserError
from ecmfq_export.quant import gptq_device
from ecmfq_export.quant.gptq import quantize_gptq
from ecmfq_export.quant.hessian import Blend, weighted_error
from ecmfq_export.quant.qtensor import QTensor
from ecmfq_export.quant.workspace import Workspace


def on_device(weight, hessian, group_size, cross=None, blend=None, descending=True, percdamp=0.01) -> QTensor:
    experts = range(len(weight))

    def blended(own, expert, of_cross):
        return (own[expert], 1.0, 0.0, None) if blend is None else (own[expert], *blend.term(expert, of_cross))

    crosses = None if cross is None else [blended(cross, e, True) for e in experts]
    work, grid = Workspace(), torch.empty(weight.shape, dtype=torch.int8)
    problem = gptq_device.arrange([blended(hessian, e, False) for e in experts], torch.full((len(weight),), percdamp), crosses, 1.0,
                                  descending, work)
    scale, multiplier = gptq_device.quantize_ordered(weight, problem, 4, group_size, "mse", work, grid)
    return QTensor(grid, scale, 4, group_size, multiplier)


@pytest.mark.parametrize(("columns", "group_size"), [(40, -1), (300, -1), (256, 128)])
@pytest.mark.parametrize("case", ["plain", "blend", "cross", "own order", "no tokens"])
def test_both_forms_agree(columns, group_size, case):
    g = torch.Generator().manual_seed(columns)
    mix = torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=g) / columns**0.5
    x = torch.randn(3, 2 * columns, columns, generator=g) @ mix
    weight = torch.randn(3, 70, columns, generator=g)
    hessian = x.mT @ x
    cross = 0.02 * x.mT @ torch.roll(x, 1, 1) if case == "cross" else None
    if case == "no tokens":
        hessian[1] = 0.0
    blend = Blend.of(hessian, torch.tensor([0.2, 0.5, 1.0]), hessian.sum(0)) if case == "blend" else None
    settings = {"cross": cross, "blend": blend, "descending": case != "own order"}
    host, device = quantize_gptq(weight, hessian, 4, group_size, **settings), on_device(weight, hessian, group_size, **settings)
    same = (host.qvalue == device.qvalue).float().mean((1, 2))
    # Sums in another order move a value across a boundary now and then, and then the columns that follow in that row.
    assert float(same.min()) > 0.97
    assert torch.allclose(host.scale, device.scale, rtol=0.2) and float((host.scale == device.scale).float().mean()) > 0.95
    errors = [weighted_error(q.dequantize() - weight, hessian).sum(-1) for q in (host, device)]
    assert torch.allclose(*errors, rtol=0.03)


def test_both_forms_name_what_cannot_be_factored():
    weight, hessian = torch.randn(1, 4, 8), torch.full((1, 8, 8), 1e6)
    hessian.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    for run in (lambda: quantize_gptq(weight, hessian, 4), lambda: on_device(weight, hessian, -1)):
        with pytest.raises(UserError, match="not positive definite, even with damping 1000"):
            run()
    hessian[0, 3, 3] = float("nan")
    for run in (lambda: quantize_gptq(weight, hessian, 4), lambda: on_device(weight, hessian, -1)):
        with pytest.raises(UserError, match="a Hessian holds NaN"):
            run()
