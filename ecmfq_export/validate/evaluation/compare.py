"""One result against a reference's, item by item."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ecmfq_export.errors import UserError
from ecmfq_export.validate.compare import DECISIVE_MARGIN
from ecmfq_export.validate.evaluation.bootstrap import Bootstrap
from ecmfq_export.validate.evaluation.result import EvalResult, as_data
from ecmfq_export.validate.evaluation.retrieval import Ranks, image_scores


def compare(reference: EvalResult, result: EvalResult, resamples: int = 10_000) -> dict[str, Any]:
    """Differences, retention and flips of `result` against `reference`, over what both measured.

    Args:
        resamples: bootstrap draws; 0 leaves intervals undefined.

    Returns:
        ``difference``: {``vqa``, ``embedding``, ``p_yes``: result - reference of the accuracy or mean recall, with a 95% interval and a
        p-value from a paired bootstrap over questions or images}; ``retention``: {the same: result / reference, with interval};
        ``perplexity_ratio``: {``answers``, ``captions``}; ``answers``: how many right answers were lost and gained; ``flips``: {span:
        decisive positions, how many of them give another token, agreement over all positions}; ``reference``: what it is, and
        ``reference_metrics``. A position is decisive where the reference prefers its first token by 0.1 nats or more.

    Raises:
        UserError: results of different data or settings, or nothing in common.
    """
    require_same_settings(reference, result.settings, tuple(result.metrics))
    out: dict[str, Any] = {"reference": reference.model, "reference_metrics": reference.metrics, "difference": {}, "retention": {},
                           "perplexity_ratio": {}, "flips": {}}  # fmt: skip
    if "vqa" in result.metrics and "vqa" in reference.metrics:
        before, after = (r.items["answers"]["correct"] for r in (reference, result))
        _add(out, "vqa", before, after, resamples)
        out["answers"] = {"lost": int((before & ~after).sum()), "gained": int((~before & after).sum())}
    for task in ("embedding", "p_yes"):
        if task in result.metrics and task in reference.metrics:
            _add(out, task, _image_scores(reference, task), _image_scores(result, task), resamples)
    for span in ("answers", "captions"):
        if span in result.items and span in reference.items:
            _add_tokens(out, span, reference.items[span], result.items[span], resamples)
    if not any(out[kind] for kind in ("difference", "perplexity_ratio")):
        raise UserError("the reference and this result measured nothing in common",
                        f"reference: {', '.join(reference.metrics)}; here: {', '.join(result.metrics)}")
    return out


def require_same_settings(reference: EvalResult, settings: dict[str, Any], tasks: Sequence[str]) -> None:
    """Raise UserError unless `reference` was measured on the items and with the settings that `tasks` need to be compared."""
    needed = {"fingerprint": None, "distractors": "embedding", "candidates": "p_yes", "yes_no": "p_yes"}
    for key, task in needed.items():
        ours, theirs = settings.get(key), reference.settings.get(key)
        if ours != theirs and (task is None or (task in tasks and task in reference.metrics)):
            what = "data" if key == "fingerprint" else f"{key} ({theirs} and {ours})"
            raise UserError(f"the reference and this result were measured with different {what}",
                            "evaluate the reference again with the same --data, --limit, --captions and --candidates")


def _image_scores(result: EvalResult, task: str) -> np.ndarray:
    items = result.items[task]
    gallery = items["gallery"]
    return image_scores(Ranks(items["image_ranks"], items["text_ranks"], (int(gallery[0]), int(gallery[1]))), items["owner"].astype(int))


def _add(out: dict[str, Any], task: str, before: np.ndarray, after: np.ndarray, resamples: int) -> None:
    if before.shape != after.shape:
        raise UserError(f"{task}: the reference has {len(before)} items, this result {len(after)}", "evaluate both on the same data")
    bootstrap = Bootstrap(len(after), resamples)
    out["difference"][task] = as_data(bootstrap.difference(before, after))
    out["retention"][task] = as_data(bootstrap.retention(before.astype(np.float64), after.astype(np.float64)))


def _add_tokens(out: dict[str, Any], span: str, before: dict[str, np.ndarray], after: dict[str, np.ndarray], resamples: int) -> None:
    if not np.array_equal(before["tokens"], after["tokens"]):
        return  # another tokenizer: perplexities by token cannot be compared, and there is no common position
    bootstrap = Bootstrap(len(after["nll"]), resamples)
    # Of log-perplexity the paired difference is the natural statistic; its exponential is the ratio of perplexities.
    ratio = bootstrap.ratio(after["nll"] - before["nll"], after["tokens"])
    out["perplexity_ratio"][span] = {"value": float(np.exp(ratio.value)), "low": float(np.exp(ratio.low)),
                                     "high": float(np.exp(ratio.high))}  # fmt: skip
    same = before["choice"] == after["choice"]
    sure = before["margin"] >= DECISIVE_MARGIN
    out["flips"][span] = {"positions": len(same), "agreement": float(same.mean()), "decisive_positions": int(sure.sum()),
                          "decisive_flips": int((sure & ~same).sum())}  # fmt: skip


def kl_summary(kl: np.ndarray, counts: np.ndarray, resamples: int) -> dict[str, float]:
    """mean (with a 95% interval over items), median, 95th percentile and largest of KL [positions] in nats, `counts` [items] each."""
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64)
    mean = Bootstrap(len(counts), resamples).ratio(np.add.reduceat(kl, starts), counts.astype(np.float64))
    return {"mean": mean.value, "low": mean.low, "high": mean.high, "median": float(np.median(kl)),
            "p95": float(np.quantile(kl, 0.95)), "max": float(kl.max()), "positions": len(kl)}  # fmt: skip
