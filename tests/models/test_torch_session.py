"""Prefill and steps through caches give the logits of one whole forward pass, row by row, whatever else is in the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ecmfq_export.errors import UserError
from ecmfq_export.models.inputs import prepare_inputs
from ecmfq_export.models.moe_vlm import MoEVLM, open_model
from ecmfq_export.models.torch_decoder import run_decoder
from ecmfq_export.models.torch_session import TorchSession
from ecmfq_export.runtime.sample import ProcessedSample
from tests.tiny_ernie import ernie_sample, make_ernie
from tests.tiny_kimi import kimi_sample, make_kimi_vl
from tests.tiny_models import make_qwen3_vl_moe, random_sample


@pytest.fixture(scope="module", params=["qwen3_vl_moe", "kimi_vl", "ernie4_5_vl_moe"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[MoEVLM, list[ProcessedSample]]:
    path = tmp_path_factory.mktemp("model")
    if request.param == "kimi_vl":
        return open_model(make_kimi_vl(path, seed=3)), [kimi_sample(0, [(1, 4, 4)]), kimi_sample(1), kimi_sample(2, [(1, 2, 4)], 9)]
    if request.param == "ernie4_5_vl_moe":
        return open_model(make_ernie(path, seed=3)), [ernie_sample(0, [(1, 4, 4)]), ernie_sample(1), ernie_sample(2, [(1, 2, 4)], 9)]
    samples = [random_sample(0, [(1, 4, 8)]), random_sample(1, text=3), random_sample(2, [(1, 4, 4), (1, 2, 6)], text=7)]
    return open_model(make_qwen3_vl_moe(path, seed=3)), samples


def _plain(model: MoEVLM, sample: ProcessedSample) -> torch.Tensor:
    with torch.no_grad():
        return run_decoder(model, prepare_inputs(model, [sample]))[0]


def _prompt(sample: ProcessedSample) -> ProcessedSample:
    keep = sample.length - int(sample.answer_mask.sum())
    return ProcessedSample(sample.input_ids[:keep], sample.pixel_values, sample.image_grid_thw, np.zeros(keep, bool))


def test_steps_equal_the_whole_pass(case: tuple[MoEVLM, list[ProcessedSample]]) -> None:
    model, samples = case
    session = TorchSession(model)
    expected = [_plain(model, sample)[sample.answer_mask.argmax() - 1 : -1].numpy() for sample in samples]
    for found, wanted in zip(session.answer_logits(samples), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    logits, state = session.prefill([_prompt(s) for s in samples])
    counts = [int(s.answer_mask.sum()) for s in samples]
    assert len(set(counts)) > 1, "rows end at different steps"
    for at in range(max(counts)):
        active = np.array([at < count for count in counts])
        for row in np.flatnonzero(active):
            np.testing.assert_allclose(logits[row], expected[row][at], rtol=1e-4, atol=1e-4)
        tokens = np.array([s.input_ids[s.answer_mask][at] if a else 0 for s, a in zip(samples, active, strict=True)])
        logits = session.step(tokens, state, active)


def test_the_context_has_an_end(case: tuple[MoEVLM, list[ProcessedSample]]) -> None:
    model, samples = case
    session = TorchSession(model)
    session.max_seq_len = samples[0].length
    session.check_length(samples[0])
    with pytest.raises(UserError, match="and 1 more exceed the context"):
        session.check_length(samples[0], room=1)
    _, state = session.prefill(samples[:1])
    with pytest.raises(UserError, match="is full"):
        session.step(np.array([1]), state)
