"""The PyTorch reference equals transformers' own forward."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen3VLMoeForConditionalGeneration

from ecmfq_export.errors import UserError
from ecmfq_export.models.inputs import DecoderInputs, prepare_inputs
from ecmfq_export.models.moe_vlm import open_model
from ecmfq_export.models.torch_decoder import LayerCache, decoder_logits, load_layer, run_decoder
from ecmfq_export.runtime.sample import ProcessedSample
from tests.tiny_models import IMAGE_TOKEN_ID, VIDEO_TOKEN_ID, make_qwen3_vl_moe, random_sample

BATCHES = {
    "text": [random_sample(1), random_sample(2, text=9)],
    "one image": [random_sample(3, [(1, 4, 6)])],
    "mixed image sizes": [random_sample(4, [(1, 4, 6)]), random_sample(5, [(1, 8, 4)], text=2), random_sample(6)],
    "several images in a prompt": [random_sample(7, [(1, 4, 4), (1, 2, 8), (1, 6, 4)]), random_sample(8, [(1, 2, 2)])],
}
VARIANTS = {
    "plain": {},
    "dense layer": {"mlp_only_layers": [0], "num_hidden_layers": 3},
    "sparse step": {"decoder_sparse_step": 2},
    "tied": {"tie_word_embeddings": True},
    "attention bias": {"attention_bias": True},
    "two deepstack": {"vision": {"deepstack_visual_indexes": [0, 1]}, "num_experts": 12, "num_experts_per_tok": 5},
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory):
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = make_qwen3_vl_moe(tmp_path_factory.mktemp("tiny"), seed=len(name), **VARIANTS[name])
        return made[name]

    return get


def reference(path: Path) -> Qwen3VLMoeForConditionalGeneration:
    return Qwen3VLMoeForConditionalGeneration.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()


def reference_inputs(samples: list[ProcessedSample]) -> dict[str, torch.Tensor]:
    longest = max(sample.length for sample in samples)
    ids = np.full((len(samples), longest), 256, np.int64)
    mask = np.zeros_like(ids)
    for row, sample in enumerate(samples):
        ids[row, : sample.length] = sample.input_ids
        mask[row, : sample.length] = 1
    feeds = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": (ids == IMAGE_TOKEN_ID).astype(np.int32)}
    pictures = [sample for sample in samples if sample.pixel_values is not None]
    if pictures:
        feeds["pixel_values"] = np.concatenate([sample.pixel_values for sample in pictures])
        feeds["image_grid_thw"] = np.concatenate([sample.image_grid_thw for sample in pictures])
    return {name: torch.from_numpy(value) for name, value in feeds.items()}


CASES = [("plain", batch) for batch in BATCHES] + [(v, "mixed image sizes") for v in VARIANTS if v != "plain"]


@torch.no_grad()
@pytest.mark.parametrize(("variant", "batch"), CASES)
def test_equals_transformers(checkpoints, variant: str, batch: str) -> None:
    path, samples = checkpoints(variant), BATCHES[batch]
    theirs = reference(path)
    expected = theirs(**reference_inputs(samples), output_hidden_states=True)
    model = open_model(path)
    inputs = prepare_inputs(model, samples)
    outputs: list[torch.Tensor] = []
    logits = run_decoder(model, inputs, on_layer=lambda index, hidden: outputs.append(hidden))
    real = torch.arange(logits.shape[1]) < inputs.lengths[:, None]
    # 1e-5 of the values' own size; logits of a tied head are not small here.
    close(logits[real], expected.logits[real])
    assert len(outputs) == model.spec.num_layers and len(inputs.deepstack) == model.spec.num_deepstack
    # transformers records what a layer gives before DeepStack features are added; its last record is normed.
    close(inputs.inputs_embeds[real], expected.hidden_states[0][real])
    for index in range(model.spec.num_layers - 1):
        added = inputs.deepstack[index] if index < len(inputs.deepstack) else torch.zeros_like(outputs[index])
        close((outputs[index] - added)[real], expected.hidden_states[index + 1][real])


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5 * max(1.0, float(theirs.abs().max()) / 4), rtol=0)


@torch.no_grad()
def test_routing_is_transformers(checkpoints) -> None:
    path, samples = checkpoints("two deepstack"), BATCHES["mixed image sizes"]
    theirs = reference(path)
    seen: list[tuple[torch.Tensor, ...]] = []
    for layer in theirs.model.language_model.layers:
        layer.mlp.gate.register_forward_hook(lambda module, args, out: seen.append(out))
    theirs(**reference_inputs(samples))
    model = open_model(path)
    inputs = prepare_inputs(model, samples)
    hidden = inputs.inputs_embeds
    real = (torch.arange(hidden.shape[1]) < inputs.lengths[:, None]).flatten()
    for index in range(model.spec.num_layers):
        layer = load_layer(model, index)
        out, probs = layer.attend(
            layer.attention_input(hidden), inputs.cos, inputs.sin, inputs.mask, need_weights=True
        )
        torch.testing.assert_close(probs.sum(-1), torch.ones_like(probs[..., 0]))
        hidden = hidden + out
        routing = layer.route(layer.moe_input(hidden).flatten(0, 1))
        logits, weights, ids = seen[index]
        assert torch.equal(routing.topk_ids[real], ids[real])
        torch.testing.assert_close(routing.topk_weights[real], weights[real], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(routing.logits[real], logits[real], atol=1e-5, rtol=1e-5)
        hidden = hidden + layer.mlp(layer.moe_input(hidden))
        if index < len(inputs.deepstack):
            hidden = hidden + inputs.deepstack[index]
    assert decoder_logits(model, hidden).dtype == torch.float32


@torch.no_grad()
def test_decoding_with_a_cache(checkpoints) -> None:
    """A prompt, then single tokens over the cache, equals the whole sequence at once."""
    model = open_model(checkpoints("plain"))
    sample = random_sample(11, [(1, 4, 6)])
    inputs = prepare_inputs(model, [sample])
    whole = run_decoder(model, inputs)
    layers = [load_layer(model, index) for index in range(model.spec.num_layers)]
    caches = [LayerCache() for _ in layers]
    length, prompt = inputs.inputs_embeds.shape[1], 9
    pieces = []
    for start, stop in [(0, prompt), *((i, i + 1) for i in range(prompt, length))]:
        part = slice(start, stop)
        step = DecoderInputs(
            inputs.inputs_embeds[:, part], inputs.cos[:, part], inputs.sin[:, part], inputs.mask[:, :, part, :stop],
            [feature[:, part] for feature in inputs.deepstack], inputs.token_types[:, part], inputs.lengths, inputs.deltas,
        )  # fmt: skip
        pieces.append(run_decoder(model, step, layers=layers, caches=caches))
    close(torch.cat(pieces, 1), whole)


def test_gradients_reach_the_inputs(checkpoints) -> None:
    """What the stages need to measure how a loss depends on each token."""
    model = open_model(checkpoints("plain"))
    inputs = prepare_inputs(model, [random_sample(12)])
    inputs.inputs_embeds.requires_grad_()
    run_decoder(model, inputs).logsumexp(-1).sum().backward()
    assert bool((inputs.inputs_embeds.grad.abs().sum(-1) > 0).all())


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (random_sample(1, [(1, 4, 4)]), None),
        (ProcessedSample(np.zeros(0, np.int64), None, None, np.zeros(0, bool)), "empty prompt"),
        (ProcessedSample(np.array([1, 288]), None, None, np.zeros(2, bool)), "token id 288 is outside"),
        (ProcessedSample(np.array([-1, 2]), None, None, np.zeros(2, bool)), "token id -1 is outside"),
        (ProcessedSample(np.array([1, VIDEO_TOKEN_ID]), None, None, np.zeros(2, bool)), "video"),
        (ProcessedSample(np.array([1, IMAGE_TOKEN_ID]), None, None, np.zeros(2, bool)), "image tokens"),
        (replace(random_sample(1, [(1, 4, 4)]), input_ids=np.array([1, 2]), answer_mask=np.zeros(2, bool)), "1 images"),
        (replace(random_sample(1, [(1, 4, 4)]), image_grid_thw=np.array([[1, 2, 8]])), None),
    ],
)
def test_bad_prompts(checkpoints, sample: ProcessedSample, message: str | None) -> None:
    model = open_model(checkpoints("plain"))
    if message is None:
        prepare_inputs(model, [sample])
        return
    with pytest.raises(UserError, match=message):
        prepare_inputs(model, [sample])


def test_vision_runs_in_float32_from_any_dtype(checkpoints, tmp_path: Path) -> None:
    model = open_model(make_qwen3_vl_moe(tmp_path, dtype=torch.bfloat16))
    vision = model.vision_module()
    assert {p.dtype for p in vision.parameters()} == {torch.float32} and not vision.training
    assert not any(p.requires_grad or p.is_meta for p in [*vision.parameters(), *vision.buffers()])
    inputs = prepare_inputs(model, [random_sample(1, [(1, 4, 4)])], vision=vision, dtype=torch.bfloat16)
    assert inputs.inputs_embeds.dtype == inputs.cos.dtype == inputs.mask.dtype == torch.bfloat16
    assert torch.isfinite(run_decoder(model, inputs)).all()
