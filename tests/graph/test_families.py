"""Every further family's two graphs in ONNX Runtime: floating point against transformers' own forward, quantized against PyTorch."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch

from ecmfq_export.graph.decoder import add_taps, emit_decoder
from ecmfq_export.graph.passes.decompose_attention import DecomposeAttentionPass
from ecmfq_export.graph.vision import trace_vision
from ecmfq_export.models.inputs import embed_tokens, prepare_inputs
from ecmfq_export.models.moe_vlm import MoEVLM
from ecmfq_export.models.torch_decoder import load_layer, run_decoder
from ecmfq_export.runtime import host_inputs as host
from tests.graph.checkpoints import quantized_checkpoint, quantized_graph
from tests.graph.helpers import Decoder, session
from tests.tiny_families import FAMILIES, batch_of, reference_feeds

SEQ, SEED = 64, 7
F32 = ir.DataType.FLOAT


@pytest.fixture(scope="module", params=[name for name in FAMILIES if not name.endswith("_thinker")])
def models(request, tmp_path_factory) -> tuple[MoEVLM, MoEVLM]:
    """Floating point, and with W8A8 attention, W4A8 dense MLP, W8A8 lm_head, W4A8 experts."""
    make = FAMILIES[request.param].make
    return quantized_checkpoint(tmp_path_factory.mktemp("family"), dense=4, lm_head=8, make=make, seed=SEED, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def vision(models):
    return session(trace_vision(models[0].vision_module(), models[0].spec.vision, F32), reference=False)


@torch.no_grad()
def test_vision_graph_keeps_images_apart(models, vision) -> None:
    """Features of four images in one call are transformers' own, and those of one do not change with another's pixels."""
    spec, grid = models[0].spec.vision, np.array(FAMILIES[models[0].spec.family].grids)
    own = int(grid[0].prod())
    patches = torch.randn(int(grid.prod(1).sum()), spec.patch_features, generator=torch.Generator().manual_seed(0))
    out = models[0].vision_module()(patches, grid_thw=torch.from_numpy(grid))
    expected = [out.pooler_output, *(getattr(out, "deepstack_features", None) or ())]
    results = []
    for pixels in (patches.numpy(), np.concatenate((patches[:own].numpy(), np.full_like(patches[own:].numpy(), 50.0)))):
        feeds = {"patches": host.merge_block_order(pixels, grid, spec), **host.vision_inputs(grid, spec)}
        results.append(vision.run(None, {name: feeds[name] for name in (i.name for i in vision.get_inputs())}))
    for ours, theirs in zip(results[0], expected, strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-5 * max(1.0, float(theirs.abs().max())))
    first = host.image_tokens(grid[0], spec.spatial_merge_size, spec.queries)
    np.testing.assert_array_equal(results[0][0][:first], results[1][0][:first])
    assert np.abs(results[0][0][first:] - results[1][0][first:]).max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("form", ["opset 24", "decomposed"])
def test_both_graphs_equal_transformers(models, vision, form: str) -> None:
    """From pixels and ids to logits, as a generator runs the graphs: a ragged prefill, then steps of one token each."""
    model, family, steps = models[0], FAMILIES[models[0].spec.family], 3
    spec, samples = model.spec, batch_of(family, "mixed image sizes")
    theirs = family.build(seed=SEED, tie_word_embeddings=False)
    expected = theirs(**reference_feeds(family, samples)).logits.numpy()
    graph = emit_decoder(model, SEQ, F32)
    if form == "decomposed":
        DecomposeAttentionPass()(graph)
        assert not {n.op_type for n in graph.graph} & {"Attention", "TensorScatter", "RotaryEmbedding", "RMSNormalization"}
    ours = Decoder(session(graph), spec, SEQ, len(samples))

    grid = np.concatenate([s.image_grid_thw for s in samples if s.image_grid_thw is not None])
    pixels = np.concatenate([s.pixel_values for s in samples if s.pixel_values is not None])
    feeds = {"patches": host.merge_block_order(pixels, grid, spec.vision), **host.vision_inputs(grid, spec.vision)}
    features, *deep = vision.run(None, {name: feeds[name] for name in (i.name for i in vision.get_inputs())})
    lengths = np.array([s.length for s in samples])
    ids = np.stack([np.pad(s.input_ids, (0, lengths.max() - s.length)) for s in samples])
    types = host.token_types(ids, spec.image_token_id)
    embeds = host.scatter_features(types, features, embed_tokens(model, torch.from_numpy(ids)).numpy())
    deepstack = [host.scatter_features(types, d) for d in deep]
    positions, deltas = host.decoder_positions(types, lengths, grid, spec.vision.spatial_merge_size, spec.rope.kind, spec.vision.queries)
    kinds = host.router_types(ids, spec.image_expert_ids)
    logits = ours.step(embeds, positions, np.zeros(len(samples), np.int64), deepstack, types=kinds)["logits"]
    scale = 1e-5 * np.abs(expected).max()
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(logits[row, :length], expected[row, :length], atol=2 * scale)

    extended = [np.concatenate((s.input_ids, [7, 11, 13])) for s in samples]
    longer = [type(s)(i, s.pixel_values, s.image_grid_thw, np.zeros(len(i), bool)) for s, i in zip(samples, extended, strict=True)]
    whole = theirs(**reference_feeds(family, longer)).logits.numpy()
    for step in range(steps):
        new = np.stack([i[[length + step]] for i, length in zip(extended, lengths, strict=True)])
        got = ours.step(embed_tokens(model, torch.from_numpy(new)).numpy(), host.decode_positions(lengths + step, deltas), lengths + step)
        for row, length in enumerate(lengths):
            np.testing.assert_allclose(got["logits"][row, 0], whole[row, length + step], atol=3 * scale)


@torch.no_grad()
def test_each_quantized_layer_equals_pytorch(models) -> None:
    """Layer by layer from the graph's own input to it, with the tolerance that tests/graph/test_quantized.py argues."""
    model, samples = models[1], batch_of(FAMILIES[models[1].spec.family], "mixed image sizes")
    inputs = prepare_inputs(model, samples)
    graph = quantized_graph(model, max_seq=SEQ)
    kinds = [n.op_type for n in graph.graph]
    assert kinds.count("EcmfqRoutedMoE") == len(model.spec.moe_layers) and not graph.functions
    add_taps(graph)
    spec, grids = model.spec, np.concatenate([s.image_grid_thw for s in samples if s.image_grid_thw is not None])
    lengths = inputs.lengths.numpy()
    positions, _ = host.decoder_positions(
        inputs.token_types.numpy(), lengths, grids, spec.vision.spatial_merge_size, spec.rope.kind, spec.vision.queries)
    out = Decoder(session(graph), model.spec, SEQ, len(samples)).step(
        inputs.inputs_embeds.numpy(), positions, np.zeros(len(samples), np.int64), [d.numpy() for d in inputs.deepstack],
        types=inputs.router_types.numpy())
    hidden, real = inputs.inputs_embeds, torch.arange(inputs.mask.shape[-1]) < inputs.lengths[:, None]
    for index in range(model.spec.num_layers):
        expected = load_layer(model, index).forward(hidden, inputs.cos, inputs.sin, inputs.mask, types=inputs.router_types)
        if index < len(inputs.deepstack):
            expected = expected + inputs.deepstack[index]
        got = torch.from_numpy(out[f"hidden_{index}"])
        change = ((got - expected).abs().amax(-1) / expected.abs().amax(-1))[real]
        assert float((change < 1e-5).float().mean()) > 0.85, f"layer {index}"
        assert float(change.max()) < 0.02, f"layer {index}"
        hidden = got
    quantized, floating = run_decoder(model, inputs)[real], run_decoder(models[0], prepare_inputs(models[0], samples))[real]
    error = (quantized - floating).pow(2).mean().sqrt()
    difference = (torch.from_numpy(out["logits"])[real] - quantized).pow(2).mean().sqrt()
    assert 0 < float(difference) < 0.15 * float(error)


@torch.no_grad()
def test_float16_graph_stays_near(models) -> None:
    model, samples = models[0], batch_of(FAMILIES[models[0].spec.family], "text")
    inputs = prepare_inputs(model, samples)
    lengths = inputs.lengths.numpy()
    positions, _ = host.decoder_positions(inputs.token_types.numpy(), lengths, None, 2, model.spec.rope.kind)
    out = Decoder(session(emit_decoder(model, SEQ, ir.DataType.FLOAT16)), model.spec, SEQ, len(samples), np.float16).step(
        inputs.inputs_embeds.numpy(), positions, np.zeros(len(samples), np.int64))
    expected = run_decoder(model, inputs).numpy()
    change = np.sqrt(np.mean((out["logits"] - expected) ** 2, -1)) / np.sqrt(np.mean(expected**2))
    # A rounding can move a token of a random model to another expert: few tokens may be far off, none of the others.
    assert np.median(change) < 0.005 and np.mean(change > 0.15) < 0.15
