"""Kimi-VL: names, shapes and numbers are those of transformers' classes and of the published checkpoints."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ecmfq_export.errors import UserError
from ecmfq_export.models import kimi_vision
from ecmfq_export.models.inputs import DecoderInputs, prepare_inputs
from ecmfq_export.models.moe_vlm import open_model
from ecmfq_export.models.torch_decoder import LayerCache, load_layer, run_decoder
from ecmfq_export.runtime.sample import ProcessedSample
from tests.models.test_torch_decoder import close
from tests.tiny_kimi import MEDIA_PAD, VIDEO, build_kimi, kimi_config, kimi_sample, make_kimi_k25, make_kimi_vl

BATCHES = {
    "text": [kimi_sample(1), kimi_sample(2, text=9)],
    "mixed image sizes": [kimi_sample(4, [(1, 4, 6)]), kimi_sample(5, [(1, 8, 4)], text=2), kimi_sample(6)],
    "several images in a prompt": [kimi_sample(7, [(1, 4, 4), (1, 2, 8), (1, 6, 6)]), kimi_sample(8, [(1, 2, 2)])],
}
VARIANTS = {
    "plain": {},
    "query latent": {"q_lora_rank": 40, "rope_interleave": False},
    "no groups": {"n_group": 1, "topk_group": 1, "n_routed_experts": 6, "num_experts_per_tok": 3, "norm_topk_prob": False},
    "two of four groups": {"n_group": 4, "topk_group": 2, "n_routed_experts": 12, "num_experts_per_tok": 5, "n_shared_experts": 1},
    "all dense but one, tied": {"first_k_dense_replace": 2, "tie_word_embeddings": True},
}


def reference_inputs(samples: list[ProcessedSample]) -> dict[str, torch.Tensor]:
    longest = max(sample.length for sample in samples)
    ids = np.full((len(samples), longest), 256, np.int64)
    mask = np.zeros_like(ids)
    for row, sample in enumerate(samples):
        ids[row, : sample.length] = sample.input_ids
        mask[row, : sample.length] = 1
    feeds = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
    pictures = [sample for sample in samples if sample.pixel_values is not None]
    if pictures:
        patches = np.concatenate([sample.pixel_values for sample in pictures])
        feeds["pixel_values"] = torch.from_numpy(patches).view(-1, 3, 4, 4)
        feeds["image_grid_thw"] = torch.from_numpy(np.concatenate([sample.image_grid_thw for sample in pictures]))
    return feeds


CASES = [("plain", batch) for batch in BATCHES] + [(v, "mixed image sizes") for v in VARIANTS if v != "plain"]


@torch.no_grad()
@pytest.mark.parametrize("make", [make_kimi_vl, make_kimi_k25])
@pytest.mark.parametrize(("variant", "batch"), CASES)
def test_equals_transformers(tmp_path: Path, make, variant: str, batch: str) -> None:
    options, samples = VARIANTS[variant], BATCHES[batch]
    theirs = build_kimi(kimi_config(**options), seed=3)
    routed: list[tuple[torch.Tensor, ...]] = []
    for layer in theirs.model.language_model.layers:
        if hasattr(layer.mlp, "gate"):
            layer.mlp.gate.register_forward_hook(lambda module, args, out: routed.append(out))
    expected = theirs(**reference_inputs(samples), output_hidden_states=True)
    model = open_model(make(tmp_path / "model", seed=3, **options))
    inputs = prepare_inputs(model, samples)
    real = torch.arange(inputs.mask.shape[-1]) < inputs.lengths[:, None]
    hidden = inputs.inputs_embeds
    close(hidden[real], expected.hidden_states[0][real])
    for index in range(model.spec.num_layers):
        layer = load_layer(model, index)
        if index in model.spec.moe_layers:
            out, _ = layer.attend(layer.attention_input(hidden), inputs.cos, inputs.sin, inputs.mask)
            routing = layer.route(layer.moe_input(hidden + out)[real])
            logits, weights, ids = routed[model.spec.moe_layers.index(index)]
            top_k, shared = layer.spec.mlp.top_k, layer.spec.mlp.num_shared_experts
            order = ids[real.flatten()].argsort(-1)
            ours = routing.topk_ids[:, :top_k].argsort(-1)
            assert torch.equal(routing.topk_ids.gather(1, ours), ids[real.flatten()].gather(1, order))
            close(routing.topk_weights.gather(1, ours), weights[real.flatten()].gather(1, order))
            close(routing.logits, logits[real.flatten()])
            last = layer.spec.mlp.num_experts
            assert routing.topk_ids[:, top_k:].tolist() == [list(range(last, last + shared))] * int(real.sum())
            assert bool((routing.topk_weights[:, top_k:] == 1).all())
        hidden = layer.forward(hidden, inputs.cos, inputs.sin, inputs.mask)
        if index + 1 < model.spec.num_layers:
            close(hidden[real], expected.hidden_states[index + 1][real])
    close(run_decoder(model, inputs)[real], expected.logits[real])


@torch.no_grad()
def test_in_float64(tmp_path: Path) -> None:
    """Nothing hides behind float32's rounding; transformers keeps router, norms' statistics and vision angles in float32."""
    theirs = build_kimi(kimi_config(), seed=2).double()
    sample = kimi_sample(4, [(1, 4, 6)])
    feeds = reference_inputs([sample])
    expected = theirs(**feeds | {"pixel_values": feeds["pixel_values"].double()})
    model = open_model(make_kimi_vl(tmp_path, seed=2))
    logits = run_decoder(model, prepare_inputs(model, [sample], vision=model.vision_module(), dtype=torch.float64))
    torch.testing.assert_close(logits.double(), expected.logits, atol=2e-5, rtol=0)


def test_both_forms_hold_the_same_tensors(tmp_path: Path) -> None:
    published, saved = open_model(make_kimi_vl(tmp_path / "a", seed=4)), open_model(make_kimi_k25(tmp_path / "b", seed=4))
    theirs = build_kimi(kimi_config(), seed=4)
    for name in published.names():
        if not name.startswith("vision."):
            assert torch.equal(published.tensor(name), saved.tensor(name)), name
    name = "layers.1.mlp.experts.gate_up_proj"
    assert published.shape(name) == (10, 192, 128)
    mlp = theirs.model.language_model.layers[1].mlp
    assert torch.equal(published.tensor(name)[:8], mlp.experts.gate_up_proj)
    gate, up = mlp.shared_experts.gate_proj.weight, mlp.shared_experts.up_proj.weight
    assert torch.equal(published.tensor(name)[9], torch.cat((gate[96:], up[96:])))
    assert torch.equal(published.tensor("layers.1.mlp.experts.down_proj")[8], mlp.shared_experts.down_proj.weight[:, :96])
    for model in (published, saved):
        assert torch.equal(model.tensor_rows(name, 3, 9), model.tensor(name)[3:9])
        vision = model.vision_module().state_dict()
        state = theirs.model.vision_tower.state_dict(prefix="vision_tower.") | theirs.model.mm_projector.state_dict(prefix="mm_projector.")
        assert set(vision) == set(state) and all(torch.equal(vision[key], state[key]) for key in state)


@torch.no_grad()
def test_decoding_with_a_cache(tmp_path: Path) -> None:
    model = open_model(make_kimi_vl(tmp_path))
    inputs = prepare_inputs(model, [kimi_sample(11, [(1, 4, 6)])])
    whole = run_decoder(model, inputs)
    layers = [load_layer(model, index) for index in range(model.spec.num_layers)]
    caches = [LayerCache() for _ in layers]
    length, pieces = inputs.inputs_embeds.shape[1], []
    for start, stop in [(0, 9), *((i, i + 1) for i in range(9, length))]:
        part = slice(start, stop)
        step = DecoderInputs(inputs.inputs_embeds[:, part], inputs.cos[:, part], inputs.sin[:, part], inputs.mask[:, :, part, :stop],
                             [], inputs.token_types[:, part], inputs.lengths, inputs.deltas)
        pieces.append(run_decoder(model, step, layers=layers, caches=caches))
    close(torch.cat(pieces, 1), whole)
    assert caches[0].key.shape[-1] == 24 and caches[0].value.shape[-1] == 16


def test_rotary_pairs_of_the_published_tower() -> None:
    """Products of rotated queries and keys, by complex numbers on pairs as published code has it, are kept by the reordering."""
    heads, size, inputs, tokens = 3, 16, 48, 5
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(heads * size, inputs, generator=generator) for _ in range(2))
    x = torch.randn(tokens, inputs, generator=generator)
    angle = torch.rand(tokens, size // 2, generator=generator) * 6
    turn = torch.polar(torch.ones_like(angle), angle).unsqueeze(1)
    pairs = [torch.view_as_complex((x @ w.T).view(tokens, heads, -1, 2).contiguous()) * turn for w in (query, key)]
    expected = torch.einsum("qhd,khd->hqk", pairs[0], pairs[1].conj()).real
    cos, sin = (torch.cat((f(angle), f(angle)), -1).unsqueeze(1) for f in (torch.cos, torch.sin))
    rotated = []
    for w in (query, key):
        values = (x @ kimi_vision.pairs_to_halves(w, heads).T).view(tokens, heads, size)
        first, second = values.chunk(2, -1)
        rotated.append(values * cos + torch.cat((-second, first), -1) * sin)
    torch.testing.assert_close(torch.einsum("qhd,khd->hqk", *rotated), expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(kimi_vision.halves_to_pairs(kimi_vision.pairs_to_halves(query, heads), heads), query)


def test_a_video_token_is_refused_where_the_config_names_one(tmp_path: Path) -> None:
    sample = ProcessedSample(np.array([1, VIDEO]), None, None, np.zeros(2, bool))
    with pytest.raises(UserError, match="video"):
        prepare_inputs(open_model(make_kimi_k25(tmp_path / "k25")), [sample])
    assert prepare_inputs(open_model(make_kimi_vl(tmp_path / "vl")), [sample]).token_types.sum() == 0
    with pytest.raises(UserError, match="image tokens"):
        prepare_inputs(open_model(tmp_path / "vl"), [ProcessedSample(np.array([1, MEDIA_PAD]), None, None, np.zeros(2, bool))])
