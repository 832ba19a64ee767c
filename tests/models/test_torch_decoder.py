"""The PyTorch reference equals transformers' own forward."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen3VLMoeForConditionalGeneration

from ecmfq_export.models.inputs import prepare_inputs
from ecmfq_export.models.moe_vlm import open_model
from ecmfq_export.models.torch_decoder import decoder_logits, load_layer, run_decoder
from ecmfq_export.runtime.sample import ProcessedSample
from tests.tiny_models import IMAGE_TOKEN_ID, make_qwen3_vl_moe, random_sample

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


@torch.no_grad()
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_transformers(checkpoints, variant: str, batch: str) -> None:
    path, samples = checkpoints(variant), BATCHES[batch]
    theirs = reference(path)(**reference_inputs(samples), output_hidden_states=True, output_router_logits=True)
    model = open_model(path)
    inputs = prepare_inputs(model, samples)
    outputs: list[torch.Tensor] = []
    logits = run_decoder(model, inputs, on_layer=lambda index, hidden: outputs.append(hidden))
    real = torch.arange(logits.shape[1]) < inputs.lengths[:, None]
    torch.testing.assert_close(logits[real], theirs.logits[real], atol=1e-5, rtol=1e-5)
    assert len(outputs) == model.spec.num_layers
    assert [len(ids) for ids in (inputs.deepstack,)] == [model.spec.num_deepstack]
    assert torch.equal(inputs.token_types.bool().sum(), torch.tensor(sum(int((s.input_ids == IMAGE_TOKEN_ID).sum()) for s in samples)))


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
