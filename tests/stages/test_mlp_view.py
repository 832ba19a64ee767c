"""Some experts of a layer computed as by the whole layer, without the other experts' weights."""

import pytest
import torch

from ecmfq_export.models.moe_vlm import open_model
from ecmfq_export.models.torch_decoder import load_layer
from ecmfq_export.quant.rtn import quantize_rtn
from ecmfq_export.stages import mlp_view

HIDDEN = 128


@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("everywhere", [False, True])
def test_experts_alone_compute_their_rows(tiny, bits, everywhere):
    layer = load_layer(open_model(tiny), 0)
    if bits is not None:
        gate_up, _ = mlp_view.stacked_weights(layer)
        layer = mlp_view.with_quantized(layer, mlp_view.named_gate_up(layer, quantize_rtn(gate_up, bits)))
    x = torch.randn(40, HIDDEN, generator=torch.Generator().manual_seed(0))
    routed = mlp_view.route_everywhere(layer, x) if everywhere else mlp_view.route(layer, x)
    whole = mlp_view.intermediate(layer, x, routed)
    layer.drop_integers()
    experts = mlp_view.num_experts(layer)
    parts = [slice(0, 3), slice(3, 4), slice(4, experts)]
    alone = [mlp_view.experts_alone(layer, routed, part) for part in parts]
    assert torch.equal(torch.cat([mlp_view.intermediate(own, x, rows) for own, rows in alone]), whole)
    assert torch.equal(torch.cat([rows.gate for _, rows in alone]), routed.gate)
    assert not layer._widened, "nothing of the whole layer is widened"
    if bits is None:
        name = "mlp.experts.gate_up_proj"
        assert alone[1][0].tensors[name].data_ptr() == layer.tensors[name][3].data_ptr(), "no copy"
