"""Evaluating one model: run the requests, score them, compare with a reference."""

from __future__ import annotations

import time
from typing import Any, Protocol

import numpy as np

from ecmfq_export.errors import UserError
from ecmfq_export.models.moe_vlm import MoEVLM
from ecmfq_export.models.torch_decoder import load_layer as load_layer_from_disk
from ecmfq_export.progress import Progress, Silent
from ecmfq_export.validate.evaluate import accuracy_by_type, wilson_interval
from ecmfq_export.validate.evaluation.bootstrap import Bootstrap
from ecmfq_export.validate.evaluation.compare import compare, kl_summary, require_same_settings
from ecmfq_export.validate.evaluation.evalset import CAPTION_PROMPT, IMAGE_EMBEDDING_PROMPT, TEXT_EMBEDDING_PROMPT, EvalSet
from ecmfq_export.validate.evaluation.outputs import ModelOutputs, StateOutputs, TokenScores, token_scores
from ecmfq_export.validate.evaluation.result import EvalResult, as_data, token_items
from ecmfq_export.validate.evaluation.retrieval import Ranks, image_scores, rank_embeddings, rank_scores, recalls
from ecmfq_export.validate.evaluation.torch_model import MEMORY_LIMIT, LoadLayer, TorchRunner
from ecmfq_export.validate.prompts import MATCH_PROMPT

PROMPTS = {"captions": CAPTION_PROMPT, "embedding_image": IMAGE_EMBEDDING_PROMPT, "embedding_text": TEXT_EMBEDDING_PROMPT,
           "p_yes": MATCH_PROMPT}  # fmt: skip


class Model(Protocol):
    """A model in another form than a checkpoint, e.g. ``onnx_model.OnnxModel``."""

    def describe(self) -> dict[str, Any]:
        """What it is, as JSON data."""
        ...

    def run(self, evalset: EvalSet, progress: Progress) -> ModelOutputs:
        """Run every request."""
        ...


class TorchModel:
    """A checkpoint in PyTorch, float32, one decoder layer in memory at a time.

    Args:
        model: floating-point or quantized.
        load_layer: gives decoder layers, for variants that are not on disk.
        memory_limit: bytes of hidden states held at once.
    """

    def __init__(self, model: MoEVLM, load_layer: LoadLayer = load_layer_from_disk, memory_limit: int = MEMORY_LIMIT) -> None:
        self._model, self._load_layer, self._memory_limit = model, load_layer, memory_limit

    def describe(self) -> dict[str, Any]:
        model = self._model
        recipes: dict[str, int] = {}
        for name in model.names():
            recipe = "w4a16" if model.recipe(name) == "float" and model.has_int4(name) else model.recipe(name)
            recipes[recipe] = recipes.get(recipe, 0) + 1
        return {"path": str(model.path), "form": "PyTorch", "family": model.spec.family, "vocab_size": model.spec.vocab_size,
                "quantized": model.quantization is not None or model.weight_only is not None, "tensors_by_recipe": recipes}  # fmt: skip

    def run(self, evalset: EvalSet, progress: Progress) -> StateOutputs:
        runner = TorchRunner(self._model, evalset.images.opened(self._model), self._load_layer, self._memory_limit)
        states = runner.states(evalset.requests, progress, "evaluate: PyTorch")
        starts = np.cumsum([0, *(r.reads for r in evalset.requests)])
        return StateOutputs(self._model, states, starts, evalset.yes_no)


def evaluate(
    model: MoEVLM | Model,
    evalset: EvalSet,
    reference: EvalResult | None = None,
    *,
    progress: Progress | None = None,
    resamples: int = 10_000,
    load_layer: LoadLayer = load_layer_from_disk,
    memory_limit: int = MEMORY_LIMIT,
) -> EvalResult:
    """Measure everything that `evalset` asks.

    Args:
        model: a checkpoint (evaluated in PyTorch), or a model in another form.
        reference: another model's result on the same data, e.g. the floating-point one's. One from this process gives KL; one that
            was read from a file gives ``kl_top``, a lower bound of it.
        resamples: bootstrap draws of every interval; 0 leaves them undefined.
        load_layer, memory_limit: see :class:`TorchModel`; for checkpoints only.

    Raises:
        UserError: a prompt that does not fit, an unusable image, NaN logits, or a reference on other data.
    """
    if resamples < 0 or memory_limit < 1:
        raise UserError(f"{resamples} bootstrap draws or a memory limit of {memory_limit} bytes is out of range", "give positive numbers")
    progress = progress or Silent()
    if isinstance(model, MoEVLM):
        model = TorchModel(model, load_layer, memory_limit)
    if reference is not None:  # now, not after hours of running the model
        require_same_settings(reference, evalset.settings, evalset.tasks)
    begin = time.perf_counter()
    outputs = model.run(evalset, progress)
    middle = time.perf_counter()
    result = EvalResult(model.describe(), {**evalset.settings, "data": str(evalset.data.source), "tasks": list(evalset.tasks),
                                           "prompts": PROMPTS, "resamples": resamples})  # fmt: skip
    kl: dict[str, dict[str, Any]] = {"kl": {}, "kl_top": {}}
    for span in ("answers", "captions"):
        if span in evalset.spans:
            _score_tokens(result, evalset, span, outputs, reference, kl, resamples)
    if "embedding" in evalset.tasks:
        _score_embeddings(result, evalset, outputs, resamples)
    if "p_yes" in evalset.tasks:
        _score_matches(result, evalset, outputs, resamples)
    if reference is not None:
        result.comparison = compare(reference, result, resamples) | {name: rows for name, rows in kl.items() if rows}
    result.seconds = {"model": middle - begin, "scores": time.perf_counter() - middle}
    return result


def _score_tokens(
    result: EvalResult, evalset: EvalSet, span: str, outputs: ModelOutputs, reference: EvalResult | None, kl: dict[str, dict[str, Any]],
    resamples: int,
) -> None:  # fmt: skip
    requests = evalset.requests[slice(*evalset.spans[span])]
    targets = np.concatenate([r.targets for r in requests])
    counts = np.array([r.reads for r in requests], np.int64)
    distributions = outputs.distributions(*evalset.spans[span])
    theirs = reference.distributions.get(span) if reference is not None else None
    top = None
    if reference is not None and theirs is None and reference.model.get("vocab_size") == distributions.shape[1]:
        top = reference.top_tokens(span)
        if top is not None and len(top.ids) != len(targets):
            raise UserError(f"the reference has {len(top.ids)} positions of {span}, this model {len(targets)}",
                            "evaluate the reference again on the same data")
    scores = token_scores(distributions, targets, theirs, top)
    result.distributions[span] = distributions
    result.items[span] = token_items(scores, counts)
    for name, values in (("kl", scores.kl), ("kl_top", scores.kl_top)):
        if values is not None:
            kl[name][span] = kl_summary(values, counts, resamples)
            result.items[span][name] = values
    if span == "answers" and "vqa" in evalset.tasks:
        right = np.split(scores.choice == targets, np.cumsum(counts)[:-1])
        correct = result.items[span]["correct"] = np.array([bool(part.all()) for part in right])
        result.metrics["vqa"] = accuracy_by_type([q.type for q in evalset.data.questions], correct)
    if "perplexity" in evalset.tasks:
        result.metrics.setdefault("perplexity", {})[span] = _perplexity(scores, result.items[span], resamples)


def _perplexity(scores: TokenScores, items: dict[str, np.ndarray], resamples: int) -> dict[str, float]:
    mean = Bootstrap(len(items["nll"]), resamples).ratio(items["nll"], items["tokens"])
    return {"perplexity": float(np.exp(mean.value)), "low": float(np.exp(mean.low)), "high": float(np.exp(mean.high)),
            "nll": mean.value, "tokens": len(scores.nll)}  # fmt: skip


def _score_embeddings(result: EvalResult, evalset: EvalSet, outputs: ModelOutputs, resamples: int) -> None:
    gallery = evalset.data.gallery
    assert gallery is not None
    images, texts = (outputs.states(*evalset.spans[name]) for name in ("images", "texts"))
    for name, states in (("images", images), ("texts", texts)):
        if not np.isfinite(states).all():
            raise UserError(f"states of {name} are NaN or infinite", "an activation overflowed its type; see 'validate'")
    ranks = rank_embeddings(images, texts[evalset.ranked], gallery.owner)
    _store_ranks(result, "embedding", ranks, np.asarray(gallery.owner), resamples)


def _score_matches(result: EvalResult, evalset: EvalSet, outputs: ModelOutputs, resamples: int) -> None:
    candidates = evalset.candidates
    assert candidates is not None
    odds = outputs.log_odds(*evalset.spans["matches"])
    count, asked = len(candidates.images), int(candidates.columns.max()) + 1
    scores, rest = odds[: count * asked].reshape(count, asked)[:, candidates.columns], odds[count * asked :]
    _store_ranks(result, "p_yes", rank_scores(scores, np.arange(count)), np.arange(count), resamples)
    result.items["p_yes"]["scores"] = scores
    near = np.split(rest, np.cumsum([len(texts) for texts in candidates.distractors])[:-1])
    wins = np.array([bool((own > others).all()) for own, others in zip(scores.diagonal(), near, strict=True) if len(others)], bool)
    if len(wins):
        low, high = wilson_interval(int(wins.sum()), len(wins))
        result.items["p_yes"]["near_duplicate"] = wins
        result.metrics["p_yes"]["near_duplicate"] = {"accuracy": float(wins.mean()), "low": low, "high": high,
                                                     "correct": int(wins.sum()), "total": len(wins)}  # fmt: skip


def _store_ranks(result: EvalResult, task: str, ranks: Ranks, owner: np.ndarray, resamples: int) -> None:
    scores = image_scores(ranks, owner)
    result.items[task] = {"image_ranks": ranks.images, "text_ranks": ranks.texts, "owner": owner, "gallery": np.array(ranks.gallery)}
    result.metrics[task] = {
        "images": ranks.gallery[0], "texts": ranks.gallery[1], "true_texts": len(ranks.texts), "recalls": recalls(ranks),
        "mean": as_data(Bootstrap(len(scores), resamples).mean(scores)),
    }  # fmt: skip
