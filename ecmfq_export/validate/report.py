"""The report as data: its checks and verdict, and its form in the terminal.

A report is plain JSON-able data (``report.json``); :mod:`ecmfq_export.validate.html_report` draws the same data. Numbers that
are not finite stand as null, a SQNR of null being that of equal tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ecmfq_export.errors import UserError
from ecmfq_export.validate.artifact_bytes import LABELS

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Thresholds:
    """What a model has to hold to pass.

    Attributes:
        onnx_top1: least fraction of decisive positions where ONNX Runtime and the quantized PyTorch model pick the same token; one
            position may differ however few there are.
        made_up_top1: the same where answers are made up. A model is unsure of sentences that it would not say, and one int8 step that
            is rounded the other way moves an expert and with it a whole answer: there the median KL is judged, not the mean.
        onnx_kl: largest mean KL between the two, and between the graph's prefill and its decode steps, nats. All of them compute
            the same integers wherever their inputs are equal; what remains is rounding of activations, which moves an int8 value
            by one step here and there.
        quantized_kl: largest mean KL between floating-point and quantized PyTorch, nats.
        retention: least accuracy of the quantized model (and of its graph) as a fraction of the floating-point one's.
        retention_items: with fewer questions than this, retention is shown but not judged: its noise exceeds the margin.
        w4a8_bytes: largest size of the W4A8 layers, scales included, as a fraction of their float16 size (per-channel
            scales; groups of 128 add a byte for every 128 weights).
    """

    onnx_top1: float = 0.99
    made_up_top1: float = 0.95
    onnx_kl: float = 0.01
    quantized_kl: float = 0.10
    retention: float = 0.97
    retention_items: int = 100
    w4a8_bytes: float = 0.26


DEFAULT_THRESHOLDS = Thresholds()


@dataclass(frozen=True)
class Check:
    """One row of the verdict; `passed` is None where it was not judged."""

    name: str
    value: float
    limit: str
    passed: bool | None
    detail: str = ""


def judge(report: dict[str, Any], thresholds: Thresholds) -> list[dict[str, Any]]:
    """The checks that a report's figures allow, as data; see :class:`Thresholds`."""
    onnx, quantized = report["logits"]["quantized_vs_onnx"], report["logits"]["float_vs_quantized"]
    decode = report["logits"]["prefill_vs_decode"]
    held_out = bool(report["accuracy"])
    prefix, kl, top1 = ("", "kl_mean", thresholds.onnx_top1) if held_out else ("median ", "kl_median", thresholds.made_up_top1)
    checks = [
        _same_tokens(onnx, top1),
        _at_most(f"{prefix}KL, quantized PyTorch to ONNX Runtime", onnx[kl], thresholds.onnx_kl, f"largest {onnx['kl_max']:.2g}"),
        _at_most(f"{prefix}KL, ONNX Runtime's prefill to its decode steps", decode[kl], thresholds.onnx_kl,
                 f"{decode['positions']} positions, through the cache"),
        _at_most(f"{prefix}KL, floating point to quantized", quantized[kl], thresholds.quantized_kl,
                 f"95% of positions below {quantized['kl_p95']:.2g}"),
    ]  # fmt: skip
    w4a8 = report["bytes"]["layers"].get("w4a8")
    if w4a8:
        limit = thresholds.w4a8_bytes + (1 / 256 if report["bytes"]["group_size"] != -1 else 0.0)
        checks.append(_at_most("bytes of W4A8 layers / float16", w4a8["ratio"], limit, f"{w4a8['stored']:,} bytes"))
    if report["accuracy"]:
        floating = report["accuracy"]["float"]["all"]
        for which, label in (("quantized", "quantized PyTorch"), ("onnx", "ONNX Runtime")):
            kept = report["retention"][which]
            if kept is None:
                continue
            detail = f"{report['accuracy'][which]['all']['correct']} right, floating point {floating['correct']}, of {floating['total']}"
            check = _at_least(f"accuracy kept, {label}", kept, thresholds.retention, detail)
            if floating["total"] < thresholds.retention_items:
                detail += f"; not judged below {thresholds.retention_items} questions"
                check = Check(check.name, check.value, check.limit, None, detail)
            checks.append(check)
    return [vars(check) for check in checks]


def verdict(report: dict[str, Any]) -> bool:
    """Whether no check of the report failed."""
    return not failures(report)


def failures(report: dict[str, Any]) -> list[str]:
    """One line for each failed check: its name, value and limit."""
    return [f"{c['name']}: {c['value']:.4g}, must be {c['limit']} ({c['detail']})"
            for c in report["checks"] if c["passed"] is False]  # fmt: skip


def require_passed(report: dict[str, Any]) -> None:
    """Raise UserError naming the failed rows, if there are any."""
    if rows := failures(report):
        raise UserError(
            "validation failed: " + "; ".join(rows),
            "see report.html for the layer where it starts; attention=w8a8 and more calibration samples are the first things to try",
        )


def print_report(report: dict[str, Any], console: Console) -> None:
    """Show verdict, checks, layers, accuracy and bytes as tables."""
    console.print(_checks_table(report))
    console.print(_layers_table(report))
    if report["accuracy"]:
        console.print(_accuracy_table(report))
    if report["retrieval"]:
        console.print(_retrieval_table(report))
    console.print(_bytes_table(report))
    if verdict(report):
        console.print("[green]validation passed[/]")
    else:
        console.print("[red]validation failed[/]:")
        for row in failures(report):
            console.print(f"  {row}", markup=False, highlight=False)


def _checks_table(report: dict[str, Any]) -> Table:
    table = Table("check", "value", "must be", "", "detail", title=_title(report), title_justify="left")
    words = {True: "[green]pass[/]", False: "[red]FAIL[/]", None: "[yellow]-[/]"}
    for c in report["checks"]:
        table.add_row(c["name"], f"{c['value']:.4g}", c["limit"], words[c["passed"]], c["detail"])
    return table


def _title(report: dict[str, Any]) -> str:
    computes = report["model"].get("computes") or ""
    return escape(f"{report['model']['family']}{f', {computes}' if computes else ''}: {report['settings']['items']} prompts, "
                  f"{report['logits']['float_vs_quantized']['positions']} positions ({report['settings']['positions']})")  # fmt: skip


def _layers_table(report: dict[str, Any]) -> Table:
    table = Table("layer", "SQNR dB", "cosine", "same experts", "ONNX SQNR dB", "ONNX median error",
                  title="hidden states: quantized against floating point; ONNX Runtime against quantized PyTorch",
                  title_justify="left")  # fmt: skip
    for layer in report["layers"]:
        quantized, onnx = layer["float_vs_quantized"], layer["quantized_vs_onnx"]
        same = layer["same_experts"]
        table.add_row(str(layer["index"]), decibel(quantized["sqnr_db"]), f"{quantized['cosine']:.5f}",
                      "" if same is None else f"{same:.1%}", decibel(onnx["sqnr_db"]),
                      f"{onnx['median_error']:.1e}")  # fmt: skip
    return table


def _accuracy_table(report: dict[str, Any]) -> Table:
    models = [m for m in ("float", "quantized", "onnx") if m in report["accuracy"]]
    table = Table("type", "items", *models, title="exact-match accuracy (95% Wilson interval)", title_justify="left")
    for kind, row in report["accuracy"]["float"].items():
        cells = []
        for model in models:
            a = report["accuracy"][model][kind]
            cells.append(f"{a['accuracy']:.1%} ({a['low']:.1%} to {a['high']:.1%})")
        table.add_row(escape(kind), str(row["total"]), *cells)
    return table


def _retrieval_table(report: dict[str, Any]) -> Table:
    retrieval = report["retrieval"]
    recalls = retrieval["recalls"]
    # A row for each recall: the columns of the other way round do not fit 80 characters.
    table = Table("retrieved", *recalls,
                  title=f"caption retrieval among {retrieval['candidates']} images and captions, by P(yes)", title_justify="left")
    for name in recalls["float"]:
        table.add_row(recall_label(name), *(_percent(of_model[name]) for of_model in recalls.values()))
    return table


def recall_label(name: str) -> str:
    """A recall's name for people: ``image_to_text_r@1`` becomes ``image to text R@1``."""
    return name.replace("_", " ").replace(" r@", " R@")


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _bytes_table(report: dict[str, Any]) -> Table:
    table = Table("what", "float16", "now", "ratio", title="bytes", title_justify="left")
    sizes = report["bytes"]
    labels = {**LABELS, "quantized": "all quantized layers"}
    for key, label in labels.items():
        if key in sizes["layers"]:
            row = sizes["layers"][key]
            table.add_row(label, f"{row['float16']:,}", f"{row['stored']:,}", f"{row['ratio']:.2%}")
    whole = sizes["whole"]
    table.add_row("whole checkpoint", f"{whole['float16']:,}", f"{whole['stored']:,}", f"{whole['ratio']:.2%}")
    for name, size in sizes["artifacts"].items():
        table.add_row(escape(name), "", f"{size:,}", "")
    return table


def decibel(value: float | None) -> str:
    """A SQNR for people; null is that of equal tensors."""
    return "equal" if value is None else f"{value:.1f}"


def finite(data: Any) -> Any:
    """`data` with every number that JSON cannot hold (NaN, infinity) replaced by None, NumPy scalars by Python's."""
    if isinstance(data, dict):
        return {str(key): finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [finite(value) for value in data]
    if hasattr(data, "tolist"):
        return finite(data.tolist())
    if isinstance(data, float) and not math.isfinite(data):
        return None
    return data


def _same_tokens(onnx: dict[str, Any], limit: float) -> Check:
    differ, positions = onnx["decisive_disagreements"], onnx["decisive_positions"]
    detail = f"{differ} of {positions} decisive positions differ"
    check = _at_least("ONNX Runtime picks PyTorch's token", onnx["top1_decisive"], limit, detail)
    # A single step of int8 rounded the other way says nothing of a graph, but is more than a hundredth of few positions.
    return replace(check, passed=True, detail=detail + ", one may") if differ == 1 and not check.passed else check


def _at_least(name: str, value: float, limit: float, detail: str) -> Check:
    return Check(name, value, f">= {limit:g}", bool(value >= limit), detail)


def _at_most(name: str, value: float, limit: float, detail: str) -> Check:
    return Check(name, value, f"<= {limit:.4g}", bool(value <= limit), detail)
