"""What an evaluation found: metrics, every item's scores, and its JSON form, from which results can be compared later."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ecmfq_export import __version__
from ecmfq_export.errors import UserError
from ecmfq_export.validate.evaluation.outputs import Distributions, TokenScores, TopTokens

SCHEMA, SCHEMA_VERSION = "ecmfq-evaluation", 1
_TOP_POSITIONS = 20_000
"""Positions up to which a file keeps the likeliest tokens of each; beyond, it would be mostly that."""


@dataclass
class EvalResult:
    """One model on one evaluation.

    Attributes:
        model: what it is (path, form, family, recipes).
        settings: the evaluation's (``EvalSet.settings``) and its prompts.
        metrics: by task: ``vqa``, ``perplexity``, ``embedding``, ``p_yes``; fractions, nats and 95% intervals.
        items: by task the scores of every item, [items] arrays; ranks count from 1.
        comparison: to a reference, see ``compare.compare``; None without one.
        seconds: wall time by part.
        distributions: by span (``answers``, ``captions``) what KL needs when this result is a reference; not in the file.
    """

    model: dict[str, Any]
    settings: dict[str, Any]
    metrics: dict[str, Any] = field(default_factory=dict)
    items: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    comparison: dict[str, Any] | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    distributions: dict[str, Distributions] = field(default_factory=dict, repr=False)

    def headlines(self) -> dict[str, float]:
        """Flat figures, e.g. ``vqa.accuracy``, ``embedding.mean``, ``kl.answers``, ``retention.p_yes``."""
        out: dict[str, float] = {}
        if vqa := self.metrics.get("vqa"):
            out["vqa.accuracy"] = vqa["all"]["accuracy"]
        for name, row in self.metrics.get("perplexity", {}).items():
            out[f"perplexity.{name}"] = row["perplexity"]
        for task in ("embedding", "p_yes"):
            if row := self.metrics.get(task):
                out[f"{task}.mean"] = row["mean"]["value"]
                out |= {f"{task}.{name}": recall["recall"] for name, recall in row["recalls"].items()}
                if row.get("near_duplicate"):
                    out[f"{task}.near_duplicate"] = row["near_duplicate"]["accuracy"]
        for kind in ("kl", "kl_top", "retention"):
            for name, row in (self.comparison or {}).get(kind, {}).items():
                out[f"{kind}.{name}"] = row["mean"] if "mean" in row else row["value"]
        if flips := (self.comparison or {}).get("flips"):
            out["flips.decisive"] = float(sum(row["decisive_flips"] for row in flips.values()))
        return out

    def top_tokens(self, span: str) -> TopTokens | None:
        """The likeliest tokens at a span's positions, where they were kept."""
        kept = self.items.get(span, {})
        return TopTokens(kept["top_ids"], kept["top_log_probs"]) if "top_ids" in kept else None

    def to_json(self) -> dict[str, Any]:
        """Plain data; NaN and infinity become null."""
        items = {task: {name: _listed(values) for name, values in columns.items()} for task, columns in self.items.items()}
        data = {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, "version": __version__, "model": self.model,
                "settings": self.settings, "metrics": self.metrics, "comparison": self.comparison, "seconds": self.seconds,
                "items": items}  # fmt: skip
        return _finite(data)

    def write(self, path: Path) -> None:
        """Write the JSON file; a directory that is missing is made.

        Raises:
            UserError: it cannot be written.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(self.to_json()) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error}") from None

    @classmethod
    def read(cls, path: Path) -> EvalResult:
        """Read what :meth:`write` wrote.

        Raises:
            UserError: no such file, or it is something else.
        """
        fix = "give a file that 'ecmfq-export evaluate --json' wrote"
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path} cannot be read: {error}", fix) from None
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            raise UserError(f"{path} is no evaluation result", fix)
        if data.get("schema_version") != SCHEMA_VERSION:
            raise UserError(f"{path} has schema version {data.get('schema_version')}, this program reads {SCHEMA_VERSION}",
                            "evaluate that model again")
        try:
            items = {task: {name: _array(name, values) for name, values in columns.items()} for task, columns in data["items"].items()}
            return cls(data["model"], data["settings"], data["metrics"], items, data["comparison"], data["seconds"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path} is damaged: {error!r}", fix) from None


def token_items(scores: TokenScores, counts: np.ndarray) -> dict[str, np.ndarray]:
    """Items of a span from its positions: `counts` [items] positions each.

    Returns:
        ``nll`` float64 [items], ``tokens`` int64 [items]; and for each position ``choice``, ``margin``, ``right`` (the likeliest token
        is the next one), with ``top_ids`` and ``top_log_probs`` where there are few enough.
    """
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64)
    out = {"nll": np.add.reduceat(scores.nll, starts), "tokens": counts.astype(np.int64), "choice": scores.choice,
           "margin": scores.margin}  # fmt: skip
    if len(scores.nll) <= _TOP_POSITIONS:
        out |= {"top_ids": scores.top_ids, "top_log_probs": scores.top_log_probs}
    return out


def as_data(row: Any) -> dict[str, Any]:
    """A dataclass as plain data."""
    return asdict(row)


def _listed(values: np.ndarray) -> list[Any]:
    if values.dtype.kind == "f":
        # Six significant digits: float32 holds about seven, and files of many positions stay small.
        return [[float(f"{v:.6g}") for v in row] for row in values] if values.ndim == 2 else [float(f"{v:.9g}") for v in values]
    return values.tolist()


_INTEGERS = {"tokens", "owner", "choice", "top_ids", "image_ranks", "text_ranks", "gallery"}
_FLAGS = {"correct", "near_duplicate"}


def _array(name: str, values: list[Any]) -> np.ndarray:
    dtype = np.int64 if name in _INTEGERS else bool if name in _FLAGS else np.float64
    if any(value is None for value in values):
        raise ValueError(f"'{name}' has missing values")
    return np.array(values, dtype)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value
