"""Batches and the activations between layers."""

import pytest
import torch

from ecmfq_export.errors import UserError
from ecmfq_export.models.inputs import prepare_inputs
from ecmfq_export.models.moe_vlm import open_model
from ecmfq_export.models.torch_decoder import decoder_logits, load_layer, run_decoder
from ecmfq_export.runtime.processor import Processor
from ecmfq_export.stages.samples import load_pool
from ecmfq_export.stages.streams import ActivationStore, advance, prepare_batches


@pytest.fixture(scope="module")
def samples(tiny, pool):
    processor = Processor(tiny)
    return [sample.process(processor) for sample in load_pool(pool)[:7]]


@pytest.mark.parametrize("limit", [0, 20_000, 1 << 30])
def test_streaming_equals_the_whole_decoder(tiny, samples, limit):
    model = open_model(tiny)
    with torch.no_grad(), ActivationStore(limit) as store:
        batches = list(prepare_batches(model, samples, store, batch_tokens=100))
        assert sorted(i for batch in batches for i in batch.samples) == list(range(7)) and len(batches) > 2
        for index in range(model.spec.num_layers):
            advance(load_layer(model, index), index, batches, store, "hidden")
        for batch in batches:
            logits = decoder_logits(model, store.get(f"hidden/{batch.index}"))
            for row, number in enumerate(batch.samples):
                expected = run_decoder(model, prepare_inputs(model, [samples[number]]))[0]
                assert torch.allclose(logits[row, : batch.lengths[row]], expected, atol=1e-3)
        path = store._directory and store._directory.name
    if limit == 0:
        import os

        assert not os.path.exists(path)


def test_store_replaces_and_drops_wherever_it_keeps():
    with ActivationStore(limit=40) as store:
        store.put("a/0", torch.ones(5))
        store.put("b/0", torch.full((5,), 2.0))
        store.put("c/0", torch.full((2, 2), 3.0))  # beyond the limit
        store.put("c/0", torch.full((3, 1), 4.0))
        assert store.names() == ["a/0", "b/0", "c/0"] and store.get("c/0").tolist() == [[4.0]] * 3
        store.drop("a/0")
        store.put("d/0", torch.zeros(5))
        store.drop("c/0")
        store.drop("never there")
        assert store.names() == ["b/0", "d/0"]
        with pytest.raises(KeyError):
            store.get("c/0")


def test_a_sample_beyond_the_models_positions_is_named(tiny, samples):
    model = open_model(tiny)
    long = type(samples[0])(samples[0].input_ids.repeat(60), None, None, samples[0].answer_mask.repeat(60))
    with ActivationStore() as store, pytest.raises(UserError, match="sample 0 has .* tokens, the model takes 512"):
        list(prepare_batches(model, [long], store))
