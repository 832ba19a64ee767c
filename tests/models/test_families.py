"""Every further family's PyTorch reference equals transformers' own forward: states, routing and logits, on tiny random models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ecmfq_export.models.inputs import DecoderInputs, prepare_inputs
from ecmfq_export.models.moe_vlm import MoEVLM, open_model
from ecmfq_export.models.torch_decoder import LayerCache, load_layer, run_decoder
from tests.models.test_torch_decoder import close
from tests.tiny_families import BATCHES, FAMILIES, batch_of, reference_feeds, routers_of

CASES = [(name, "plain", batch) for name in FAMILIES for batch in BATCHES]
CASES += [(name, variant, "mixed image sizes") for name, family in FAMILIES.items() for variant in family.variants if variant != "plain"]


@torch.no_grad()
@pytest.mark.parametrize(("name", "variant", "batch"), CASES)
def test_equals_transformers(tmp_path: Path, name: str, variant: str, batch: str) -> None:
    family = FAMILIES[name]
    options, samples = family.variants[variant], batch_of(family, batch)
    theirs = family.build(seed=3, **options)
    routed: list[tuple[torch.Tensor, ...]] = []
    for router in routers_of(family, theirs):
        router.register_forward_hook(lambda module, args, out: routed.append(out))
    expected = theirs(**reference_feeds(family, samples), output_hidden_states=True)
    model = open_model(family.make(tmp_path, seed=3, **options))
    assert model.spec.family == name
    inputs = prepare_inputs(model, samples)
    real = torch.arange(inputs.mask.shape[-1]) < inputs.lengths[:, None]
    hidden = inputs.inputs_embeds
    close(hidden[real], expected.hidden_states[0][real])
    assert len(routed) == len(model.spec.moe_layers)
    for index in range(model.spec.num_layers):
        layer = load_layer(model, index)
        if index in model.spec.moe_layers:
            out, _ = layer.attend(layer.attention_input(hidden), inputs.cos, inputs.sin, inputs.mask)
            compare_routing(layer, layer.moe_input(hidden + out)[real], routed[model.spec.moe_layers.index(index)], real)
        hidden = layer.forward(hidden, inputs.cos, inputs.sin, inputs.mask)
        if index < len(inputs.deepstack):
            hidden = hidden + inputs.deepstack[index]
    close(run_decoder(model, inputs)[real], expected.logits[real])


def compare_routing(layer, x: torch.Tensor, theirs: tuple[torch.Tensor, ...], real: torch.Tensor) -> None:
    """The same experts with the same weights for every real token; the shared ones behind them."""
    routing, mlp = layer.route(x), layer.spec.mlp
    logits, weights, ids = (part[real.flatten()] for part in theirs)
    order, ours = ids.argsort(-1), routing.topk_ids[:, : mlp.top_k].argsort(-1)
    assert torch.equal(routing.topk_ids.gather(1, ours), ids.gather(1, order))
    close(routing.topk_weights.gather(1, ours), weights.gather(1, order))
    close(routing.logits, logits)
    assert bool((routing.topk_ids[:, mlp.top_k :] == torch.arange(mlp.num_experts, mlp.total_experts)).all())
    assert bool((routing.topk_weights[:, mlp.top_k :] == 1).all())


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, tmp_path_factory) -> MoEVLM:
    return open_model(FAMILIES[request.param].make(tmp_path_factory.mktemp("family"), seed=2))


@torch.no_grad()
def test_in_float64(model) -> None:
    """Nothing hides behind float32's rounding; transformers keeps router, norms' statistics and vision angles in float32."""
    family = FAMILIES[model.spec.family]
    theirs, samples = family.build(seed=2).double(), batch_of(family, "mixed image sizes")[:1]
    feeds = {name: value.double() if value.is_floating_point() else value for name, value in reference_feeds(family, samples).items()}
    inputs = prepare_inputs(model, samples, vision=model.vision_module(), dtype=torch.float64)
    torch.testing.assert_close(run_decoder(model, inputs).double(), theirs(**feeds).logits, atol=2e-5, rtol=0)


@torch.no_grad()
def test_decoding_with_a_cache(model) -> None:
    inputs = prepare_inputs(model, batch_of(FAMILIES[model.spec.family], "mixed image sizes")[:1])
    layers = [load_layer(model, index) for index in range(model.spec.num_layers)]
    whole, caches, pieces = run_decoder(model, inputs, layers), [LayerCache() for _ in layers], []
    length = inputs.inputs_embeds.shape[1]
    for start, stop in [(0, 9), *((i, i + 1) for i in range(9, length))]:
        part = slice(start, stop)
        step = DecoderInputs(inputs.inputs_embeds[:, part], inputs.cos[:, part], inputs.sin[:, part], inputs.mask[:, :, part, :stop],
                             [d[:, part] for d in inputs.deepstack], inputs.token_types[:, part], inputs.lengths, inputs.deltas)
        pieces.append(run_decoder(model, step, layers=layers, caches=caches))
    close(torch.cat(pieces, 1), whole)


def test_every_weight_reads_back(model) -> None:
    """Rows of every tensor are the tensor's."""
    for name in model.names():
        tensor = model.tensor(name)
        assert tuple(tensor.shape) == model.shape(name) and bool(torch.isfinite(tensor).all())
        if len(tensor) > 2:
            assert torch.equal(model.tensor_rows(name, 1, 3), tensor[1:3]), name
