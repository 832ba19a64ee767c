"""Every further family's PyTorch reference equals transformers' own forward: states, routing and logits, on tiny random models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ecmfq_export.models.float_source import ExpertsSource
from ecmfq_export.models.inputs import DecoderInputs, prepare_inputs
from ecmfq_export.models.moe_vlm import MoEVLM, open_model
from ecmfq_export.models.torch_decoder import LayerCache, load_layer, run_decoder
from tests.models.test_torch_decoder import close
from tests.tiny_families import BATCHES, FAMILIES, batch_of, reference_feeds, watch_routers

CASES = [(name, "plain", batch) for name in FAMILIES for batch in BATCHES]
CASES += [(name, variant, "mixed image sizes") for name, family in FAMILIES.items() for variant in family.variants if variant != "plain"]


@torch.no_grad()
@pytest.mark.parametrize(("name", "variant", "batch"), CASES)
def test_equals_transformers(tmp_path: Path, name: str, variant: str, batch: str) -> None:
    family = FAMILIES[name]
    options, samples = family.variants[variant], batch_of(family, batch)
    theirs = family.build(seed=3, **options)
    routed = watch_routers(family, theirs)
    expected = theirs(**reference_feeds(family, samples), output_hidden_states=True)
    model = open_model(family.make(tmp_path, seed=3, **options))
    assert model.spec.family == name
    inputs = prepare_inputs(model, samples)
    real = torch.arange(inputs.mask.shape[-1]) < inputs.lengths[:, None]
    hidden = inputs.inputs_embeds
    close(hidden[real], expected.hidden_states[0][real])
    assert {layer for layer, _ in routed} == set(model.spec.moe_layers)
    for index in range(model.spec.num_layers):
        layer = load_layer(model, index)
        if index in model.spec.moe_layers:
            out, _ = layer.attend(layer.attention_input(hidden), inputs.cos, inputs.sin, inputs.mask)
            x = layer.moe_input(hidden + out)
            for kind in range(max(1, len(layer.spec.mlp.type_parts))):
                own = inputs.router_types == kind if layer.spec.mlp.type_parts else torch.ones_like(real)
                if (index, kind) in routed:
                    compare_routing(layer, kind, x, inputs.router_types, routed[index, kind], own, real)
        hidden = layer.forward(hidden, inputs.cos, inputs.sin, inputs.mask, types=inputs.router_types)
        if index < len(inputs.deepstack):
            hidden = hidden + inputs.deepstack[index]
    close(run_decoder(model, inputs)[real], expected.logits[real])


def compare_routing(layer, kind: int, x, types, theirs: tuple[torch.Tensor, ...], own: torch.Tensor, real: torch.Tensor) -> None:
    """The same experts with the same weights for every real token of a type; the shared ones behind them.

    Args:
        x: [B, S, hidden]; types: its token types.
        theirs: rows of tokens of the type, padding included.
        own, real: bool [B, S].
    """
    mlp, chosen = layer.spec.mlp, (own & real)[own]
    # Padding is of no type that matters, but it is where transformers' rows are.
    routing = layer.route(x[own & real], types[own & real])
    logits, weights, ids = (part[chosen] for part in theirs)
    parts, widest = (mlp.type_parts or (1,))[kind], max(mlp.type_parts, default=1)
    first = mlp.experts_per_type * sum(mlp.type_parts[:kind])
    slots = routing.topk_ids[:, : mlp.top_k].unflatten(1, (mlp.picks, widest))
    assert bool((slots[:, :, :parts] == slots[:, :, :1] + torch.arange(parts)).all()) and bool((slots[:, :, parts:] == -1).all())
    experts, gates = (slots[:, :, 0] - first) // parts, routing.topk_weights[:, : mlp.top_k].unflatten(1, (mlp.picks, widest))
    order, ours = ids.argsort(-1), experts.argsort(-1)
    assert torch.equal(experts.gather(1, ours), ids.gather(1, order))
    close(gates[:, :, 0].gather(1, ours), weights.gather(1, order))
    assert torch.equal(gates, gates[:, :, :1] * (torch.arange(widest) < parts))
    close(routing.logits[:, first : first + parts * mlp.experts_per_type : parts], logits)
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


def test_routing_by_type_asks_for_types(model) -> None:
    layer = load_layer(model, model.spec.moe_layers[0])
    x = torch.zeros(3, model.spec.hidden_size)
    if layer.spec.mlp.type_parts:
        with pytest.raises(ValueError, match="token types"):
            layer.route(x)
        routing = layer.route(x, torch.tensor([0, 1, 0]))
        where = layer.dispatch(routing)
        parts, picks, shared = layer.spec.mlp.type_parts, layer.spec.mlp.picks, layer.spec.mlp.num_shared_experts
        assert torch.bincount(where.token).tolist() == [picks * parts[kind] + shared for kind in (0, 1, 0)]
    else:
        assert bool((layer.route(x).topk_ids >= 0).all())


@torch.no_grad()
def test_decoding_with_a_cache(model) -> None:
    inputs = prepare_inputs(model, batch_of(FAMILIES[model.spec.family], "mixed image sizes")[:1])
    layers = [load_layer(model, index) for index in range(model.spec.num_layers)]
    whole, caches, pieces = run_decoder(model, inputs, layers), [LayerCache() for _ in layers], []
    length = inputs.inputs_embeds.shape[1]
    for start, stop in [(0, 9), *((i, i + 1) for i in range(9, length))]:
        part = slice(start, stop)
        step = DecoderInputs(inputs.inputs_embeds[:, part], inputs.cos[:, part], inputs.sin[:, part], inputs.mask[:, :, part, :stop],
                             [d[:, part] for d in inputs.deepstack], inputs.token_types[:, part], inputs.lengths, inputs.deltas,
                             inputs.router_types[:, part])
        pieces.append(run_decoder(model, step, layers=layers, caches=caches))
    close(torch.cat(pieces, 1), whole)


def test_every_weight_reads_back(model) -> None:
    """Rows of every tensor are the tensor's."""
    for name in model.names():
        tensor = model.tensor(name)
        assert tuple(tensor.shape) == model.shape(name) and bool(torch.isfinite(tensor).all())
        if len(tensor) > 2:
            assert torch.equal(model.tensor_rows(name, 1, 3), tensor[1:3]), name


def test_every_weight_writes_back(model) -> None:
    """What is written of a tensor, all at once or part by part, is what lies on disk."""
    for name in model.names():
        source = model.float_source(name)
        files = source.split(model.tensor(name))
        assert set(files) == set(source.disk_shapes())
        for disk, tensor in files.items():
            stored = model.checkpoint.load(disk)
            assert torch.equal(tensor, stored), disk
            if isinstance(source, ExpertsSource):
                assert torch.equal(source.part(disk, lambda start, stop, name=name: model.tensor_rows(name, start, stop)), stored), disk
