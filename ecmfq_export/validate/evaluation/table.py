"""A result in the terminal."""

from __future__ import annotations

import math
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ecmfq_export.validate.evaluation.result import EvalResult
from ecmfq_export.validate.report import recall_label

_TASKS = {"embedding": "retrieval (a)", "p_yes": "retrieval (b)"}


def print_result(result: EvalResult, console: Console) -> None:
    """Metrics with their 95% intervals, beside the reference's where there is one."""
    comparison = result.comparison or {}
    theirs = comparison.get("reference_metrics")
    columns = ["measure", *(["reference"] if theirs else []), "this model", *(["kept"] if theirs else [])]
    table = Table(*columns, title=escape(f"{result.model['path']} in {result.model['form']}"), title_justify="left")
    for row in _rows(result.metrics, comparison):
        label, mine, kept, before = row
        cells = [label, *([_find(theirs, before)] if theirs else []), mine, *([kept] if theirs else [])]
        table.add_row(*cells)
    console.print(table)
    for line in _notes(result, comparison):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _rows(metrics: dict[str, Any], comparison: dict[str, Any]) -> list[tuple[str, str, str, tuple[str, ...]]]:
    """(label, this model, what is kept, where the reference has its value)."""
    kept = comparison.get("retention", {})
    rows: list[tuple[str, str, str, tuple[str, ...]]] = []
    for kind, row in metrics.get("vqa", {}).items():
        label = f"answers right ({row['total']})" if kind == "all" else f"  {escape(kind)} ({row['total']})"
        rows.append((label, _fraction(row["accuracy"], row), _kept(kept.get("vqa")) if kind == "all" else "", ("vqa", kind, "accuracy")))
    for name, row in metrics.get("perplexity", {}).items():
        ratio = comparison.get("perplexity_ratio", {}).get(name)
        rows.append((f"perplexity of {name}", f"{row['perplexity']:.4f}", "" if ratio is None else f"x {ratio['value']:.4f}",
                     ("perplexity", name, "perplexity")))  # fmt: skip
    for task, label in _TASKS.items():
        if row := metrics.get(task):
            rows.append((f"{label}: mean of {len(row['recalls'])}", _fraction(row["mean"]["value"], row["mean"]),
                         _kept(kept.get(task)), (task, "mean", "value")))  # fmt: skip
            for name, recall in row["recalls"].items():
                rows.append((f"  {recall_label(name)}", _fraction(recall["recall"], recall), "", (task, "recalls", name, "recall")))
            if near := row.get("near_duplicate"):
                rows.append((f"  near duplicates ({near['total']})", _fraction(near["accuracy"], near), "",
                             (task, "near_duplicate", "accuracy")))  # fmt: skip
    return rows


def _notes(result: EvalResult, comparison: dict[str, Any]) -> list[str]:
    settings = result.settings
    lines = ["[ ]: 95% intervals; the headline of a retrieval is the mean of its recalls" if {"embedding", "p_yes"} & set(result.metrics)
             else "[ ]: 95% intervals"]  # fmt: skip
    if row := result.metrics.get("embedding"):
        lines.append(f"retrieval (a), embeddings: {row['images']} images and {row['texts']} texts, {row['true_texts']} of them true")
    if "p_yes" in result.metrics:
        lines.append(f"retrieval (b), P(yes): a shared list of {settings['candidates']} images and texts")
    for kind, label in (("kl", "KL to the reference"), ("kl_top", "KL to the reference, over its likeliest tokens (a lower bound)")):
        for name, row in comparison.get(kind, {}).items():
            lines.append(f"{label} at tokens of {name}: mean {_scientific(row['mean'])} nats "
                         f"({_scientific(row['low'])} to {_scientific(row['high'])}), largest {row['max']:.2g}")  # fmt: skip
    for name, row in comparison.get("flips", {}).items():
        lines.append(f"tokens of {name}: {row['decisive_flips']} of {row['decisive_positions']} decisive choices flipped, "
                     f"{row['agreement']:.2%} of all {row['positions']} are the same")  # fmt: skip
    if row := comparison.get("answers"):
        lines.append(f"answers: {row['lost']} lost, {row['gained']} gained")
    for name, row in comparison.get("difference", {}).items():
        label = {"vqa": "accuracy", "embedding": "mean recall (a)", "p_yes": "mean recall (b)"}[name]
        lines.append(f"{label} minus the reference's: {row['difference']:+.2%} ({_percent(row['low'])} to {_percent(row['high'])}, "
                     f"p = {_number(row['p_value'])}; paired bootstrap)")  # fmt: skip
    return lines


def _find(metrics: dict[str, Any], path: tuple[str, ...]) -> str:
    value: Any = metrics
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    if value is None:
        return ""
    return f"{value:.4f}" if path[-1] == "perplexity" else f"{value:.1%}"


def _fraction(value: float, interval: dict[str, Any]) -> str:
    return f"{value:.1%} {_brackets(interval)}"


def _kept(row: dict[str, Any] | None) -> str:
    if row is None or row["value"] is None or math.isnan(row["value"]):
        return ""
    return f"{row['value']:.1%} {_brackets(row)}"


def _brackets(row: dict[str, Any]) -> str:
    """The interval in percent; nothing where it is undefined."""
    low, high = row["low"], row["high"]
    if low is None or high is None or math.isnan(low) or math.isnan(high):
        return ""
    return escape(f"[{100 * low:.1f}, {100 * high:.1f}]")


def _percent(value: float | None) -> str:
    return _number(value, "+.2%")


def _scientific(value: float | None) -> str:
    return _number(value, ".2e")


def _number(value: float | None, form: str = ".2g") -> str:
    return "?" if value is None or math.isnan(value) else format(value, form)
