"""Shared prefixes, batches and rounds change nothing: every position equals a plain forward pass of its prompt alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ecmfq_export.errors import UserError
from ecmfq_export.models.inputs import prepare_inputs
from ecmfq_export.models.moe_vlm import MoEVLM, open_model
from ecmfq_export.models.torch_decoder import load_layer, run_decoder
from ecmfq_export.progress import Silent
from ecmfq_export.runtime.sample import ProcessedSample
from ecmfq_export.validate.evaluation.evalset import EvalSet, prepare
from ecmfq_export.validate.evaluation.outputs import ProjectedStates, StateOutputs, token_scores
from ecmfq_export.validate.evaluation.requests import Request, prefix_groups
from ecmfq_export.validate.evaluation.torch_model import TorchRunner
from tests.tiny_kimi import make_kimi_vl
from tests.validate.evaluation.conftest import YES_NO


@pytest.fixture(scope="module")
def evalset(checkpoint: Path, data: Path) -> EvalSet:
    return prepare(checkpoint, data, yes_no=YES_NO)


def _plain(model: MoEVLM, evalset: EvalSet, request: Request) -> torch.Tensor:
    """Logits [reads, vocab] of one prompt run alone, from its first token to its last."""
    pixels = grid = None
    ids = request.ids.tolist()
    if request.image is not None:
        pixels, grid = evalset.images.patches(request.image)
        ids = evalset.processor.expand(ids, grid)
    inputs = prepare_inputs(model, [ProcessedSample(np.array(ids), pixels, grid, np.zeros(len(ids), bool))])
    with torch.no_grad():
        return run_decoder(model, inputs)[0, -request.reads :]


@pytest.mark.parametrize("memory_limit", [1 << 30, 1])
def test_every_position_equals_the_plain_forward_pass(checkpoint: Path, evalset: EvalSet, memory_limit: int) -> None:
    model = open_model(checkpoint)
    runner = TorchRunner(model, evalset.images.opened(model), memory_limit=memory_limit)
    states = runner.states(evalset.requests, Silent(), "")
    logits = ProjectedStates(model, states).rows(0, len(states))
    expected = torch.cat([_plain(model, evalset, request) for request in evalset.requests])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_latent_attention_and_shared_experts_too(data: Path, tmp_path: Path) -> None:
    """Kimi-VL: another cache, plain rotary positions, a dense first layer."""
    path = make_kimi_vl(tmp_path, seed=1)
    evalset, model = prepare(path, data, yes_no=YES_NO), open_model(path)
    states = TorchRunner(model, evalset.images.opened(model)).states(evalset.requests, Silent(), "")
    logits = ProjectedStates(model, states).rows(0, len(states))
    expected = torch.cat([_plain(model, evalset, request) for request in evalset.requests])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_log_odds_are_those_of_the_whole_vocabulary(checkpoint: Path, quantized: Path, evalset: EvalSet) -> None:
    for path in (checkpoint, quantized):
        model = open_model(path)
        states = TorchRunner(model, evalset.images.opened(model)).states(evalset.requests, Silent(), "")
        starts = np.cumsum([0, *(r.reads for r in evalset.requests)])
        outputs = StateOutputs(model, states, starts, evalset.yes_no)
        span = evalset.spans["matches"]
        log_probs = outputs.distributions(*span).rows(0, span.stop - span.start).double().log_softmax(-1).numpy()
        yes, no = evalset.yes_no
        np.testing.assert_allclose(outputs.log_odds(*span), log_probs[:, yes] - log_probs[:, no], rtol=1e-5, atol=1e-5)


def test_quantized_models_agree_with_the_plain_pass(quantized: Path, evalset: EvalSet) -> None:
    """Sums in another order round an int8 activation the other way here and there, so nearly all positions must agree closely."""
    model = open_model(quantized)
    states = TorchRunner(model, evalset.images.opened(model)).states(evalset.requests, Silent(), "")
    logits = ProjectedStates(model, states).rows(0, len(states))
    expected = torch.cat([_plain(model, evalset, request) for request in evalset.requests])
    error = (logits - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert float(error.median()) < 1e-5 and float(error.quantile(0.9)) < 0.02


def test_layers_that_are_not_on_disk(checkpoint: Path, evalset: EvalSet) -> None:
    model = open_model(checkpoint)
    loaded: list[int] = []

    def without_experts(opened: MoEVLM, index: int):
        loaded.append(index)
        layer = load_layer(opened, index)
        layer.tensors["mlp.experts.down_proj"] = torch.zeros_like(layer.tensors["mlp.experts.down_proj"])
        return layer

    requests = evalset.requests[:3]
    changed = TorchRunner(model, evalset.images.opened(model), without_experts).states(requests, Silent(), "")
    assert loaded == [0, 1, 2]
    assert not torch.allclose(changed, TorchRunner(model, evalset.images.opened(model)).states(requests, Silent(), ""))


def test_image_features_are_shared_by_equal_towers(checkpoint: Path, quantized: Path, data: Path) -> None:
    evalset = prepare(checkpoint, data, tasks=["embedding"])
    first, second = (open_model(p) for p in (checkpoint, quantized))
    evalset.images.opened(first).load(range(5))
    images = evalset.images.opened(second)
    images._model = None  # a tower that would be asked fails
    assert sorted(images.load([4, 0, 4])) == [0, 4]


def test_features_beyond_the_limit_are_made_again(checkpoint: Path, data: Path) -> None:
    model = open_model(checkpoint)
    whole = prepare(checkpoint, data, tasks=["embedding"])
    small = prepare(checkpoint, data, tasks=["embedding"], features_limit=40_000)
    assert 0 < len(whole.images.opened(model).load(range(5))) == 5
    opened = small.images.opened(model)
    opened.load(range(5))
    kept = sum(f.features.numel() * 4 for f in opened._kept.values())
    assert 0 < kept <= 40_000
    for index, features in opened.load(range(5)).items():
        torch.testing.assert_close(features.features, whole.images.opened(model).load([index])[index].features)


def test_prefix_groups() -> None:
    def request(ids: list[int], image: int | None, reads: int = 1, pool: str = "") -> Request:
        return Request(np.array(ids), image, "logits", np.zeros(reads, np.int64), pool)

    requests = [request([1, 9, 2, 3], 0), request([1, 9, 2, 4, 5], 0), request([7, 8], None), request([1, 9, 2], 0, 1, "b"),
                request([1, 9, 2, 4], 0, 2)]  # fmt: skip
    groups = prefix_groups(requests, 9)
    assert [(g.image, g.prefix.tolist(), g.members) for g in groups] == [
        (None, [], (2,)), (0, [1, 9], (0, 1, 4)), (0, [1, 9], (3,))]  # fmt: skip
    with pytest.raises(ValueError, match="share no prefix"):
        prefix_groups([request([1, 9, 2], 0, 2)], 9)


def test_too_long_and_foreign_prompts_are_refused(checkpoint: Path, evalset: EvalSet) -> None:
    model = open_model(checkpoint)
    runner = TorchRunner(model, evalset.images.opened(model))
    with pytest.raises(UserError, match="600 tokens, the model takes 512"):
        runner.states([Request.last(np.ones(600, np.int64), None, "state")], Silent(), "")
    with pytest.raises(UserError, match="outside the vocabulary of 288"):
        runner.states([Request.last(np.array([1, 288]), None, "state")], Silent(), "")


def test_token_scores_by_hand() -> None:
    class Table:
        def __init__(self, logits: list[list[float]]) -> None:
            self.logits = torch.tensor(logits)
            self.shape = tuple(self.logits.shape)

        def rows(self, start: int, stop: int) -> torch.Tensor:
            return self.logits[start:stop]

    logits = np.log([[0.7, 0.2, 0.1], [0.25, 0.5, 0.25]])
    scores = token_scores(Table(logits.tolist()), np.array([0, 2]))
    np.testing.assert_allclose(scores.nll, -np.log([0.7, 0.25]), rtol=1e-6)
    np.testing.assert_allclose(scores.margin, np.log([3.5, 2.0]), rtol=1e-5)
    assert scores.choice.tolist() == [0, 1] and scores.kl is None
    other = np.log([[0.6, 0.3, 0.1], [0.25, 0.5, 0.25]])
    against = token_scores(Table(other.tolist()), np.array([0, 2]), Table(logits.tolist()))
    np.testing.assert_allclose(against.kl, [0.7 * np.log(7 / 6) + 0.2 * np.log(2 / 3), 0.0], atol=1e-7)
    with pytest.raises(UserError, match="2 logits are NaN or infinite"):
        token_scores(Table([[0.0, float("nan"), float("inf")]]), np.array([0]))
    with pytest.raises(UserError, match="one vocabulary"):
        token_scores(Table([[0.0, 1.0]]), np.array([0]), Table([[0.0]]))
